"""Make the model of a chain: distil, compress, recover by distillation from the original teacher.

    output/models/<chain>-<digest>/seed-<n>/
      run/          the training run: a distillation, or the recovery after a method
      start/        what the recovery starts from (removed when the step is done)
      model/        the step's result: a folder that `load` reads
      step.json     written last: how the model was made, and how long that took

Each step has a folder of its own, named by the chain up to it, so that chains with the same beginning share
it, and an interrupted chain goes on where it stopped.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastdistil import __version__
from fastdistil.compare.files import write_json
from fastdistil.compare.memory import return_freed_memory
from fastdistil.compare.steps import Chain, Step
from fastdistil.compress.method import Calibration
from fastdistil.data.noise import permutation
from fastdistil.data.task_batches import read_task_batch, within_budget
from fastdistil.data.task_encoding import EncodedTask, encode
from fastdistil.data.tasks import Task, read_examples
from fastdistil.errors import UserError
from fastdistil.evaluate import check_teacher, evaluate_task
from fastdistil.export.folder import Exported, read_exported
from fastdistil.models.taps import accepted_inputs, task_logits
from fastdistil.models.task import load_task_model
from fastdistil.objectives.prediction import task_loss
from fastdistil.recipes import load_recipe
from fastdistil.train.cache import model_fingerprint
from fastdistil.train.checkpoint import save_model
from fastdistil.train.config import RunConfig, load_config
from fastdistil.train.prepare_task import count_steps, split_examples

RECORD = "step.json"
_CALIBRATION_TOKENS = 4096  # of a batch, padding counted


@dataclass(frozen=True)
class ChainContext:
    """What all chains of a comparison share."""

    teacher: str  # folder or hub id of a model with a head for the task
    task: Task
    data: str | None  # folder of the task's files; None: the hub
    output: Path
    max_length: int = 128
    calibration_examples: int = 256
    # Where it is scored in place of the validation split: to choose among chains by.
    validation_fraction: float | None = None
    allow_weak_teacher: bool = False
    teacher_is_checked: bool = False  # by the caller: it is not scored again before something learns from it
    say: Callable[[str], None] = print

    @cached_property
    def tokenizer(self) -> Any:
        return load_task_model(self.teacher, self.task, new_head=False)[1]

    @cached_property
    def strong_teacher(self) -> str:
        """The teacher, once it is seen to be better than chance on the validation split; else `UserError`."""
        model, tokenizer = load_task_model(self.teacher, self.task, new_head=False)
        examples = read_examples(self.task, self.data, "validation")
        scores = evaluate_task(model, self.task, encode(self.task, examples, tokenizer, self.max_length))
        check_teacher(self.teacher, self.task, scores, examples.labels, self.say, allow_weak=False)
        return self.teacher

    @cached_property
    def examples(self) -> EncodedTask:
        """The training examples that methods look at."""
        examples = read_examples(self.task, self.data, self.task.splits[0])
        # The last of the order whose first are held out where `task.validation_fraction` says so.
        rows = permutation(len(examples), 0, 0).numpy()[-self.calibration_examples :]
        return encode(self.task, examples.select(rows), self.tokenizer, self.max_length)

    def calibration(self) -> Calibration:
        """On the CPU, where methods run."""
        data = self.examples
        rows = data.lengths.argsort(kind="stable")
        batches = [
            read_task_batch(data, part)
            for start in range(0, len(rows), 32)
            for part in within_budget(data, rows[start : start + 32], _CALIBRATION_TOKENS)
        ]
        return Calibration(batches, mean_task_loss)


@dataclass(frozen=True)
class Record:
    """How a step's model was made."""

    chain: str
    seconds: float  # of the whole chain up to here; of a step that was interrupted, of its last attempt
    notes: list[str]  # of the steps, such as what a measurement decided


