"""The end of a run: one table, one picture, a model card."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastdistil.train.config import RunConfig


@dataclass(frozen=True)
class ModelResult:
    """One row of the table."""

    name: str  # teacher, student, baseline or model
    path: str
    layers: int
    hidden_size: int
    parameters: int
    loss: float  # mean cross entropy of the held-out masked tokens, nats
    accuracy: float
    perplexity: float
    latency_ms: float  # p50 of one sequence of the run's length, CPU
    train_tokens: int | None  # None: not trained by this run
    train_seconds: float | None


_COLUMNS = [
    "model",
    "layers × width",
    "parameters",
    "held-out loss",
    "accuracy",
    "perplexity",
    "CPU latency",
    "trained on",
]


def _cells(r: ModelResult) -> list[str]:
    trained = (
        "–" if r.train_tokens is None else f"{r.train_tokens / 1e6:.2f} M tokens, {r.train_seconds:.0f} s"
    )
    return [
        r.name,
        f"{r.layers} × {r.hidden_size}",
        f"{r.parameters / 1e6:.2f} M",
        f"{r.loss:.4f}",
        f"{r.accuracy:.2%}",
        f"{r.perplexity:.2f}",
        f"{r.latency_ms:.1f} ms",
        trained,
    ]


def console_table(results: Sequence[ModelResult]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if i in (0, len(_COLUMNS) - 1) else "right")
    for r in results:
        table.add_row(*_cells(r))
    return table


def markdown_table(results: Sequence[ModelResult]) -> str:
    rows = [_COLUMNS, ["---"] + ["---:"] * (len(_COLUMNS) - 2) + ["---"], *(_cells(r) for r in results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def verdict(results: Sequence[ModelResult]) -> str | None:
    """What distillation gained, in one line, where there is a baseline to compare with."""
    by_name = {r.name: r for r in results}
    if "student" not in by_name or "baseline" not in by_name:
        return None
    student, baseline = by_name["student"], by_name["baseline"]
    return (
        f"With the teacher the student reaches a held-out loss of {student.loss:.4f} and an accuracy of "
        f"{student.accuracy:.2%}; without it, on the same data and steps, {baseline.loss:.4f} and "
        f"{baseline.accuracy:.2%}."
    )


def write_results(
    output: Path, config: RunConfig, results: Sequence[ModelResult], details: dict[str, Any]
) -> None:
    """`results.json` and `results.md`."""
    plain = {"recipe": config.recipe, "models": {r.name: asdict(r) for r in results}, **details}
    (output / "results.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    parts = [
        f"# {config.recipe}",
        markdown_table(results),
        verdict(results) or "",
        f"Held out: {details['held_out']}",
    ]
    text = "\n\n".join(part.strip() for part in parts if part)
    (output / "results.md").write_text(f"{text}\n\n![curves](curves.png)\n", encoding="utf-8")


def draw_curves(file: Path, records: Sequence[dict[str, Any]], teacher: ModelResult | None) -> None:
    """Held-out loss and accuracy over the steps of each phase; the teacher as a dashed line."""
    from matplotlib.figure import Figure

    phases = [
        p
        for p in ("model", "head", "student", "baseline", "teacher")
        if any(r["phase"] == p for r in records)
    ]
    drawn = [p for p in phases if p in ("student", "baseline", "model")] or phases
    colours = {
        "student": "#0072b2",
        "baseline": "#d55e00",
        "model": "#0072b2",
        "teacher": "#444444",
        "head": "#888888",
    }
    labels = {"student": "student, with the teacher", "baseline": "same student, without", "model": "model"}
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (
        ("held_out_loss", "held-out loss (nats)", 1),
        ("held_out_accuracy", "held-out accuracy (%)", 100),
    )
    for axes, (key, label, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        for phase in drawn:
            points = [
                (r["step"], scale * r[key]) for r in records if r["phase"] == phase and r.get(key) is not None
            ]
            axes.plot(
                *zip(*points, strict=True),
                color=colours[phase],
                marker="o",
                markersize=3,
                label=labels.get(phase, phase),
            )
        if teacher is not None:
            value = scale * (teacher.loss if key == "held_out_loss" else teacher.accuracy)
            axes.axhline(value, color=colours["teacher"], linestyle="--", linewidth=1, label="teacher")
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def model_card(config: RunConfig, result: ModelResult, teacher: str | None) -> str:
    """README.md of a model folder."""
    lines = [
        f"# {config.recipe}: {result.name}",
        f"A masked language model of {result.layers} layers × {result.hidden_size}, "
        f"{result.parameters / 1e6:.1f} M parameters, trained by `fastdistil train {config.recipe}`.",
    ]
    if teacher is not None:
        lines.append(f"Teacher: {teacher}.")
    lines += [
        f"Text: {config.data.corpus}, {(result.train_tokens or 0) / 1e6:.2f} M tokens seen; seed {config.seed}.",
        f"Held-out masked tokens: loss {result.loss:.4f}, accuracy {result.accuracy:.2%}.",
    ]
    if config.paper:
        lines.append(f"Recipe after {config.paper}.")
    lines.append(
        "```python\nfrom transformers import AutoModelForMaskedLM, AutoTokenizer\n\n"
        'model = AutoModelForMaskedLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```'
    )
    return "---\nlibrary_name: transformers\npipeline_tag: fill-mask\n---\n\n" + "\n\n".join(lines) + "\n"
