"""The training loop: one optimiser step after another, the same update however it is split.

Each term of the loss is divided by its count over all micro-batches and all processes of the step, so one
process with one big batch, one with accumulation and several processes compute the same gradient (to float
rounding).
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastdistil.data.batches import Batch, BatchSource
from fastdistil.errors import RunError
from fastdistil.models.taps import Taps, Wanted, answered, tap, tap_teacher
from fastdistil.objectives import Objective, projections
from fastdistil.train.checkpoint import (
    Progress,
    Rng,
    load_checkpoint,
    newest_checkpoint,
    rng_state,
    save_checkpoint,
)
from fastdistil.train.logging import RunLog
from fastdistil.train.sections import LoopConfig, OptimizerConfig, ScheduleConfig


@dataclass
class Phase:
    """One model's training: what is learned from what, for how long."""

    name: str
    model: Any  # the one that is trained
    teacher: Any | None  # in eval mode
    teacher_dtype: torch.dtype | None  # autocast of the teacher
    objectives: Sequence[Objective]
    batches: BatchSource
    steps: int
    seed: int  # of the dropout
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    loop: LoopConfig
    eval_every: int  # optimiser steps
    checkpoint_every: int
    checkpoints: Path
    fingerprint: str
    evaluate: Callable[[Any], dict[str, float]] | None  # on held-out text, run by the main process
    parameters: list[nn.Parameter] | None = None  # None: all