def run_chain(chain: Chain, context: ChainContext, seed: int = 0, *, train: bool = True) -> Path:
    """The folder of the chain's model, which is made unless it is there.

    Without `train` the model has the chain's structure and size but was not trained: for measuring speed.

    Raises:
        UserError: a step that the model, or the step before it, does not allow; anything wrong with the task.
        RunError: a failure while training.
    """
    source = context.teacher
    for count, step in enumerate(chain.steps, start=1):
        part = chain.prefix(count)
        folder = step_folder(part, context, seed, train=train)
        if not (folder / RECORD).exists():
            context.say(f"{part.name}: {step} from {source}")
            start = time.monotonic()
            made = _make(step, source, folder, context, seed, train=train, first=count == 1)
            return_freed_memory()
            elapsed = time.monotonic() - start
            record = {"chain": part.name, "seconds": elapsed, "notes": made, "steps": _identities(part)}
            write_json(folder / RECORD, record)
        source = str(folder / "model")
    return Path(source)


def check_chain(chain: Chain, context: ChainContext) -> None:
    """Raise `UserError` for a wrong key or value of a training that the chain takes, before any is made."""
    for count, step in enumerate(chain.steps, start=1):
        folder = step_folder(chain.prefix(count), context, 0)
        if step.is_recipe:
            _recipe_config(step, context.teacher, folder, context, 0, first=count == 1)
        elif step.recover is not None:
            _recovery_config(step, folder, context, 0)


def chain_record(chain: Chain, context: ChainContext, seed: int = 0) -> Record:
    """Of a chain that is made."""
    plain = [
        json.loads((step_folder(chain.prefix(i + 1), context, seed) / RECORD).read_text(encoding="utf-8"))
        for i in range(len(chain.steps))
    ]
    return Record(chain.name, sum(p["seconds"] for p in plain), [note for p in plain for note in p["notes"]])


