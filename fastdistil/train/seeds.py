"""The same run with several seeds: mean and deviation in one table."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.markdown import Markdown
from torch import accelerator as torch_accelerator

from fastdistil.data.tasks import find_task
from fastdistil.errors import UserError
from fastdistil.train.config import RunConfig, first_difference, read_config
from fastdistil.train.report import ModelResult, RunResult, formatted, markdown_table, shown, title
from fastdistil.train.run import CONFIG, run
from fastdistil.train.students import resolved


def run_seeds(config: RunConfig, count: int, resume: bool = False) -> list[RunResult]:
    """Run `count` seeds from `config.seed` on, each in `output/seed-<n>`; write the table of all in `output`.

    With `resume`, seeds that are finished are read again, one that was interrupted goes on, and the rest are
    begun. Raises what `run` raises, and `UserError` where `output` is that of a single run.
    """
    if (config.output / CONFIG).exists():
        raise UserError(f"output {config.output} holds a run of one seed: choose another --output")
    config, runs = resolved(config), []
    for seed in range(config.seed, config.seed + count):
        output = config.output / f"seed-{seed}"
        one = config.model_copy(update={"seed": seed, "output": output})
        if resume and _is_finished(one):
            runs.append(RunResult(output, read_results(output)))
        else:
            runs.append(run(one, resume=resume and (output / CONFIG).exists()))
    if PartialState(cpu=not torch_accelerator.is_available()).is_main_process:  # see run
        _write(config, runs)
    return runs


def _is_finished(config: RunConfig) -> bool:
    """Whether the folder holds this run, and what is written last."""
    if not (config.output / "results.md").exists():
        return False
    return first_difference(read_config(config.output / CONFIG), config) is None


def _write(config: RunConfig, runs: Sequence[RunResult]) -> None:
    seeds = [config.seed + i for i in range(len(runs))]
    plain = {"recipe": config.recipe, "seeds": seeds, "runs": [[asdict(m) for m in r.models] for r in runs]}
    (config.output / "results.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    table = seeds_table([result.models for result in runs])
    task = "" if config.task is None else f" on {find_task(config.task.name).name}"
    parts = [
        f"# {config.recipe}{task}, {len(runs)} seeds",
        table.strip(),
        f"Mean ± sample standard deviation over the seeds {', '.join(map(str, seeds))}; each run is in its "
        "folder beside this file.",
        gain([result.models for result in runs]),
    ]
    (config.output / "results.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    console = Console(stderr=True, highlight=False)
    console.print(Markdown(table))
    console.print(f"written to {config.output}", markup=False, soft_wrap=True)


def seeds_table(runs: Sequence[Sequence[ModelResult]]) -> str:
    """One row a model, in Markdown; each run has the same models."""
    measures = shown(runs[0][-1].scores)
    with_teacher = runs[0][-1].retained is not None
    columns = ["model", "parameters", *map(title, measures), *(["retained"] if with_teacher else [])]
    rows = []
    for models in zip(*runs, strict=True):
        first = models[0]
        cells = [first.name, f"{first.parameters / 1e6:.2f} M"]
        for measure in measures:
            values = [m.scores[measure] for m in models if measure in m.scores]
            cells.append(_spread(measure, values) if values else "–")
        if with_teacher:
            cells.append(_spread("accuracy", [m.retained for m in models if m.retained is not None]))
        rows.append(cells)
    return markdown_table(columns, rows)


def gain(runs: Sequence[Sequence[ModelResult]]) -> str | None:
    """What the teacher gives, seed by seed: the deviation of the differences tells them from luck."""
    by_name = [{model.name: model.scores for model in models} for models in runs]
    if "student" not in by_name[0] or "baseline" not in by_name[0]:
        return None
    parts = []
    for measure in shown(by_name[0]["student"]):
        differences = [scores["student"][measure] - scores["baseline"][measure] for scores in by_name]
        mean, deviation = statistics.mean(differences), statistics.stdev(differences)
        sign = "+" if mean >= 0 else ""
        parts.append(f"{title(measure)} {sign}{formatted(measure, mean)} ± {formatted(measure, deviation)}")
    return f"The student less the baseline, seed by seed: {', '.join(parts)}."


def _spread(measure: str, values: Sequence[float]) -> str:
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    if deviation == 0:  # a teacher, which is the same in all runs
        return formatted(measure, mean)
    return f"{formatted(measure, mean)} ± {formatted(measure, deviation)}"


def read_results(folder: Path) -> list[ModelResult]:
    """The table of a finished run."""
    plain = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return [ModelResult(**model) for model in plain["models"]]
