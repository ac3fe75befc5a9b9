"""The end of a run: one table, one picture, a model card."""

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.table import Table

from fastdistil.data.tasks import Task, find_task
from fastdistil.evaluate import count_parameters, mean_score, measure_latency
from fastdistil.export.card import UNKNOWN, licence
from fastdistil.train.checkpoint import write_durably
from fastdistil.train.config import RunConfig
from fastdistil.train.logging import METRICS, RunLog, read_metrics
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
    # means of the objectives' terms, which the teacher does not have. On a task: its metrics, as fractions.
    scores: dict[str, float]
    retained: float | None  # mean metric over the teacher's; None: no teacher on the task
    latency_ms: float  # p50 of one sequence of the run's length through the encoder, on the CPU
    latency_p95_ms: float
    threads: int
    train_steps: int | None  # None: not trained by this run
    train_tokens: int | None
    train_seconds: float | None


@dataclass(frozen=True)
class RunResult:
    """Where the run wrote, and its table: one row for each of teacher, student, baseline or model.

    On text without a masked-language-model head: teacher, student before training, student.
    """

    output: Path
    models: list[ModelResult]


def finish(
    config: RunConfig,
    accelerator: Accelerator,
    log: RunLog,
    trained: Mapping[str, Path],
    score: Callable[[], tuple[dict[str, Any], dict[str, dict[str, float]]]],
    held_out: str,
    task: Task | None = None,
) -> RunResult:
    """Score and time the models; write table, picture and model cards (main process).

    Args:
        trained: the folders of this run's phases.
        score: the models of the table by name, and their scores.
        held_out: what they are scored on, a sentence.
    """
    results: list[ModelResult] = []
    if accelerator.is_main_process:
        results = _measure(config, trained, *score(), task)
        for result in results:
            if result.name in trained:
                card = model_card(config, result)
                write_durably(config.output / result.name / "README.md", card.encode())
        draw_curves(config.output / "curves.png", read_metrics(config.output / METRICS), results)
        write_results(config.output, config, results, held_out)
        log.print(console_table(results))
        for line in filter(None, (verdict(results), f"written to {config.output}")):
            log.say(line)
    accelerator.wait_for_everyone()
    return RunResult(config.output, results)


def _measure(
    config: RunConfig,
    trained: Mapping[str, Path],
    models: dict[str, Any],
    scores: dict[str, dict[str, float]],
    task: Task | None,
) -> list[ModelResult]:
    records = read_metrics(config.output / METRICS)
    for model in models.values():
        model.to("cpu")
    length = config.data.max_length if config.task is None else config.task.max_length
    latencies = measure_latency(models, batch_sizes=(1,), length=length)
    results = []
    for name, model in models.items():
        own = _ends(records, _phases_of(name, trained))
        retained = None
        if task is not None and "teacher" in scores:
            whole = mean_score(task, scores["teacher"])
            retained = mean_score(task, scores[name]) / whole if whole else None
        results.append(
            ModelResult(
                name=name,
                path=str(trained[name]) if name in trained else config.teacher if name == "teacher" else None,
                layers=model.config.num_hidden_layers,
                hidden_size=model.config.hidden_size,
                parameters=count_parameters(model),
                scores=scores[name],
                retained=retained,
                latency_ms=latencies[name][0].p50_ms,
                latency_p95_ms=latencies[name][0].p95_ms,
                threads=latencies[name][0].threads,
                train_steps=sum(r["step"] for r in own) if own else None,
                train_tokens=sum(r["tokens"] for r in own) if own else None,
                train_seconds=sum(r["seconds"] for r in own) if own else None,
            )
        )
    return results


def _phases_of(name: str, trained: Mapping[str, Path]) -> list[str]:
    """The phases that led to a model: all stages of a student, the head before the model that has it."""
    if name not in trained:
        return []
    apart = ("teacher", "baseline")
    return [name] if name in apart else [phase for phase in trained if phase not in apart]


def _ends(records: Sequence[dict[str, Any]], phases: Sequence[str]) -> list[dict[str, Any]]:
    """The last training record of each phase."""
    ends = {r["phase"]: r for r in records if "tokens" in r}
    return [ends[phase] for phase in phases if phase in ends]


def shown(scores: dict[str, float]) -> list[str]:
    """The measures that tables and pictures show."""
    return [measure for measure in scores if measure != "perplexity"]


def title(measure: str) -> str:
    return {"loss": "held-out loss", "f1": "F1"}.get(measure, measure.replace("_", " "))


