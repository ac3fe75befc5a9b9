"""Mean and deviation over runs of one recipe with several seeds.

Usage: python benchmarks/seeds.py RUN [RUN ...]      folders (or results.json files) of `fastdistil train`

Prints a Markdown table: one row a model, mean ± sample standard deviation of each held-out score, and the
differences from the student's within a seed, whose deviation is what tells a difference from luck.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def scores(path: Path) -> dict[str, dict[str, float]]:
    """Model -> its held-out loss and accuracy in one run."""
    file = path / "results.json" if path.is_dir() else path
    models = json.loads(file.read_text())["models"]
    return {one["name"]: {key: one["scores"][key] for key in ("loss", "accuracy")} for one in models}


def spread(values: list[float], scale: float = 1.0, digits: int = 4) -> str:
    mean = statistics.mean(values) * scale
    deviation = statistics.stdev(values) * scale if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    lines = [
        "| model | runs | held-out loss | accuracy, % | loss less the student's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(name for run in runs for name in run):
        own = [run for run in runs if name in run]
        losses = [run[name]["loss"] for run in own]
        accuracy = spread([run[name]["accuracy"] for run in own], 100, 2)
        gaps = [run[name]["loss"] - run["student"]["loss"] for run in own]
        gap = "" if name == "student" else spread(gaps)
        lines.append(f"| {name} | {len(own)} | {spread(losses)} | {accuracy} | {gap} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(table([scores(Path(argument)) for argument in sys.argv[1:]]))
