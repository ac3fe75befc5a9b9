"""The end of a run: one table, one picture, a model card."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastdistil.train.config import RunConfig
from fastdistil.train.objective_config import describe

BEFORE = "before training"  # the row of a student at its first weights


@dataclass(frozen=True)
class ModelResult:
    """One row of the table."""

    name: str  # teacher, student, baseline, model or before training
    path: str | None  # None: not saved
    layers: int
    hidden_size: int
    parameters: int
    # On held-out text. Of masked tokens: loss (mean cross entropy, nats), accuracy and perplexity; or the
    # means of the objectives' terms, which the teacher does not have.
    scores: dict[str, float]
    latency_ms: float  # p50 of one sequence of the run's length through the encoder, on the CPU
    latency_p95_ms: float
    threads: int
    train_steps: int | None  # None: not trained by this run
    train_tokens: int | None
    train_seconds: float | None


def shown(scores: dict[str, float]) -> list[str]:
    """The measures that tables and pictures show."""
    return [measure for measure in scores if measure != "perplexity"]


def _columns(results: Sequence[ModelResult]) -> list[str]:
    measures = [_title(measure) for measure in shown(results[-1].scores)]
    return ["model", "layers × width", "parameters", *measures, "CPU latency", "tokens seen", "time"]


def _title(measure: str) -> str:
    return {"loss": "held-out loss"}.get(measure, measure.replace("_", " "))


def _value(measure: str, value: float) -> str:
    return f"{value:.2%}" if measure == "accuracy" else f"{value:.4f}"


def _cells(r: ModelResult, measures: list[str]) -> list[str]:
    return [
        r.name,
        f"{r.layers} × {r.hidden_size}",
        f"{r.parameters / 1e6:.2f} M",
        *(_value(measure, r.scores[measure]) if measure in r.scores else "–" for measure in measures),
        f"{r.latency_ms:.1f} ms",
        "–" if r.train_tokens is None else f"{r.train_tokens / 1e6:,.2f} M",
        "–" if r.train_seconds is None else f"{r.train_seconds:,.0f} s",
    ]


def _rows(results: Sequence[ModelResult]) -> list[list[str]]:
    measures = shown(results[-1].scores)
    return [_cells(r, measures) for r in results]


def console_table(results: Sequence[ModelResult]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in _columns(results):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in _rows(results):
        table.add_row(*row)
    return table


def markdown_table(results: Sequence[ModelResult]) -> str:
    columns = _columns(results)
    rows = [columns, ["---"] + ["---:"] * (len(columns) - 1), *_rows(results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def verdict(results: Sequence[ModelResult]) -> str | None:
    """What distillation gained, in one line, where there is something to compare the student with."""
    scores = {r.name: r.scores for r in results}
    if "student" not in scores:
        return None
    student = scores["student"]
    if BEFORE in scores:
        gains = [
            f"{_title(term)} {scores[BEFORE][term]:.4f} → {value:.4f}" for term, value in student.items()
        ]
        return f"On held-out text, before training → after: {', '.join(gains)}."
    if "baseline" not in scores:
        return None
    baseline = scores["baseline"]
    return (
        f"With the teacher the student reaches a held-out loss of {student['loss']:.4f} and an accuracy of "
        f"{student['accuracy']:.2%}; without it, on the same data and steps, {baseline['loss']:.4f} and "
        f"{baseline['accuracy']:.2%}."
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
        f"Held out: {held_out}. {_explanation(config)} Latency is the median of one sequence of "
        f"{config.data.max_length} tokens through the encoder, on {results[0].threads} CPU threads.",
        "![What is measured on held-out text, over the optimiser steps](curves.png)",
    ]
    (output / "results.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _explanation(config: RunConfig) -> str:
    if config.uses_vocabulary:
        return "Loss in nats."
    return f"The terms are measured without their weights: {describe(config.objectives)}."


_LINES = {  # phase -> label, colour (Okabe and Ito, safe for colour-blind readers)
    "model": ("model", "#0072b2"),
    "student": ("student, with the teacher", "#0072b2"),
    "baseline": ("same student, without", "#d55e00"),
}
_AXES = {"loss": ("held-out loss (nats)", 1), "accuracy": ("held-out accuracy (%)", 100)}  # title, factor


def draw_curves(file: Path, records: Sequence[dict[str, Any]], results: Sequence[ModelResult]) -> None:
    """What is measured on held-out text over the steps; the teacher's final values as a dashed line."""
    from matplotlib.figure import Figure

    teacher = next((r.scores for r in results if r.name == "teacher"), {})
    measures = shown(results[-1].scores)
    figure = Figure(figsize=(5 * len(measures), 4), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        title, scale = _AXES.get(measure, (f"held-out {_title(measure)}", 1))
        for phase, (label, colour) in _LINES.items():
            own = [r for r in records if r["phase"] == phase and r.get(f"held_out_{measure}") is not None]
            if own:
                values = [scale * r[f"held_out_{measure}"] for r in own]
                axes.plot([r["step"] for r in own], values, "o-", color=colour, markersize=3, label=label)
        if measure in teacher:
            final = scale * teacher[measure]
            axes.axhline(final, color="#444444", linestyle="--", linewidth=1, label="teacher")
        if measure not in _AXES:  # a distance: the teacher is at zero
            axes.set_ylim(bottom=0)
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def model_card(config: RunConfig, result: ModelResult) -> str:
    """README.md of a model folder."""
    tokens = (result.train_tokens or 0) / 1e6
    scores = ", ".join(f"{_title(m)} {_value(m, result.scores[m])}" for m in shown(result.scores))
    if config.uses_vocabulary:
        kind, auto, task = "A masked language model", "AutoModelForMaskedLM", "fill-mask"
        measured = "masked tokens"
    else:
        kind, auto, task = "An encoder", "AutoModel", "feature-extraction"
        measured = "text, compared with the teacher"
    lines = [
        f"# {config.output.name}: {result.name}",
        f"{kind} of {result.layers} layers × {result.hidden_size}, "
        f"{result.parameters / 1e6:.1f} M parameters, trained by `fastdistil train {config.recipe}`.",
    ]
    if result.name == "student":
        lines.append(f"Teacher: {config.teacher or 'trained by the same run'}.")
    if config.student.from_model is not None:
        lines.append(f"It started from {config.student.from_model}.")
    lines += [
        f"Text: {config.data.corpus}, {tokens:.2f} M tokens seen; seed {config.seed}.",
    ]
    if result.scores:
        lines.append(f"Held-out {measured}: {scores}.")
    if config.paper:
        lines.append(f"Recipe after {config.paper}.")
    lines.append(
        f"```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```'
    )
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\n---\n\n" + "\n\n".join(lines) + "\n"
