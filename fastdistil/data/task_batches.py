"""Batches of a task's examples, of similar length, under a budget of tokens.

An epoch is the permutation of its examples cut into windows of 50 batches. A window is sorted by length and
cut into batches, and the batches of the epoch are shuffled. So a batch holds texts of similar length, as with
the `LengthGroupedSampler` of transformers, every example is read exactly once an epoch, and (seed, epoch,
step) say which examples a step reads, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdistil.data.batches import require_same_data, to_device
from fastdistil.data.noise import noise_bits, permutation
from fastdistil.data.task_encoding import EncodedTask, TeacherAnswers
from fastdistil.errors import UserError

_WINDOW = 50  # batches that are sorted together
_MULTIPLE = 8  # lengths are rounded up to it: tensor cores want it, and fewer lengths mean fewer shapes
_BATCH_ORDER = 16  # the stream of `noise_bits` that shuffles the batches


@dataclass(frozen=True)
class BatchAnswers:
    """What a teacher says of a batch, known beforehand.

    Attributes:
        logits: (B, C) float32 of classes, options or one score.
        first: (S, K, D) float32, the outputs of K layers at the first token of each sequence; None: of none.
        layers: those K layers, from 0.
    """

    logits: Tensor
    first: Tensor | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskBatch:
    """B examples of a task, padded to L tokens. A choice task has C options an example.

    Attributes:
        input_ids: (B, L) int64; (B * C, L) for a choice task.
        attention_mask: bool, like input_ids, false on padding.
        token_type_ids: int64, like input_ids.
        labels: (B,) int64 class or option, -100 where unknown; (B,) float32 score, NaN where unknown;
            (B, 2) int64 first and last token of the answer.
        num_choices: C, 1 for the other tasks.
        answers: of the teacher; None: it is to be asked.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor
    num_choices: int = 1
    answers: BatchAnswers | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the models' forward passes are called with; (B, C, L) for a choice task."""
        inputs = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "token_type_ids")}
        if self.num_choices == 1:
            return inputs
        # A count of tokens is taken of the mask in some models' heads for choices.
        inputs["attention_mask"] = self.attention_mask.long()
        return {name: value.unflatten(0, (-1, self.num_choices)) for name, value in inputs.items()}


class TaskBatches:
    """A `BatchSource` of a task's examples, in the module's order.

    The last batch of an epoch may be smaller. Rank r of W takes every W-th example of a batch from the r-th
    on; where a batch has fewer examples than there are ranks, it is dealt out again from its first, so that
    no rank is without one. A rank's share is cut into micro-batches of at most `max_tokens` tokens, padding
    counted, or of one example.

    Args:
        data: the examples.
        batch_size: examples of an optimiser step, over all ranks and micro-batches.
        max_tokens: of a micro-batch; B * C * L.
        seed: of the order.
        device: where the batches are wanted.
    """

    def __init__(
        self,
        data: EncodedTask,
        *,
        batch_size: int,
        max_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {batch_size}")
        if max_tokens < 1:
            raise UserError(f"max_tokens must be >= 1, got {max_tokens}")
        if len(data) == 0:
            raise UserError(f"task {data.task.name!r} has no example to train on")
        self._data = data
        self._batch_size = batch_size
        self._max_tokens = max_tokens
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._device = device
        self._order: tuple[int, list[np.ndarray]] = (-1, [])
        self._sha256 = data.sha256

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._data) // self._batch_size)

    def rows(self, step: int) -> np.ndarray:
        """(n,) int64, the examples of an optimiser step over all ranks, in ascending order of length."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = epoch_batches(self._data.lengths, self._batch_size, self._seed, epoch)
            self._order = (epoch, order)
        return self._order[1][place]

    def micro_batches(self, step: int) -> Iterator[TaskBatch]:
        rows = self.rows(step)
        own = rows[self._rank % len(rows) :: self._world_size]
        for part in within_budget(self._data, own, self._max_tokens):
            yield to_device(read_task_batch(self._data, part), self._device)

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on besides the step: a resumed run must have the same."""
        return {
            "examples": len(self._data),
            "sha256": self._sha256,
            "batch_size": self._batch_size,
            "seed": self._seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError naming what differs from the run that saved the state."""
        require_same_data(state, self.state_dict())


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The examples of each batch of an epoch, every example in exactly one batch."""
    shuffled = permutation(len(lengths), seed, epoch).numpy()
    window = np.arange(len(shuffled)) // (_WINDOW * batch_size)
    by_length = shuffled[np.lexsort((lengths[shuffled], window))]
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    order = noise_bits(seed, _BATCH_ORDER, epoch, torch.arange(len(batches))).argsort(stable=True)
    return [batches[i] for i in order.tolist()]


def within_budget(data: EncodedTask, rows: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """`rows` in consecutive parts of at most `max_tokens` tokens once padded, or of one example."""
    start, longest = 0, 0
    lengths = data.lengths[rows].tolist()
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        tokens = (end - start + 1) * data.num_choices * _padded(data, longest)
        if tokens > max_tokens and end > start:
            yield rows[start:end]
            start, longest = end, length
    if len(rows):
        yield rows[start:]


def read_task_batch(data: EncodedTask, rows: np.ndarray) -> TaskBatch:
    """The examples `rows` (B,), padded to the longest, rounded up to a multiple of 8."""
    choices = data.num_choices
    sequences = (rows[:, None] * choices + np.arange(choices)).ravel()
    begin, end = data.offsets[sequences, None], data.offsets[sequences + 1, None]
    place = begin + np.arange(_padded(data, int((end - begin).max())))
    mask = place < end
    place = np.minimum(place, end - 1)
    ids = np.where(mask, data.input_ids[place], data.pad_id).astype(np.int64)
    types = np.where(mask, data.token_type_ids[place], 0).astype(np.int64)
    labels = torch.from_numpy(data.labels[rows])
    known = None if data.answers is None else _answers(data.answers, data, rows)
    return TaskBatch(
        torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(types), labels, choices, known
    )


def _answers(answers: TeacherAnswers, data: EncodedTask, rows: np.ndarray) -> BatchAnswers:
    places = np.searchsorted(answers.examples, rows)
    assert np.array_equal(answers.examples[places], rows), "a batch of examples that were not asked about"
    known = torch.from_numpy(answers.rows[places])
    logits, first = known.tensor_split([data.task.num_labels], dim=1)
    if not answers.layers:
        return BatchAnswers(logits)
    sequences, layers = len(rows) * data.num_choices, len(answers.layers)
    return BatchAnswers(logits, first.reshape(sequences, layers, -1), answers.layers)


def _padded(data: EncodedTask, length: int) -> int:
    # A model may have no position beyond max_length.
    return min(-(-length // _MULTIPLE) * _MULTIPLE, data.max_length)