def step_folder(chain: Chain, context: ChainContext, seed: int, *, train: bool = True) -> Path:
    """Where the model of the chain's last step is made."""
    identity = [
        __version__,
        model_fingerprint(context.teacher),
        context.task.name,
        context.data,
        context.max_length,
        context.validation_fraction,
        _identities(chain),
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = chain.name.replace(":", "-").replace("/", "-")
    kind = "models" if train else "structures"
    return context.output / kind / f"{name}-{digest}" / f"seed-{seed}"


def mean_task_loss(model: Any, batch: Any) -> torch.Tensor:
    """The task's loss of a model on a batch, a mean over its examples."""
    output = model(**accepted_inputs(model, batch.inputs))
    logits = task_logits(output, batch.attention_mask)
    return task_loss(logits, batch.labels) / batch.labels.numel()


def _identities(chain: Chain) -> list[dict[str, Any]]:
    return [step.identity() for step in chain.steps]


def _make(
    step: Step, source: str, folder: Path, context: ChainContext, seed: int, *, train: bool, first: bool
) -> list[str]:
    """Make the step's `model` folder; what the user should know of it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)  # of a try that was not recorded
    if step.is_recipe:
        _distil(step, source, folder, context, seed, train=train, first=first)
        notes = []
    else:
        notes = _compress(step, source, folder, context, seed, train=train)
    for rest in ("start", "run/checkpoints"):
        shutil.rmtree(folder / rest, ignore_errors=True)
    return notes


def _distil(
    step: Step, source: str, folder: Path, context: ChainContext, seed: int, *, train: bool, first: bool
) -> None:
    refuse_runtime(step, source, read_exported(source))
    config = _recipe_config(step, source, folder, context, seed, first=first)
    if train:
        _train(config, folder, context)
        return
    from fastdistil.train.students import build_student, resolved

    config = resolved(config)
    torch.manual_seed(seed)
    origin = config.student.from_model or config.teacher
    assert origin is not None
    model, tokenizer = load_task_model(origin, context.task, new_head=True)
    model = build_student(config.student, model, pairs=len(context.task.columns) > 1)
    save_model(model, tokenizer, folder / "model")


def _recipe_config(
    step: Step, source: str, folder: Path, context: ChainContext, seed: int, *, first: bool
) -> RunConfig:
    """A recipe of a task learns from the original teacher; one of text makes a student to be fine-tuned."""
    reads_task = _reads_task(step)
    learns = any(
        objective.get("kd_weight", 1) > 0 and objective["name"] != "next_sentence"
        for objective in _objectives(step)
    )
    options = {"seed": seed, "baseline": False, **step.options}
    if reads_task:
        options = {**_of_task(context), **options}
    if learns and not first:
        options.setdefault("student.from_model", source)
    return load_config(
        str(step),
        [f"{key}={json.dumps(value)}" for key, value in options.items()],
        teacher=context.teacher if learns else source,
        task=context.task.argument if reads_task else None,
        data=context.data if reads_task else None,
        output=folder / "run",
    )


def _objectives(step: Step) -> list[dict[str, Any]]:
    recipe = load_recipe(step.name)
    stages = recipe.get("stages") or [recipe]
    return [objective for stage in stages for objective in stage.get("objectives", [])]


def _reads_task(step: Step) -> bool:
    return any(objective["name"] == "prediction" for objective in _objectives(step))


def _compress(
    step: Step, source: str, folder: Path, context: ChainContext, seed: int, *, train: bool
) -> list[str]:
    method = step.method
    refuse_runtime(step, source, read_exported(source))
    config = None
    if train and step.recover is not None:
        config = _recovery_config(step, folder, context, seed)
    more = {"steps": _steps(config, context)} if method.uses_steps and config is not None else {}
    options = step.method_options(**more)
    start = folder / "start"
    if config is None or not start.exists():
        torch.manual_seed(seed)
        model, tokenizer = load_task_model(source, context.task, new_head=False)
        model = method.apply(model, options, context.calibration())
        if config is not None:
            save_model(model, tokenizer, start)
    if config is not None:
        trained = _train(config, folder, context)
        model, tokenizer = load_task_model(trained, context.task, new_head=False)
    model = method.finish(model, options)
    notes: list[str] = list((getattr(model.config, "fastdistil", None) or {}).get("notes", []))
    save_model(model, tokenizer, folder / "model")
    return notes


def _recovery_config(step: Step, folder: Path, context: ChainContext, seed: int) -> RunConfig:
    options = {"seed": seed, **_of_task(context), **(step.recover or {})}
    options["student.from_model"] = str(folder / "start")
    return load_config(
        "recover",
        [f"{key}={json.dumps(value)}" for key, value in options.items()],
        teacher=context.teacher,
        task=context.task.argument,
        data=context.data,
        output=folder / "run",
    )


def _of_task(context: ChainContext) -> dict[str, Any]:
    return {
        "task.max_length": context.max_length,
        "task.validation_fraction": context.validation_fraction,
        "allow_weak_teacher": context.allow_weak_teacher,
    }


def _steps(config: RunConfig, context: ChainContext) -> int:
    """Optimiser steps of a recovery."""
    assert config.task is not None
    examples = read_examples(context.task, context.data, context.task.splits[0])
    return count_steps(len(split_examples(examples, config.task)[0]), config.run)


def _train(config: RunConfig, folder: Path, context: ChainContext) -> Path:
    """The folder of the trained model, moved to the step's `model`."""
    from fastdistil.train.run import CONFIG, run

    if config.uses_teacher and not (context.teacher_is_checked or config.allow_weak_teacher):
        _ = context.strong_teacher
    # Only the last step's model is scored, and not here.
    run(config, resume=(config.output / CONFIG).exists(), score=False)
    trained = config.output / ("student" if config.uses_teacher else "model")
    os.rename(trained, folder / "model")
    return folder / "model"


def refuse_runtime(step: Step, source: str | Path, exported: Exported | None) -> None:
    """Raise `UserError` where the step would start from an exported model."""
    if exported is not None:
        raise UserError(
            f"{step}: {source} is a model for {exported.runtime} already, which can only run; a step that "
            "makes one must be the last"
        )
