"""Write the table and the picture of results folders.

Usage: python benchmarks/plot.py [results/DEVICE ...]      (default: every folder of the results)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import table
from records import OURS, Record, newest, results_dir

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart for colour-blind readers.
OUR_COLOUR, GREY = "#D55E00", "#777777"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def colour(name: str, names: Sequence[str]) -> str:
    return OUR_COLOUR if name == OURS else COLOURS[names.index(name) % len(COLOURS)]


def curves(axes: Axes, records: Sequence[Record], title: str) -> None:
    """Milliseconds against rows, one line a variant; the bound is dashed."""
    rivals = list(dict.fromkeys(name for r in records for name in r.variants if name not in (OURS, r.bound)))
    for name in [OURS, *rivals, *dict.fromkeys(r.bound for r in records if r.bound)]:
        points = sorted((r.case["rows"], r.variants[name]) for r in records if name in r.variants)
        rows = [row for row, _ in points]
        milliseconds = [one["p50"] * 1e3 for _, one in points]
        spread = [[(one["p50"] - one["p20"]) * 1e3 for _, one in points]]
        spread.append([(one["p80"] - one["p50"]) * 1e3 for _, one in points])
        bound = name == records[0].bound
        axes.errorbar(
            rows,
            milliseconds,
            yerr=spread,
            label=f"{name}, the bound" if bound else name,
            color=GREY if bound else colour(name, rivals),
            linestyle="--" if bound else "-",
            linewidth=2.5 if name == OURS else 1.5,
            marker="o",
            markersize=4,
            capsize=2,
            zorder=3 if name == OURS else 2,
        )
    axes.set(xscale="log", yscale="log", xlabel="rows N", ylabel="ms, forward + backward", title=title)
    ticks = sorted({r.case["rows"] for r in records})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def bars(axes: Axes, groups: Sequence[tuple[str, dict[str, float]]], title: str, label: str) -> None:
    """Horizontal bars with their value, a block a group; the longer labels need the room."""
    names = list(dict.fromkeys(name for _, values in groups for name in values if name != OURS))
    position, longest = 0.0, max(value for _, values in groups for value in values.values())
    for group, values in groups:
        axes.text(0, position, group, fontsize=9, fontweight="bold", va="center")
        for name, value in sorted(values.items(), key=lambda item: item[0] != OURS):
            position += 1
            axes.barh(position, value, color=colour(name, names), height=0.8)
            axes.text(value + longest * 0.01, position, f"{value:,.0f}  {name}", fontsize=8, va="center")
        position += 1.4
    axes.set(title=title, xlabel=label, yticks=[], xlim=(0, longest * 1.6), ylim=(position - 0.5, -1))
    axes.spines[["top", "right", "left"]].set_visible(False)


def picture(records: Sequence[Record], path: Path) -> None:
    """Four panels: both vocabulary ops' times, their memory, and the training steps."""
    environment = records[0].environment
    dtype = "float32" if environment["kind"] == "cpu" else "bfloat16"
    logits = [
        r
        for r in records
        if r.benchmark == "kd_loss"
        and (r.case["dtype"], r.case["divergence"], r.case["ce"]) == (dtype, "forward_kl", True)
    ]
    hidden = [
        r
        for r in records
        if r.benchmark == "linear_kd_loss"
        and (r.case["dtype"], r.case["dim"], r.case["ce_and_bias"]) == (dtype, 768, True)
    ]
    memory = [
        (
            f"{r.benchmark}, {r.case['rows']} rows",
            {
                name: one["peak_bytes"] / 2**20
                for name, one in r.variants.items()
                if one["peak_bytes"] and name != r.bound
            },
        )
        for chosen in (logits, hidden)
        for r in sorted(chosen, key=lambda r: r.case["rows"])[-1:]
        if r.variants[OURS]["peak_bytes"]
    ]
    training = [
        (
            f"KD on {r.case['positions']} tokens, length {r.case['length']}, {r.case['precision']}",
            {name: (r.tokens or 0) / one["p50"] for name, one in r.variants.items()},
        )
        for r in records
        if r.benchmark == "train"
    ]

    figure, axes = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    threads = f", {environment['threads']} threads" if environment["kind"] == "cpu" else ""
    versions = environment["versions"]
    figure.suptitle(
        f"{environment['device']}{threads}, torch {versions['torch']}, {environment['implementation']}"
    )
    panels = (
        (logits, lambda a: curves(a, logits, f"kd_loss: KL + CE from logits, V 30522, {dtype}")),
        (
            hidden,
            lambda a: curves(a, hidden, f"linear_kd_loss: from hidden states, D 768, V 30522, {dtype}"),
        ),
        (memory, lambda a: bars(a, memory, "Extra peak memory, gradients included", "MiB")),
        (training, lambda a: bars(a, training, "Training step: teacher 12 layers, student 6", "tokens/s")),
    )
    for panel, (found, draw) in zip(axes.flat, panels, strict=True):
        if found:
            draw(panel)
        else:
            panel.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:]]
    folders = given or sorted(path.parent for path in results_dir().glob("*/results.jsonl"))
    for folder in folders:
        records = newest(folder)
        (folder / "README.md").write_text(table.page(records))
        picture(records, folder / "speed.png")
        print(f"wrote {folder}/README.md and {folder}/speed.png")


if __name__ == "__main__":
    main()
