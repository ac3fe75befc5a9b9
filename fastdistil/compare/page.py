"""`report.html`: the comparison as one file, with a sortable table and a plot, that needs no network."""

import base64
import hashlib
import html
import json
import string
from importlib import resources
from pathlib import Path
from typing import Any

from fastdistil.compare.pictures import FLOOR, LOOKS
from fastdistil.compare.quantities import (
    ENERGY,
    FASTER,
    FASTER_8,
    KINDS,
    LATENCY,
    LATENCY_8,
    LATENCY_8_ALL,
    LATENCY_ALL,
    LEVELS,
    MAKING,
    PARAMETERS,
    PEAK,
    RETAINED,
    SCORE,
    SIZE,
    SMALLER,
    THROUGHPUT,
    Quantity,
    deviation,
    measured,
    number,
    ordered,
    score_name,
    score_text,
    threads,
)
from fastdistil.compare.results import Comparison, Row
from fastdistil.compare.table import Answer, answers, gains, marks, sentence
from fastdistil.train.report import title

AXES_X = (LATENCY, LATENCY_8, LATENCY_ALL, LATENCY_8_ALL, SIZE, PARAMETERS, PEAK, THROUGHPUT, ENERGY)
AXES_Y = (SCORE, RETAINED)
P95 = {LATENCY: (1, True), LATENCY_8: (8, True), LATENCY_ALL: (1, False), LATENCY_8_ALL: (8, False)}


def write_page(folder: Path, comparison: Comparison) -> Path:
    """One self-contained file: it asks for nothing, and its own security policy would refuse it."""
    files = resources.files("fastdistil.compare")
    template, style, script = (
        files.joinpath(name).read_text(encoding="utf-8")
        for name in ("page_template.html", "page.css", "page.js")
    )
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = string.Template(template).substitute(
        policy=policy,
        style=style,
        script=script,
        data=_json(_data(comparison)),
        task=html.escape(comparison.task),
        teacher=html.escape(comparison.teacher),
        summary=html.escape(_summary(comparison)),
        answers="".join(_answer(comparison, answer) for answer in answers(comparison)),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes),
        machine="".join(
            f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
            for label, value in comparison.machine.items()
        ),
    )
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


def _digest(text: str) -> str:
    """The source expression of a Content Security Policy that lets this very text run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: dict[str, Any]) -> str:
    """For a script element, which ends at `</script` whatever the JSON says."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _summary(comparison: Comparison) -> str:
    made = [row for row in comparison.rows[1:] if row.error is None]
    failed = len(comparison.rows) - 1 - len(made)
    text = f"{len(made)} {'method' if len(made) == 1 else 'methods'} measured"
    if failed:
        text += f", {failed} failed"
    if any(deviation(row) is not None for row in made):
        text += f"; ± is the sample standard deviation over seeds {', '.join(map(str, comparison.seeds))}"
    return f"{comparison.held_out} {text}."


def _answer(comparison: Comparison, answer: Answer) -> str:
    def code(name: str) -> str:
        return f'<a href="#" data-method="{html.escape(name)}"><code>{html.escape(name)}</code></a>'

    best = answer.fastest or answer.smallest
    ask = f"To keep {answer.level:.0%} of the teacher’s score"
    if best is None:
        body = f"<p>{sentence(comparison, answer, code)}</p>"
    else:
        retains = f"retains {RETAINED.text(comparison, best)}%, a score of {score_text(comparison, best)}"
        body = (
            f'<p class="gain">{", ".join(gains(comparison, best))}</p><p>{code(best.method)}</p>'
            f'<p class="quiet">{retains}</p>'
        )
        if answer.smallest is not None and answer.smallest is not best:
            other = ", ".join(reversed(gains(comparison, answer.smallest)))
            body += f'<p class="quiet">Smallest: {code(answer.smallest.method)}, {other}</p>'
    return f"<li><h2>{ask}</h2>{body}</li>"