class Learner(nn.Module):
    """Student and objectives as one forward pass, the unit that DDP and autocast wrap."""

    def __init__(self, student: nn.Module, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.student = student
        self.objectives = objectives
        self.projections = projections(objectives)  # registered, for DDP
        self.wanted = Wanted.union(objective.student_taps for objective in objectives)

    def forward(
        self, batch: Batch, teacher: Taps | None, counts: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's share of the step's weighted loss, and of the mean of each term, for the log."""
        student = tap(self.student, batch.inputs, self.wanted)
        results = [objective.loss(student, teacher, batch, counts) for objective in self.objectives]
        terms = {
            term: value / counts[term].clamp(min=1)
            for result in results
            for term, value in result.sums.items()
        }
        return torch.stack([result.loss for result in results]).sum(), terms


def train(phase: Phase, accelerator: Accelerator, log: RunLog) -> None:
    """Train `phase.model` in place, from its newest checkpoint if there is one.

    Raises `RunError` if the loss or a gradient is not finite or a checkpoint cannot be written, and
    `KeyboardInterrupt` after Ctrl-C, once a checkpoint is saved.
    """
    device, world = accelerator.device, accelerator.num_processes
    plain = Learner(phase.model, phase.objectives).to(device).train()
    trained = [*(phase.parameters or phase.model.parameters()), *plain.projections.parameters()]
    plain.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = _optimizer(trained, phase.optimizer, device)
    learner = accelerator.prepare_model(plain)
    torch.manual_seed(phase.seed * 1_000_003 + accelerator.process_index)

    progress = Progress()
    if found := newest_checkpoint(phase.checkpoints, phase.fingerprint):
        progress, data = load_checkpoint(found, phase.model, plain.projections, optimizer, accelerator)
        phase.batches.load_state_dict(data)
        log.say(f"{phase.name}: resumed from {found.name}")
    accelerator.wait_for_everyone()
    log.begin_phase(phase.name, progress.step, phase.steps)
    if progress.step == 0:
        _evaluate(phase, 0, accelerator, log)

    def checkpoint(rng: Rng, data: dict[str, Any]) -> None:
        log.flush()
        save_checkpoint(
            phase.checkpoints,
            phase.model,
            plain.projections,
            optimizer,
            progress,
            rng=rng,
            data=data,
            accelerator=accelerator,
            fingerprint=phase.fingerprint,
            keep=phase.loop.keep_checkpoints,
        )

    window = _Window(accelerator)
    with _Interrupt() as interrupt:
        for step in range(progress.step, phase.steps):
            # Ctrl-C in the middle of a step drops its gradients: the checkpoint is the state before it.
            before = rng_state(device), phase.batches.state_dict()
            micro_batches = list(phase.batches.micro_batches(step))
            counts = _global_counts(phase.objectives, micro_batches, accelerator)
            for i, batch in enumerate(micro_batches):
                last = i == len(micro_batches) - 1
                with nullcontext() if last else accelerator.no_sync(learner):
                    loss, terms = learner(batch, _teacher_taps(phase, batch), counts)
                    # DDP averages over the processes; the counts already cover them all.
                    accelerator.backward(loss * world)
                window.add(loss, terms, batch)
                if interrupt.requested and world == 1 and not last:
                    window.require_finite(progress.step)
                    window.count(progress)
                    checkpoint(*before)
                    raise KeyboardInterrupt
            norm = accelerator.clip_grad_norm_(trained, phase.optimizer.max_grad_norm)
            lr = phase.optimizer.lr * lr_factor(step, phase.steps, phase.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window.end_step(norm)
            progress.step = step + 1
            log.advance(progress.step)

            done = progress.step == phase.steps
            evaluate = done or progress.step % phase.eval_every == 0
            save = done or progress.step % phase.checkpoint_every == 0
            stop = interrupt.requested and world == 1
            if evaluate or save or stop or progress.step % phase.loop.log_every == 0:
                # The only place where the loop waits for the device, and where processes agree to stop.
                values, stop = window.read(progress, interrupt.requested)
                log.record(phase.name, progress.step, {**values, "lr": lr})
                if evaluate:
                    _evaluate(phase, progress.step, accelerator, log)
                if save or stop:
                    checkpoint(rng_state(device), phase.batches.state_dict())
                if stop:
                    raise KeyboardInterrupt
                window.restart()  # evaluations and checkpoints are not training time
    log.end_phase()
    phase.model.eval()


def lr_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, then the schedule's shape."""
    warmup = schedule.warmup * steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1.0, steps - warmup)
    match schedule.name:
        case "linear":
            return min(1.0, left)
        case "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
        case "constant":
            return 1.0


def _optimizer(
    parameters: list[nn.Parameter], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.name == "adadelta":
        return torch.optim.Adadelta(groups, lr=config.lr, rho=config.rho, eps=config.eps)
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _teacher_taps(phase: Phase, batch: Batch) -> Taps | None:
    if phase.teacher is None:
        return None
    known = getattr(batch, "answers", None)
    if known is not None:
        return answered(known.logits, known.first, known.layers)
    wanted = Wanted.union(objective.teacher_taps for objective in phase.objectives)
    return tap_teacher(phase.teacher, batch.inputs, phase.teacher_dtype, wanted)


def _global_counts(
    objectives: Sequence[Objective], micro_batches: Sequence[Batch], accelerator: Accelerator
) -> dict[str, Tensor]:
    """What the mean of each term is over, of all micro-batches and processes; on the device."""
    sums: dict[str, Tensor] = {}
    for batch in micro_batches:
        for objective in objectives:
            for term, count in objective.counts(batch).items():
                sums[term] = sums[term] + count if term in sums else count
    total = torch.stack(list(sums.values()))
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
    return dict(zip(sums, total.unbind(), strict=True))


def _evaluate(phase: Phase, step: int, accelerator: Accelerator, log: RunLog) -> None:
    if phase.evaluate is not None and accelerator.is_main_process:
        training = phase.model.training
        phase.model.eval()
        log.record(phase.name, step, phase.evaluate(phase.model))
        phase.model.train(training)
    accelerator.wait_for_everyone()


class _Window:
    """Sums on the device since the last log record, read with one host sync."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.restart()

    def restart(self) -> None:
        device = self._accelerator.device
        self._sums: dict[str, Tensor] = {}
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._step_tokens = torch.zeros_like(self._tokens)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._steps = 0
        self._start = time.monotonic()

    def add(self, loss: Tensor, terms: dict[str, Tensor], batch: Batch) -> None:
        """One micro-batch: its share of the step's loss and terms."""
        for name, value in {"loss": loss.detach(), **terms}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._step_tokens += batch.attention_mask.sum()

    def end_step(self, norm: Tensor) -> None:
        self._finite &= norm.isfinite()
        self._tokens += self._step_tokens
        self._step_tokens.zero_()
        self._steps += 1

    def count(self, progress: Progress) -> dict[str, float]:
        """Add the tokens of all processes' whole steps, and the time, to `progress`."""
        tokens = self._tokens
        if self._accelerator.num_processes > 1:
            tokens = self._accelerator.reduce(tokens, "sum")
        seen, seconds = int(tokens.item()), time.monotonic() - self._start
        progress.tokens += seen
        progress.seconds += seconds
        totals = {"tokens": progress.tokens, "seconds": progress.seconds}
        return {**totals, "tokens_per_s": seen / max(seconds, 1e-9)}

    def read(self, progress: Progress, interrupted: bool) -> tuple[dict[str, float], bool]:
        """Means over the window's steps, and whether any process was interrupted; counts into `progress`."""
        flag = torch.tensor(float(interrupted), device=self._accelerator.device)
        summed = torch.stack([*self._sums.values(), (~self._finite).float(), flag])
        if self._accelerator.num_processes > 1:
            summed = self._accelerator.reduce(summed, "sum")
        *sums, broken, stop = summed.tolist()
        means = {name: value / self._steps for name, value in zip(self._sums, sums, strict=True)}
        if broken or not all(math.isfinite(value) for value in means.values()):
            raise _not_finite(self._steps, progress.step, means)
        return {**means, **self.count(progress)}, bool(stop)

    def require_finite(self, step: int) -> None:
        """Raise what `read` would, in the middle of the step after `step`."""
        *sums, broken = torch.stack([*self._sums.values(), (~self._finite).float()]).tolist()
        if broken or not all(map(math.isfinite, sums)):
            steps = self._steps + 1
            means = {name: value / steps for name, value in zip(self._sums, sums, strict=True)}
            raise _not_finite(steps, step + 1, means)


def _not_finite(steps: int, step: int, means: dict[str, float]) -> RunError:
    shown = ", ".join(f"{name} {value:g}" for name, value in means.items())
    return RunError(
        f"loss or gradient is not finite within the {steps} steps before step {step} ({shown}); earlier "
        "checkpoints are kept; try a lower optimizer.lr or run.precision=fp32, in another --output"
    )


@dataclass
class _Interrupt:
    """Turns the first Ctrl-C into a request; the second one acts as usual."""

    requested: bool = False
    _previous: Any = field(default=None, repr=False)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