# Shares, which are shown in per cent; GLUE shows its correlations so as well.
_SHARES = ("accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "next_sentence_accuracy")


def formatted(measure: str, value: float) -> str:
    return f"{value:.2%}" if measure in _SHARES else f"{value:.4f}"


def _columns(results: Sequence[ModelResult]) -> list[str]:
    measures = [title(measure) for measure in shown(results[-1].scores)]
    retained = ["retained"] if results[-1].retained is not None else []
    return [
        "model",
        "layers × width",
        "parameters",
        *measures,
        *retained,
        "CPU latency",
        "tokens seen",
        "time",
    ]


def _cells(r: ModelResult, measures: list[str]) -> list[str]:
    return [
        r.name,
        f"{r.layers} × {r.hidden_size}",
        f"{r.parameters / 1e6:.2f} M",
        *(formatted(measure, r.scores[measure]) if measure in r.scores else "–" for measure in measures),
        *([] if r.retained is None else [f"{r.retained:.1%}"]),
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
        # Headings and names fold at their spaces, numbers do not: so the table fits 80 columns uncut.
        heading = textwrap.fill(column, 10, break_long_words=False, break_on_hyphens=False)
        if column == "model":
            table.add_column(heading)
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for row in _rows(results):
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others, numbers, to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def verdict(results: Sequence[ModelResult]) -> str | None:
    """What distillation gained, in one line, where there is something to compare the student with."""
    scores = {r.name: r.scores for r in results}
    if "student" not in scores:
        return None
    student = scores["student"]
    if BEFORE in scores:
        gains = [f"{title(term)} {scores[BEFORE][term]:.4f} → {value:.4f}" for term, value in student.items()]
        return f"On held-out text, before training → after: {', '.join(gains)}."
    if "baseline" not in scores:
        return None
    with_teacher, without = (
        " and ".join(f"{title(m)} {formatted(m, scores[name][m])}" for m in shown(student))
        for name in ("student", "baseline")
    )
    return (
        f"With the teacher the student reaches {with_teacher}; without it, from the same weights, {without}."
    )


def write_results(output: Path, config: RunConfig, results: Sequence[ModelResult], held_out: str) -> None:
    """`results.json` and `results.md`."""
    plain = {"recipe": config.recipe, "held_out": held_out, "models": [asdict(r) for r in results]}
    (output / "results.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    length = config.data.max_length if config.task is None else config.task.max_length
    parts = [
        f"# {config.recipe}" + ("" if config.task is None else f" on {find_task(config.task.name).name}"),
        config.description.strip(),
        markdown_table(_columns(results), _rows(results)).strip(),
        verdict(results),
        f"{held_out} {_explanation(config)} Latency is the median of one sequence of {length} tokens through "
        f"the encoder, on {results[0].threads} CPU threads.",
        "![What is measured on held-out data, over the optimiser steps](curves.png)",
    ]
    (output / "results.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _explanation(config: RunConfig) -> str:
    if config.task is not None:
        retained = " Retained: the mean metric over the teacher's." if config.uses_teacher else ""
        return f"The scores are those of the last step; none was selected by them.{retained}"
    if config.uses_vocabulary:
        return "Loss in nats."
    last = config.student_stages[-1]
    return f"The terms are measured without their weights: {describe(last.objectives)}."


_LINES = {  # phase -> label, colour (Okabe and Ito, safe for colour-blind readers)
    "model": ("model", "#0072b2"),
    "student": ("student, with the teacher", "#0072b2"),
    "baseline": ("same student, without", "#d55e00"),
}
# title, factor
_AXES = {
    "loss": ("held-out loss (nats)", 1),
    **{measure: (f"held-out {title(measure)} (%)", 100) for measure in _SHARES},
}


def draw_curves(file: Path, records: Sequence[dict[str, Any]], results: Sequence[ModelResult]) -> None:
    """What is measured on held-out text over the steps; the teacher's final values as a dashed line."""
    from matplotlib.figure import Figure

    teacher = next((r.scores for r in results if r.name == "teacher"), {})
    measures = shown(results[-1].scores)
    figure = Figure(figsize=(5 * len(measures), 4), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        label_y, scale = _AXES.get(measure, (f"held-out {title(measure)}", 1))
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
        axes.set_ylabel(label_y)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


_TASK_CARDS = {
    "classification": ("AutoModelForSequenceClassification", "text-classification"),
    "regression": ("AutoModelForSequenceClassification", "text-classification"),
    "span": ("AutoModelForQuestionAnswering", "question-answering"),
    "choice": ("AutoModelForMultipleChoice", "multiple-choice"),
}


def _is_bilstm(config: RunConfig, result: ModelResult) -> bool:
    return config.student.architecture == "bilstm" and result.name in ("student", "baseline")


def model_card(config: RunConfig, result: ModelResult) -> str:
    """README.md of a model folder."""
    tokens = (result.train_tokens or 0) / 1e6
    scores = ", ".join(f"{title(m)} {formatted(m, result.scores[m])}" for m in shown(result.scores))
    text = f"Text: {config.data.corpus}"
    if config.task is not None:
        found = find_task(config.task.name)
        kind, (auto, task) = f"A model for {found.name}", _TASK_CARDS[found.kind]
        measured, text = "examples", f"Task: {found.name}"
    elif config.uses_vocabulary:
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
        f"{text}, {tokens:.2f} M tokens seen; seed {config.seed}.",
    ]
    if result.scores:
        lines.append(f"Held-out {measured}: {scores}.")
    if config.paper:
        lines.append(f"Recipe after {config.paper}.")
    # The class of a BiLSTM is ours.
    first = "import fastdistil.models.bilstm\n" if _is_bilstm(config, result) else ""
    lines.append(
        f"```python\n{first}"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```'
    )
    # What is learnt from a model, or starts from it, is under its licence.
    source = config.teacher or config.student.from_model
    known = UNKNOWN if source is None else licence(source)
    matter = f"library_name: transformers\npipeline_tag: {task}\nlicense: {known}"
    return f"---\n{matter}\n---\n\n" + "\n\n".join(lines) + "\n"
