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
    held_out_tokens: int  # how many were masked
    latency_ms: float  # p50 of one sequence of the run's length through the encoder, on the CPU
    latency_p95_ms: float
    threads: int
    train_steps: int | None  # None: not trained by this run
    train_tokens: int | None
    train_seconds: float | None


_COLUMNS = [
    "model",
    "layers × width",
    "parameters",
    "held-out loss",
    "accuracy",
    "CPU latency",
    "tokens seen",
    "time",
]


def _cells(r: ModelResult) -> list[str]:
    return [
        r.name,
        f"{r.layers} × {r.hidden_size}",
        f"{r.parameters / 1e6:.2f} M",
        f"{r.loss:.4f}",
        f"{r.accuracy:.2%}",
        f"{r.latency_ms:.1f} ms",
        "–" if r.train_tokens is None else f"{r.train_tokens / 1e6:,.2f} M",
        "–" if r.train_seconds is None else f"{r.train_seconds:,.0f} s",
    ]


def console_table(results: Sequence[ModelResult]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for r in results:
        table.add_row(*_cells(r))
    return table


def markdown_table(results: Sequence[ModelResult]) -> str:
    rows = [_COLUMNS, ["---"] + ["---:"] * (len(_COLUMNS) - 1), *(_cells(r) for r in results)]
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


def write_results(output: Path, config: RunConfig, results: Sequence[ModelResult], held_out: str) -> None:
    """`results.json` and `results.md`."""
    plain = {"recipe": config.recipe, "held_out": held_out, "models": [asdict(r) for r in results]}
    (output / "results.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    parts = [
        f"# {config.recipe}",
        config.description.strip(),
        markdown_table(results).strip(),
        verdict(results),
        f"Held out: {held_out}. Loss in nats; latency is the median of one sequence of "
        f"{config.data.max_length} tokens through the encoder, on {results[0].threads} CPU threads.",
        "![Held-out loss and accuracy over the optimiser steps](curves.png)",
    ]
    (output / "results.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


_LINES = {  # phase -> label, colour (Okabe and Ito, safe for colour-blind readers)
    "model": ("model", "#0072b2"),
    "student": ("student, with the teacher", "#0072b2"),
    "baseline": ("same student, without", "#d55e00"),
}


def draw_curves(file: Path, records: Sequence[dict[str, Any]], results: Sequence[ModelResult]) -> None:
    """Held-out loss and accuracy over the steps; the teacher's final ones as a dashed line."""
    from matplotlib.figure import Figure

    teacher = next((r for r in results if r.name == "teacher"), None)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (("loss", "held-out loss (nats)", 1), ("accuracy", "held-out accuracy (%)", 100))
    for axes, (measure, title, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        for phase, (label, colour) in _LINES.items():
            own = [r for r in records if r["phase"] == phase and r.get(f"held_out_{measure}") is not None]
            if own:
                values = [scale * r[f"held_out_{measure}"] for r in own]
                axes.plot([r["step"] for r in own], values, "o-", color=colour, markersize=3, label=label)
        if teacher is not None:
            final = scale * (teacher.loss if measure == "loss" else teacher.accuracy)
            axes.axhline(final, color="#444444", linestyle="--", linewidth=1, label="teacher")
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def model_card(config: RunConfig, result: ModelResult) -> str:
    """README.md of a model folder."""
    tokens = (result.train_tokens or 0) / 1e6
    lines = [
        f"# {config.output.name}: {result.name}",
        f"A masked language model of {result.layers} layers × {result.hidden_size}, "
        f"{result.parameters / 1e6:.1f} M parameters, trained by `fastdistil train {config.recipe}`.",
    ]
    if result.name == "student":
        lines.append(f"Teacher: {config.teacher or 'trained by the same run'}.")
    if config.student.from_model is not None:
        lines.append(f"It started from {config.student.from_model}.")
    lines += [
        f"Text: {config.data.corpus}, {tokens:.2f} M tokens seen; seed {config.seed}.",
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
