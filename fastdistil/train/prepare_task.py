"""From a configuration to the examples of its task: for training, augmented, and held out."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator

from fastdistil.data.batches import BatchSource
from fastdistil.data.noise import permutation
from fastdistil.data.task_batches import TaskBatches, epoch_batches
from fastdistil.data.task_encoding import EncodedTask, encode
from fastdistil.data.tasks import Examples, Task, read_examples
from fastdistil.train.augment import augmented
from fastdistil.train.config import RunConfig
from fastdistil.train.logging import RunLog
from fastdistil.train.sections import AugmentConfig, LoopConfig, TaskConfig


@dataclass(frozen=True)
class TaskExamples:
    """The examples that a phase trains on."""

    data: EncodedTask
    max_tokens: int  # of a forward pass

    def steps_per_epoch(self, loop: LoopConfig) -> int:
        return _steps_per_epoch(len(self.data), loop)

    def steps(self, loop: LoopConfig) -> int:
        return count_steps(len(self.data), loop)

    def rows_read(self, loop: LoopConfig, seed: int) -> np.ndarray:
        """(M,) int64 in ascending order, the examples that a run of that length reads."""
        steps = self.steps(loop)
        if steps >= self.steps_per_epoch(loop):
            return np.arange(len(self.data))
        return np.sort(np.concatenate(epoch_batches(self.data.lengths, loop.batch_size, seed, 0)[:steps]))

    def batches(self, loop: LoopConfig, seed: int, accelerator: Accelerator) -> BatchSource:
        return TaskBatches(
            self.data,
            batch_size=loop.batch_size,
            max_tokens=self.max_tokens,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=seed,
            device=accelerator.device,
        )


def count_steps(num_examples: int, loop: LoopConfig) -> int:
    """Optimiser steps on so many examples; whole epochs end with their smaller last batch."""
    if loop.steps is not None:
        return loop.steps
    assert loop.epochs is not None
    return math.ceil(loop.epochs * _steps_per_epoch(num_examples, loop))


def _steps_per_epoch(num_examples: int, loop: LoopConfig) -> int:
    return math.ceil(num_examples / loop.batch_size)


def split_examples(examples: Examples, section: TaskConfig) -> tuple[Examples, Examples | None]:
    """Those of the training split that are trained on, and those held out of it; None: it is all trained on.

    `max_examples` are the first of a fixed permutation, for a file may be sorted by its labels; the first of
    these again are held out. They are the same for every seed of a run.
    """
    order = permutation(len(examples), 0, 0).numpy()[: section.max_examples]
    if section.validation_fraction is None:
        # In the order of the file.
        return examples.select(np.sort(order)), None
    count = max(1, round(section.validation_fraction * len(order)))
    return examples.select(order[count:]), examples.select(order[:count])


class TaskData:
    """The task's files, read once a run.

    Raises `UserError` for what is wrong with them.
    """

    def __init__(
        self, config: RunConfig, task: Task, tokenizer: Any, accelerator: Accelerator, log: RunLog
    ) -> None:
        assert config.task is not None
        self._config, self._task, self._tokenizer = config, task, tokenizer
        self._accelerator, self._log = accelerator, log
        self._section = config.task
        self._examples = read_examples(task, self._section.data, "train")
        self._examples, held_out = split_examples(self._examples, self._section)
        if held_out is None:
            held_out = read_examples(task, self._section.data, "validation")
            self._split = held_out.split  # another one where the folder lacks it
        else:
            self._split = "held-out training"
        self.held_out = self._encode(held_out, self._split)
        self._training: dict[str, TaskExamples] = {}

    def training(self, augment: AugmentConfig | None) -> TaskExamples:
        """The training examples and, with `augment`, the copies made of them."""
        key = "" if augment is None else augment.model_dump_json()
        if key not in self._training:
            examples, what = self._examples, "train"
            if augment is not None:
                with self._accelerator.main_process_first():
                    examples = augmented(
                        examples,
                        self._task,
                        augment,
                        self._tokenizer,
                        source=str(self._config.teacher or self._config.student.from_model),
                        max_length=self._section.max_length,
                        cache_dir=self._config.data.cache_dir,
                        device=self._accelerator.device,
                        log=self._log,
                    )
                what = f"train with {augment.method} augmentation"
            self._training[key] = TaskExamples(self._encode(examples, what), self._section.max_tokens)
        return self._training[key]

    def describe(self) -> str:
        """What is held out, and how its scores are to be read."""
        return f"Scores on the {len(self.held_out):,} {self._split} examples of {self._task.name}."

    def _encode(self, examples: Examples, what: str) -> EncodedTask:
        data = encode(self._task, examples, self._tokenizer, self._section.max_length)
        tokens = len(data.input_ids)
        notes = f", {data.truncated:,} truncated to {data.max_length} tokens" if data.truncated else ""
        if examples.left_out:
            notes += f", {examples.left_out:,} incomplete rows left out"
        self._log.say(
            f"{self._task.name}, {what}: {len(data):,} examples, {tokens / 1e6:,.2f} M tokens{notes}"
        )
        return data
