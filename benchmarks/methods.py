"""One table of several methods on several tasks.

Usage: python benchmarks/methods.py FOLDER [--measure]

FOLDER/<method>/<task>/ is what `fastdistil train` leaves in --output, with seeds or without; "method" may be
a recipe with its variant, as pkd-3-layers. Prints two Markdown tables: the scores (mean ± sample standard
deviation where there are seeds), and the share of the teacher's score that each student keeps, beside the one
that the method's paper reports. A model that was fine-tuned alone, as one of `minilm` is, is compared with
FOLDER/teacher/<task>.

With --measure, on a quiet machine: the latencies of the rows' models, all taking turns, go into
FOLDER/latency.json, where the table finds them. Needs the model folders. Rows that have a latency there keep
it; new ones are then scaled by the teacher's times, so that ratios to it are those that were measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Per cent of the teacher's score that the papers report for their students of the same depth, on the same
# tasks where a paper has them: published score of the student / of its BERT-base teacher. PKD's means are
# those of Rogers et al. 2020, A Primer in BERTology, table 1.
PUBLISHED = {
    "pkd": {"sst2": 91.1 / 92.7, "mrpc": 83.5 / 88.6, "rte": 68.2 / 69.3, "mean": 0.98},
    "pkd-3-layers": {"mean": 0.92},
    "tinybert-task": {"mean": 0.96},
    "bilstm": {"sst2": 90.7 / 94.9},
    "bilstm-large": {"sst2": 90.7 / 94.9},
    "minilm": {},
    "kd": {},
}
NAMES = {"sst2": "SST-2", "mrpc": "MRPC", "rte": "RTE", "stsb": "STS-B", "cola": "CoLA"}


@dataclass(frozen=True)
class Cell:
    """One method on one task: the mean metric of each seed, in per cent."""

    scores: list[float]
    retained: list[float]  # of the teacher's; empty for the teacher
    parameters: int
    folder: Path  # of the model of the first seed

    def __str__(self) -> str:
        return spread(self.scores)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def runs_of(folder: Path) -> list[list[dict[str, Any]]]:
    """The models of each seed's table."""
    seeds = sorted(folder.glob("seed-*/results.json")) or [folder / "results.json"]
    return [json.loads(file.read_text())["models"] for file in seeds if file.exists()]


def cells_of(folder: Path) -> dict[str, Cell]:
    """Model -> its cell."""
    found: dict[str, list[dict[str, Any]]] = {}
    for models in runs_of(folder):
        for model in models:
            found.setdefault(model["name"], []).append(model)
    first = next(iter(sorted(folder.glob("seed-*"))), folder)
    cells = {}
    for name, models in found.items():
        scores = [100 * statistics.mean(model["scores"].values()) for model in models]
        retained = [100 * m["retained"] for m in models if m["retained"] is not None and name != "teacher"]
        cells[name] = Cell(scores, retained, models[0]["parameters"], first / name)
    return cells


def read(root: Path) -> dict[str, dict[str, Cell]]:
    """Row -> task -> cell: the teacher, each method, and each method's student without its teacher."""
    rows: dict[str, dict[str, Cell]] = {}
    folders = (path for path in root.iterdir() if path.is_dir())
    for method in sorted(folders, key=lambda path: (path.name != "teacher", path.name)):
        for task in (name for name in NAMES if (method / name).is_dir()):
            for model, cell in cells_of(method / task).items():
                if model != "teacher":  # it has a folder of its own, of recipe finetune
                    row = f"{method.name}, no teacher" if model == "baseline" else method.name
                    rows.setdefault(row, {})[task] = cell
    teacher = rows.get("teacher", {})
    for name, cells in rows.items():
        for task, cell in cells.items():
            if name != "teacher" and not cell.retained and task in teacher:
                retained = [100 * score / teacher[task].scores[0] for score in cell.scores]
                cells[task] = replace(cell, retained=retained)
    return rows


def measure(rows: dict[str, dict[str, Cell]]) -> dict[str, float]:
    """Row -> median milliseconds of one sequence of 128 tokens on one CPU thread, float32."""
    import torch
    from transformers import AutoModelForSequenceClassification

    import fastdistil.models.bilstm  # noqa: F401  registers its class
    from fastdistil.evaluate import measure_latency

    torch.set_num_threads(1)
    folders = {name: next(iter(cells.values())).folder for name, cells in rows.items()}
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for name, folder in folders.items()
        if (folder / "config.json").exists()
    }
    measured = measure_latency(models, batch_sizes=(1,), length=128, runs=50)
    return {name: latency[0].p50_ms for name, latency in measured.items()}


def table(rows: dict[str, dict[str, Cell]], latency: dict[str, float]) -> str:
    tasks = [task for task in NAMES if any(task in cells for cells in rows.values())]
    lines = ["| model | parameters | latency | " + " | ".join(NAMES[t] for t in tasks) + " | mean |"]
    lines.append("|---" + "|---:" * (len(tasks) + 3) + "|")
    for name, cells in rows.items():
        first = next(iter(cells.values()))
        scores = [str(cells[task]) if task in cells else "–" for task in tasks]
        means = [statistics.mean(cells[task].scores) for task in tasks if task in cells]
        mean = f"{statistics.mean(means):.1f}" if len(means) == len(tasks) else "–"
        time = f"{latency[name]:.1f} ms" if name in latency else "–"
        cost = f"{first.parameters / 1e6:.1f} M | {time}"
        lines.append(f"| {name} | {cost} | " + " | ".join(scores) + f" | {mean} |")
    return "\n".join(lines)


def retained_table(rows: dict[str, dict[str, Cell]]) -> str:
    students = {name: cells for name, cells in rows.items() if any(c.retained for c in cells.values())}
    tasks = [task for task in NAMES if any(task in cells for cells in students.values())]
    lines = ["| retained, % | " + " | ".join(NAMES[t] for t in tasks) + " | mean |"]
    lines.append("|---" + "|---:" * (len(tasks) + 1) + "|")
    for name, cells in students.items():
        published = PUBLISHED.get(name.split(":")[0], {})
        shown = []
        for task in tasks:
            text = spread(cells[task].retained) if task in cells else "–"
            shown.append(text + (f" ({100 * published[task]:.1f})" if task in published else ""))
        means = [statistics.mean(cells[task].retained) for task in tasks if task in cells]
        mean = f"{statistics.mean(means):.1f}" if len(means) == len(tasks) else "–"
        mean += f" ({100 * published['mean']:.0f})" if "mean" in published else ""
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {mean} |")
    return "\n".join(lines)


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:] if argument != "--measure"]
    if len(folders) != 1:
        sys.exit(__doc__)
    everything = read(folders[0])
    file = folders[0] / "latency.json"
    latency = json.loads(file.read_text()) if file.exists() else {}
    if "--measure" in sys.argv:
        measured = measure(everything)
        scale = latency.get("teacher", measured["teacher"]) / measured["teacher"]
        latency = {name: scale * time for name, time in measured.items()} | latency
        file.write_text(json.dumps(latency, indent=1) + "\n")
    print(table(everything, latency), end="\n\n")
    print(retained_table(everything))
