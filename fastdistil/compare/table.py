"""The table of a comparison, as Markdown and on the console, and its answers in words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdistil.compare.pictures import PICTURES
from fastdistil.compare.quantities import (
    ENERGY,
    FASTER,
    FASTER_8,
    LATENCY,
    LATENCY_8,
    LATENCY_8_ALL,
    LATENCY_ALL,
    LEVELS,
    MAKING,
    MISSING,
    PARAMETERS,
    PEAK,
    RETAINED,
    SIZE,
    SMALLER,
    THROUGHPUT,
    Quantity,
    deviation,
    front,
    measured,
    ordered,
    score_name,
    score_text,
    threads,
)
from fastdistil.compare.results import Comparison, Row
from fastdistil.train.report import markdown_table
from fastdistil.wording import gain

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Answer:
    """The best rows of those that keep `level` of the teacher's score; None where none does."""

    level: float
    fastest: Row | None  # batch 1, one thread
    smallest: Row | None
    nearest: Row | None  # that keeps most, where none keeps enough


def answers(comparison: Comparison, levels: Sequence[float] = LEVELS) -> list[Answer]:
    """One for each level. The teacher itself is no answer."""
    rows = [row for row in comparison.rows[1:] if row.error is None]
    kept = [(row, value) for row in rows if (value := RETAINED.value(comparison, row)) is not None]
    found = []
    for level in levels:
        enough = [row for row, value in kept if value >= 100 * level]
        found.append(
            Answer(
                level,
                _most(comparison, enough, FASTER),
                _most(comparison, enough, SMALLER),
                None if enough else max(kept, key=lambda pair: pair[1], default=(None, 0))[0],
            )
        )
    return found


def _most(comparison: Comparison, rows: Sequence[Row], quantity: Quantity) -> Row | None:
    known = [(value, row) for row in rows if (value := quantity.value(comparison, row)) is not None]
    return max(known, key=lambda pair: pair[0], default=(0, None))[1]


def gains(comparison: Comparison, row: Row) -> list[str]:
    """Such as ["8.4× faster", "1.2× larger"]."""
    found = []
    for quantity, better, worse in ((FASTER, "faster", "slower"), (SMALLER, "smaller", "larger")):
        ratio = quantity.value(comparison, row)
        if ratio is not None:
            found.append(gain(ratio, better, worse))
    return found


def sentence(comparison: Comparison, answer: Answer, name: Callable[[str], str] = str) -> str:
    """An answer in words; `name` sets the names of methods, such as in code type."""
    share = f"{answer.level:.0%}"
    if answer.nearest is not None:
        return (
            f"No method keeps {share} of the teacher's score; {name(answer.nearest.method)} is the nearest, "
            f"with {RETAINED.text(comparison, answer.nearest)}%."
        )
    best = answer.fastest or answer.smallest
    if best is None:
        return f"Nothing was measured that could keep {share} of the teacher's score."
    most = [
        which for which, row in (("fastest", answer.fastest), ("smallest", answer.smallest)) if row is best
    ]
    text = (
        f"Keeping at least {share} of the teacher's score, {name(best.method)} is the {' and '.join(most)}: "
        f"{', '.join(gains(comparison, best))}."
    )
    if answer.smallest is not None and answer.smallest is not best:
        others = ", ".join(gains(comparison, answer.smallest)[::-1])
        text += f" The smallest is {name(answer.smallest.method)}: {others}."
    return text


def marks(comparison: Comparison) -> dict[str, str]:
    """Method -> "speed", "size" or both: where no other method is as good in score and better in that."""
    found: dict[str, list[str]] = {}
    for mark, cost in (("speed", LATENCY), ("size", SIZE)):
        for row in front(comparison, cost):
            found.setdefault(row.method, []).append(mark)
    return {method: ", ".join(kinds) for method, kinds in found.items()}