def _data(comparison: Comparison) -> dict[str, Any]:
    """What the script shows: every number with its text, so that it need not know how to write one."""
    fronts = marks(comparison)
    columns = [column for column in _columns(comparison) if measured(comparison, column[2])]
    axes = {
        direction: [_axis(q, comparison) for q in quantities if measured(comparison, q)]
        for direction, quantities in (("x", AXES_X), ("y", AXES_Y))
    }
    return {
        "columns": [
            {"key": q.key, "group": group, "label": label, "more": q.more_is_better, "hint": q.label}
            for group, label, q in columns
        ],
        "axes": axes,
        "levels": LEVELS,
        "floor": FLOOR / 100,
        "kinds": [
            {"name": kind, "colour": LOOKS[kind].colour, "marker": LOOKS[kind].marker}
            for kind in KINDS
            if any(row.kind == kind for row in comparison.rows)
        ],
        "rows": [_row(comparison, row, fronts.get(row.method)) for row in ordered(comparison)],
    }


def _columns(comparison: Comparison) -> list[tuple[str, str, Quantity]]:
    """Group, label, quantity."""
    all_threads = f"Latency, {threads(comparison)} threads"
    columns = [
        ("Quality, %", score_name(comparison), SCORE),
        ("Quality, %", "retained", RETAINED),
        ("Size", "MB", SIZE),
        ("Size", "× smaller", SMALLER),
        ("Size", "M parameters", PARAMETERS),
        ("Latency, one thread", "batch 1, ms", LATENCY),
        ("Latency, one thread", "× faster", FASTER),
        ("Latency, one thread", "batch 8, ms", LATENCY_8),
        ("Latency, one thread", "× faster", FASTER_8),
        (all_threads, "batch 1, ms", LATENCY_ALL),
        (all_threads, "batch 8, ms", LATENCY_8_ALL),
        ("Largest batch", "sequences/s", THROUGHPUT),
        ("Largest batch", "peak MB", PEAK),
        ("Cost", "mJ a sequence", ENERGY),
        ("Cost", "s to make", MAKING),
    ]
    # On a single thread "all threads" would say the same again.
    return [column for column in columns if threads(comparison) > 1 or column[0] != all_threads]


def _axis(quantity: Quantity, comparison: Comparison) -> dict[str, Any]:
    label = score_name(comparison) if quantity is SCORE else quantity.label
    reference = quantity.value(comparison, comparison.reference)
    return {
        "key": quantity.key,
        "label": label.replace("all threads", f"{threads(comparison)} threads"),
        "unit": quantity.unit,
        "more": quantity.more_is_better,
        "reference": reference,
    }


def _row(comparison: Comparison, row: Row, front: str | None) -> dict[str, Any]:
    quantities = [q for _, _, q in _columns(comparison)]
    shown = {q.key: q.text(comparison, row) for q in quantities} | {SCORE.key: score_text(comparison, row)}
    p95 = {
        q.key: number(timing.p95_ms)
        for q, (batch_size, one) in P95.items()
        if (timing := row.timing(batch_size, one_thread=one)) is not None
    }
    return {
        "method": row.method,
        "kind": row.kind,
        "front": front,
        "command": row.command,
        "description": row.description,
        "error": row.error,
        "folder": row.folder,
        "values": {q.key: q.value(comparison, row) for q in (*quantities, *AXES_X)},
        "texts": shown,
        "p95": p95,
        "deviations": _deviations(comparison, row),
        "timings": [
            [t.batch_size, t.length, t.threads, number(t.p50_ms), number(t.p95_ms)] for t in row.timings
        ],
        "metrics": [title(metric) for metric in row.scores[0]] if row.scores else [],
        "scores": [[f"{100 * value:.2f}" for value in one.values()] for one in row.scores],
        "seeds": comparison.seeds[: len(row.scores)] if len(row.scores) > 1 else [],
    }


def _deviations(comparison: Comparison, row: Row) -> dict[str, float]:
    """Of the quantities that have one, in their unit."""
    spread, score = deviation(row), comparison.reference.score
    if spread is None:
        return {}
    return {SCORE.key: spread} | ({RETAINED.key: spread / score} if score else {})
