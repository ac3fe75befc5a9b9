"""What is shown of a row: names, units and numbers, the same in the table, the pictures and the page."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from fastdistil.compare.results import Comparison, Kind, Row, pareto_front
from fastdistil.train.report import title

KINDS: tuple[Kind, ...] = get_args(Kind)
MISSING = "–"
LEVELS = (0.97, 0.93)  # shares of the teacher's score: the questions to answer, lines in the pictures


def score_name(comparison: Comparison) -> str:
    """GLUE takes the mean where a task has two metrics."""
    names = " and ".join(title(metric) for metric in comparison.metrics)
    return f"mean of {names}" if len(comparison.metrics) > 1 else names


def number(value: float) -> str:
    """Three to four significant digits, thousands apart."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


@dataclass(frozen=True)
class Quantity:
    """A column of the table and an axis of the page's plot."""

    key: str
    label: str  # that says all, for an axis or a tooltip
    unit: str
    of: Callable[[Comparison, Row], float | None]
    form: Callable[[float], str] = number
    more_is_better: bool = False

    def value(self, comparison: Comparison, row: Row) -> float | None:
        """In the unit; None where it was not measured or is not finite."""
        value = self.of(comparison, row)
        return value if value is not None and math.isfinite(value) else None

    def text(self, comparison: Comparison, row: Row) -> str:
        value = self.value(comparison, row)
        return MISSING if value is None else self.form(value)


def _scaled(factor: float, of: Callable[[Row], float | None]) -> Callable[[Comparison, Row], float | None]:
    def value(_: Comparison, row: Row) -> float | None:
        plain = of(row)
        return None if plain is None else factor * plain

    return value


def _latency(batch_size: int, one_thread: bool) -> Quantity:
    def p50(_: Comparison, row: Row) -> float | None:
        timing = row.timing(batch_size, one_thread=one_thread)
        return None if timing is None else timing.p50_ms

    threads = "one thread" if one_thread else "all threads"
    return Quantity(
        f"latency{batch_size}" + ("" if one_thread else "all"),
        f"latency, batch {batch_size}, {threads}",
        "ms",
        p50,
    )


SCORE = Quantity("score", "score", "%", _scaled(100, lambda row: row.score), "{:.2f}".format, True)
RETAINED = Quantity(
    "retained",
    "share of the teacher's score",
    "%",
    lambda comparison, row: None if (share := comparison.retained(row)) is None else 100 * share,
    "{:.1f}".format,
    True,
)
PARAMETERS = Quantity("parameters", "parameters", "M", _scaled(1e-6, lambda row: row.parameters))
SIZE = Quantity("size", "size on disk", "MB", _scaled(1e-6, lambda row: row.disk_bytes))
SMALLER = Quantity("smaller", "times smaller", "×", Comparison.smaller, more_is_better=True)
LATENCY, LATENCY_8 = _latency(1, True), _latency(8, True)
LATENCY_ALL, LATENCY_8_ALL = _latency(1, False), _latency(8, False)
FASTER = Quantity("faster", "times faster, batch 1, one thread", "×", Comparison.speedup, more_is_better=True)
FASTER_8 = Quantity(
    "faster8",
    "times faster, batch 8, one thread",
    "×",
    lambda comparison, row: comparison.speedup(row, 8),
    more_is_better=True,
)
THROUGHPUT = Quantity(
    "throughput", "throughput", "sequences/s", lambda _, row: row.sequences_per_second, more_is_better=True
)
PEAK = Quantity("peak", "peak memory", "MB", _scaled(1e-6, lambda row: row.peak_bytes))
ENERGY = Quantity("energy", "energy of a sequence", "mJ", _scaled(1e3, lambda row: row.joules))
MAKING = Quantity("making", "time to make", "s", lambda _, row: row.seconds)


def deviation(row: Row) -> float | None:
    """Of the score over the seeds, in points; None with fewer than two, or where one is not finite."""
    if not all(map(math.isfinite, row.means())) or row.deviation is None:
        return None
    return 100 * row.deviation


def score_text(comparison: Comparison, row: Row) -> str:
    """In per cent, with the deviation over the seeds in points where there are several."""
    text, spread = SCORE.text(comparison, row), deviation(row)
    return text if spread is None else f"{text} ± {spread:.2f}"


def measured(comparison: Comparison, quantity: Quantity) -> bool:
    """Whether the machine could tell for any row."""
    return any(quantity.value(comparison, row) is not None for row in comparison.rows)


def threads(comparison: Comparison) -> int:
    """What "all threads" are: the most that were measured."""
    return max((timing.threads for row in comparison.rows for timing in row.timings), default=1)


def points(
    comparison: Comparison, cost: Quantity, quality: Quantity = SCORE
) -> list[tuple[Row, float, float]]:
    """The finished rows that have both, as (row, cost, quality)."""
    found = (
        (row, cost.value(comparison, row), quality.value(comparison, row))
        for row in comparison.rows
        if row.error is None
    )
    return [(row, x, y) for row, x, y in found if x is not None and y is not None]


def front(comparison: Comparison, cost: Quantity, quality: Quantity = SCORE) -> list[Row]:
    """The rows that no other beats in both, the cheapest first."""
    known = points(comparison, cost, quality)
    sign = -1 if cost.more_is_better else 1
    return [known[i][0] for i in pareto_front([(sign * x, y) for _, x, y in known])]


def ordered(comparison: Comparison) -> list[Row]:
    """The teacher, then the fastest first, then what has no latency, then what failed."""

    def place(row: Row) -> tuple[bool, float]:
        return row.error is not None, -(FASTER.value(comparison, row) or 0)

    return [comparison.reference, *sorted(comparison.rows[1:], key=place)]
