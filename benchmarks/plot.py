"""Write the table and the pictures of results folders.

Usage: python benchmarks/plot.py [results/DEVICE ...]      (default: every folder of the results)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import table
from records import OURS, QUARTER, Record, newest, results_dir

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart for colour-blind readers.
OUR_COLOUR, GREY = "#D55E00", "#777777"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Panel = tuple[
    Sequence[Any], Callable[[Axes], None]
]  # what it shows, and how; without the first it stays empty


def colour(name: str, names: Sequence[str]) -> str:
    return OUR_COLOUR if name == OURS else COLOURS[names.index(name) % len(COLOURS)]


def rivals(records: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(name for r in records for name in r.variants if name != r.bound)
    return [name for name in names if name not in (OURS, QUARTER)]


def curves(
    axes: Axes, records: Sequence[Record], title: str, size: str = "rows", names: Sequence[str] = ()
) -> None:
    """Milliseconds against rows N, or of a sequence against its length L. The bound is dashed.

    `names` fixes the order of the colours where several panels share them.
    """
    for name in [OURS, *rivals(records), *dict.fromkeys(r.bound for r in records if r.bound)]:
        measured = sorted((r for r in records if name in r.variants), key=lambda r: r.case[size])
        # p20, p50 and p80 of each record.
        low, middle, high = (
            [r.variants[name][key] * 1e3 / r.case.get("batch", 1) for r in measured]
            for key in ("p20", "p50", "p80")
        )
        bound = name == records[0].bound
        axes.errorbar(
            [r.case[size] for r in measured],
            middle,
            yerr=[
                [b - a for a, b in zip(low, middle, strict=True)],
                [b - a for a, b in zip(middle, high, strict=True)],
            ],
            label=f"{name}, the bound" if bound else name,
            color=GREY if bound else colour(name, names or rivals(records)),
            linestyle="--" if bound else "-",
            linewidth=2.5 if name == OURS else 1.5,
            marker="o",
            markersize=4,
            capsize=2,
            zorder=3 if name == OURS else 2,
        )
    xlabel, what = ("rows N", "ms") if size == "rows" else ("length L", "ms a sequence")
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=f"{what}, forward + backward", title=title)
    ticks = sorted({r.case[size] for r in records})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def bars(
    axes: Axes,
    groups: Sequence[tuple[str, dict[str, float]]],
    title: str,
    label: str,
    names: Sequence[str] = (),
) -> None:
    """Horizontal bars with their value, a block a group; the longer labels need the room."""
    names = names or list(dict.fromkeys(name for _, values in groups for name in values if name != OURS))
    position, longest = 0.0, max(value for _, values in groups for value in values.values())
    for group, values in groups:
        axes.text(0, position, group, fontsize=9, fontweight="bold", va="center")
        for name, value in sorted(values.items(), key=lambda item: item[0] != OURS):
            position += 1
            axes.barh(position, value, color=colour(name, names), height=0.8)
            axes.text(value + longest * 0.01, position, f"{value:,.0f}  {name}", fontsize=8, va="center")
        position += 1.4
    axes.set(title=title, xlabel=label, yticks=[], xlim=(0, longest * 1.8), ylim=(position - 0.5, -1))
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
        (f"{r.benchmark}, {r.case['rows']} rows", peaks(r))
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

    panels: list[Panel] = [
        (logits, lambda a: curves(a, logits, f"kd_loss: KL + CE from logits, V 30522, {dtype}")),
        (
            hidden,
            lambda a: curves(a, hidden, f"linear_kd_loss: from hidden states, D 768, V 30522, {dtype}"),
        ),
        (memory, lambda a: bars(a, memory, "Extra peak memory, gradients included", "MiB")),
        (training, lambda a: bars(a, training, "Training step: teacher 12 layers, student 6", "tokens/s")),
    ]
    draw_panels(panels, environment, path)


def attention_picture(records: Sequence[Record], path: Path) -> None:
    """Four panels: both attention losses' times against the length, their memory, and MiniLM's step."""
    environment = records[0].environment
    dtype = "float32" if environment["kind"] == "cpu" else "bfloat16"
    times = {
        op: [r for r in records if r.benchmark == op and r.case["dtype"] == dtype and not r.case["masked"]]
        for op in ("attention_kl", "attention_mse")
    }
    names = rivals([r for chosen in times.values() for r in chosen])
    memory = [
        (f"{r.benchmark}, B {r.case['batch']}, L {r.case['length']}", peaks(r))
        for chosen in times.values()
        for r in sorted(chosen, key=lambda r: r.case["length"])
        if r.variants[OURS]["peak_bytes"]
    ]
    training = [
        (
            f"batch {r.case['batch']} x {r.case['length']}, {r.case['precision']}",
            {name: (r.tokens or 0) / one["p50"] for name, one in r.variants.items()},
        )
        for r in records
        if r.benchmark == "train_minilm"
    ]
    panels: list[Panel] = [
        (
            found,
            functools.partial(
                curves, records=found, title=f"{op}, H 12, d 32 / 64, {dtype}", size="length", names=names
            ),
        )
        for op, found in times.items()
    ]
    panels.append((memory, lambda a: bars(a, memory, "Extra peak memory, gradients included", "MiB", names)))
    title = "MiniLMv2 training step: teacher 12 layers, student 6"
    panels.append((training, lambda a: bars(a, training, title, "tokens/s")))
    draw_panels(panels, environment, path)


def peaks(record: Record) -> dict[str, float]:
    """MiB of extra memory of each variant but the bound."""
    return {
        name: one["peak_bytes"] / 2**20
        for name, one in record.variants.items()
        if one["peak_bytes"] and name not in (record.bound, QUARTER)
    }


def draw_panels(panels: Sequence[Panel], environment: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    threads = f", {environment['threads']} threads" if environment["kind"] == "cpu" else ""
    versions = environment["versions"]
    figure.suptitle(
        f"{environment['device']}{threads}, torch {versions['torch']}, {environment['implementation']}"
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
        if attention := [r for r in records if r.benchmark.startswith(("attention", "train_minilm"))]:
            attention_picture(attention, folder / "attention.png")
            print(f"wrote {folder}/attention.png")


if __name__ == "__main__":
    main()