def code(text: str) -> str:
    """In code type, on one line; in a table even code must not hold a bare bar."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`"


def plain(text: str) -> str:
    """On one line, with the signs escaped that would end a table's cell or begin a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def markdown(comparison: Comparison) -> str:
    """The page that stands beside `results.json`: answers, two tables, pictures, commands."""
    rows = ordered(comparison)
    failed = [row for row in rows if row.error is not None]
    parts = [
        f"# {comparison.task}: what each method makes of {plain(comparison.teacher)}",
        "\n".join(f"- {sentence(comparison, answer, code)}" for answer in answers(comparison)),
        markdown_table(*_quality(comparison, rows)).strip(),
        f"{plain(comparison.held_out)} {_seeds(comparison)}MB are millions of bytes, of the files that hold "
        "weights. Latency and speed-up are those of batch 1 on one thread, fastest first. Pareto: no other "
        "method is as good in score and better in speed, or in size.",
        "\n".join(f"- {code(row.method)} failed: {plain(row.error or '')}" for row in failed),
        "\n".join(f"- {plain(note)}" for note in comparison.notes),
        *(f"![{title}]({name}.png)" for name, title in PICTURES.items()),
        "## Costs",
        markdown_table(*_costs(comparison, [row for row in rows if row.error is None])).strip(),
        f"Latency is p50 / p95 of a forward pass of the whole model in milliseconds, {_length(comparison)}at "
        f"batch 1 and 8, on one thread and on all ({threads(comparison)}). Throughput and peak memory are "
        "those of the largest batch; peak memory is what the model adds to a fresh process. Time to make is "
        "that of one seed, with what it shares with other rows.",
        "## Commands",
        "\n".join(_command(i, row) for i, row in enumerate(rows, 1)),
        "## Machine" if comparison.machine else "",
        "\n".join(f"- {plain(label)}: {plain(value)}" for label, value in comparison.machine.items()),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _command(i: int, row: Row) -> str:
    """An item of the list, which the table's row links to."""
    what = f": {plain(row.description)}" if row.description else ""
    return f'{i}. <a id="command-{i}"></a>{code(row.method)}{what}\n\n   ```sh\n   {row.command}\n   ```\n'


def _seeds(comparison: Comparison) -> str:
    if all(deviation(row) is None for row in comparison.rows):
        return ""
    return f"± is the sample standard deviation over seeds ({', '.join(map(str, comparison.seeds))}). "


def _length(comparison: Comparison) -> str:
    lengths = sorted({timing.length for row in comparison.rows for timing in row.timings})
    return f"of sequences of {' and '.join(map(str, lengths))} tokens, " if lengths else ""


def _quality(comparison: Comparison, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    fronts = marks(comparison)
    shown: list[Quantity] = [RETAINED, SIZE, SMALLER, LATENCY, FASTER]
    columns = ["method", "class", f"{score_name(comparison)}, %", "retained, %", "MB", "smaller, ×"]
    columns += ["latency, ms", "speed-up, ×", "Pareto", "command"]
    cells = [
        [
            code(row.method),
            row.kind,
            "failed" if row.error is not None else score_text(comparison, row),
            *(quantity.text(comparison, row) for quantity in shown),
            fronts.get(row.method, ""),
            f"[{i}](#command-{i})",
        ]
        for i, row in enumerate(rows, 1)
    ]
    return columns, cells


def _costs(comparison: Comparison, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    latencies = {
        "batch 1, one thread": (1, True, LATENCY),
        "batch 8, one thread": (8, True, LATENCY_8),
        "batch 1, all": (1, False, LATENCY_ALL),
        "batch 8, all": (8, False, LATENCY_8_ALL),
    }
    others = {
        "batch 8 speed-up, ×": FASTER_8,
        "sequences/s": THROUGHPUT,
        "peak, MB": PEAK,
        "energy, mJ": ENERGY,
        "time to make, s": MAKING,
    }
    # Energy is not told by every machine.
    others = {label: q for label, q in others.items() if q is not ENERGY or measured(comparison, q)}
    columns = ["method", "parameters, M", *latencies, *others]
    cells = [
        [
            code(row.method),
            PARAMETERS.text(comparison, row),
            *(_p50_p95(row, batch_size, one, quantity) for batch_size, one, quantity in latencies.values()),
            *(quantity.text(comparison, row) for quantity in others.values()),
        ]
        for row in rows
    ]
    return columns, cells


def _p50_p95(row: Row, batch_size: int, one_thread: bool, quantity: Quantity) -> str:
    timing = row.timing(batch_size, one_thread=one_thread)
    return MISSING if timing is None else f"{quantity.form(timing.p50_ms)} / {quantity.form(timing.p95_ms)}"


def console_table(comparison: Comparison) -> "Table":
    """What fits a terminal; the front of speed and size is set in bold."""
    from rich.markup import escape
    from rich.table import Table

    fronts = marks(comparison)
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for column in ("score, %", "retained, %", "MB", "smaller, ×", "ms", "faster, ×"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("Pareto", no_wrap=True)
    for row in ordered(comparison):
        name = escape(row.method)
        if row.error is not None:
            table.add_row(name, "failed", style="dim")
            continue
        numbers = (q.text(comparison, row) for q in (RETAINED, SIZE, SMALLER, LATENCY, FASTER))
        style = "bold" if row.method in fronts else None
        table.add_row(name, score_text(comparison, row), *numbers, fronts.get(row.method, ""), style=style)
    return table
