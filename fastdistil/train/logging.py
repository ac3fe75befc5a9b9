"""What a run shows while it trains: one progress bar (or plain lines), `metrics.jsonl`, TensorBoard."""

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

METRICS = "metrics.jsonl"


class RunLog:
    """Writes for the main process and is silent in the others. Use as a context manager.

    Each line of `metrics.jsonl` is one record: `phase`, `step` and either the training values since the last
    record (loss, its unweighted terms, lr, tokens seen, tokens_per_s) or the held-out ones (held_out_loss,
    held_out_accuracy).
    """

    def __init__(self, output: Path, *, main: bool, console: Console | None = None) -> None:
        self._file = output / METRICS
        self._main = main
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._writer: Any = None
        self._total = 0
        self._first = (0, 0.0)
        if main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                pass
            else:
                self._writer = SummaryWriter(str(output / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_phase()
        if self._writer is not None:
            self._writer.close()

    def say(self, text: str) -> None:
        if self._main:
            self._console.print(text, markup=False, soft_wrap=True)

    def print(self, what: RenderableType) -> None:
        if self._main:
            self._console.print(what)

    def begin_phase(self, phase: str, step: int, steps: int) -> None:
        """Start the bar of a phase at `step` of `steps`, and forget records that a kill left beyond it."""
        if not self._main:
            return
        self._forget_after(phase, step)
        self._total, self._first = steps, (step, time.monotonic())
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(phase, total=steps, completed=step, values="")

    def end_phase(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def advance(self, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def record(self, phase: str, step: int, values: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl` and show it. Values that are not finite are written as null."""
        if not self._main:
            return
        line = {
            "phase": phase,
            "step": step,
            **{k: v if math.isfinite(v) else None for k, v in values.items()},
        }
        with open(self._file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(f"{phase}/{key}", value, step)
        if self._bar is not None and self._task is not None:
            if "loss" in values:
                self._bar.update(self._task, completed=step, values=_short(values))
            else:
                self.say(f"{phase} step {step}: {_short(values)}")
        else:
            self.say(f"{phase} step {step}/{self._total}: {_short(values)}{self._time_left(step)}")

    def flush(self) -> None:
        """Put what is recorded on the disk, before a checkpoint says it is there."""
        if self._main and self._file.exists():
            with open(self._file, "rb") as handle:
                os.fsync(handle.fileno())

    def _time_left(self, step: int) -> str:
        first, start = self._first
        if step == first:
            return ""
        seconds = (time.monotonic() - start) / (step - first) * (self._total - step)
        return f", {_duration(seconds)} left"

    def _forget_after(self, phase: str, step: int) -> None:
        if not self._file.exists():
            return
        kept = [
            json.dumps(r) + "\n"
            for r in read_metrics(self._file)
            if r["phase"] != phase or (step > 0 and r["step"] <= step)
        ]
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self._file)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that was cut off by a kill is left out."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _short(values: dict[str, float]) -> str:
    shown = []
    for key, value in values.items():
        if key == "seconds" or (key == "ce" and value == values.get("loss")):
            continue
        if key == "tokens_per_s":
            shown.append(f"{value:,.0f} tokens/s")
        elif key == "tokens":
            shown.append(f"{value / 1e6:,.2f} M tokens")
        elif key == "lr":
            shown.append(f"lr {value:.2e}")
        elif "accuracy" in key:
            shown.append(f"{key.replace('_', ' ').replace('held out', 'held-out')} {value:.2%}")
        else:
            shown.append(f"{key.replace('_', ' ').replace('held out', 'held-out')} {value:.4f}")
    return ", ".join(shown)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
