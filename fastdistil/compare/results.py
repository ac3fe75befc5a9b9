"""The rows of a comparison, and the file that keeps them."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastdistil.compare.files import write_json
from fastdistil.errors import UserError

Kind = Literal[
    "teacher",
    "distillation",
    "pruning",
    "quantisation",
    "low rank",
    "sharing",
    "clustering",
    "runtime",
    "chain",
]


@dataclass(frozen=True)
class Timing:
    """Wall time of one forward pass of the whole model, head included."""

    batch_size: int
    length: int  # tokens of each sequence, without padding
    threads: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Row:
    """One method on one teacher and one task. What was not measured, or failed before it was, is None."""

    method: str  # "teacher", or a chain such as "pkd+prune-ffn:0.5+int8"
    kind: Kind
    command: str  # that makes the model again
    folder: str | None = None  # of the first seed's model, relative to the comparison's folder
    error: str | None = None  # why there is no result; None: it is finished
    description: str = ""  # what the method does, one line
    parameters: int | None = None
    disk_bytes: int | None = None  # of the files that hold weights
    scores: list[dict[str, float]] = field(default_factory=list)  # one a seed: metric -> fraction
    timings: list[Timing] = field(default_factory=list)
    sequences_per_second: float | None = None  # at the largest batch, all threads
    peak_bytes: int | None = None  # that the model adds to a fresh process, at the largest batch
    joules: float | None = None  # of one sequence at batch 1; None where the machine cannot tell
    seconds: float | None = None  # it took to make, one seed, what other rows share included

    def means(self) -> list[float]:
        """The mean metric of each seed, which is how GLUE makes one number of two."""
        return [statistics.mean(scores.values()) for scores in self.scores]

    @property
    def score(self) -> float | None:
        return statistics.mean(self.means()) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two, or one that is no number."""
        means = self.means()
        return statistics.stdev(means) if len(means) > 1 and all(map(math.isfinite, means)) else None

    def timing(self, batch_size: int = 1, *, one_thread: bool = True) -> Timing | None:
        """On one thread, or on the most that were measured."""
        found = [t for t in self.timings if t.batch_size == batch_size]
        return (min if one_thread else max)(found, key=lambda t: t.threads, default=None)


@dataclass(frozen=True)
class Comparison:
    """All that `results.json` holds. The first row is the teacher's."""

    task: str
    teacher: str
    metrics: list[str]  # of the task
    held_out: str  # what the scores were taken on, a sentence
    machine: dict[str, str]  # processor, cores, versions, date: a label -> its value
    seeds: list[int]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)  # shown below the table, such as "int8 is slower here"

    @property
    def reference(self) -> Row:
        return self.rows[0]

    def retained(self, row: Row) -> float | None:
        """Score over the teacher's; None where that is 0."""
        if row.score is None or not self.reference.score:
            return None
        return row.score / self.reference.score

    def speedup(self, row: Row, batch_size: int = 1) -> float | None:
        """The teacher's p50 over the row's, on one thread."""
        ours, theirs = row.timing(batch_size), self.reference.timing(batch_size)
        return None if ours is None or theirs is None else theirs.p50_ms / ours.p50_ms

    def smaller(self, row: Row) -> float | None:
        """The teacher's bytes over the row's."""
        if row.disk_bytes is None or self.reference.disk_bytes is None:
            return None
        return self.reference.disk_bytes / row.disk_bytes


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that none beats: no other has a lower first and a higher second value.

    In the order of the first value. Of equal points, the first is taken.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def write_comparison(folder: Path, comparison: Comparison) -> None:
    write_json(folder / "results.json", asdict(comparison))


def read_comparison(folder: Path) -> Comparison:
    file = folder / "results.json"
    try:
        plain: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            Row(**{**row, "timings": [Timing(**timing) for timing in row["timings"]]})
            for row in plain["rows"]
        ]
        return Comparison(**{**plain, "rows": rows})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not hold the results of a comparison: {error}") from None
