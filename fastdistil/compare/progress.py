"""What a comparison shows while it runs: a line for each model that is made, a bar while they are timed."""

import time
from types import TracebackType
from typing import Self

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


class CompareLog:
    """Use as a context manager. Models are announced by lines: their training has bars of its own."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._seconds: list[float] = []  # of the models made so far

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_bar()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def print(self, what: RenderableType) -> None:
        self._console.print(what)

    def begin_model(self, name: str, number: int, total: int) -> None:
        """Announce model `number` (from 1) of `total` that are to be made, and the time that is left."""
        left = ""
        if self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            left = f", about {duration(mean * (total - number + 1))} left"
        self.say(f"[{number}/{total}] {name}{left}")
        self._start = time.monotonic()

    def end_model(self, scores: str) -> None:
        self._seconds.append(time.monotonic() - self._start)
        self.say(f"    {scores} ({duration(self._seconds[-1])})")

    def fail_model(self, error: str) -> None:
        self.say(f"    failed: {error}")

    def advance(self, done: int, total: int) -> None:
        """Move the bar of the measurement, which is begun with the first call."""
        if not self._console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("timing, rounds", total=total)
        assert self._task is not None
        self._bar.update(self._task, completed=done)

    def end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
