"""Pictures of a comparison: quality against latency and size, and what each class of method retains."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistil.compare.quantities import (
    KINDS,
    LATENCY,
    LEVELS,
    RETAINED,
    SCORE,
    SIZE,
    Quantity,
    deviation,
    front,
    points,
    score_name,
)
from fastdistil.compare.results import Comparison, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

PICTURES = {  # file -> what it shows
    "quality-latency": "Score against latency, with the Pareto front",
    "quality-size": "Score against size on disk, with the Pareto front",
    "retained": "Share of the teacher's score that each class of method retains",
}


@dataclass(frozen=True)
class Look:
    colour: str  # of Okabe and Ito, safe for colour-blind readers
    marker: str  # matplotlib's; no two classes share one, so that a picture in grey is readable, too


LOOKS: dict[Kind, Look] = {
    "teacher": Look("#000000", "*"),
    "distillation": Look("#0072b2", "o"),
    "pruning": Look("#e69f00", "^"),
    "quantisation": Look("#009e73", "s"),
    "low rank": Look("#cc79a7", "v"),
    "sharing": Look("#56b4e9", "p"),
    "clustering": Look("#f0e442", "h"),
    "runtime": Look("#999999", "X"),
    "chain": Look("#d55e00", "D"),
}
INK, GREY, EDGE = "#222222", "#6b6b6b", "#333333"
# Retaining less than this is shown at the lower edge, with its value: one broken model must not press the
# others into a line.
FLOOR = 80.0


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Write each picture as PNG and SVG; the same comparison gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: Any = {"svg.hashsalt": "fastdistil", "font.size": 10, "axes.edgecolor": GREY, "text.color": INK}
    files = []
    with mpl.rc_context(style):
        for name in PICTURES:
            figure = Figure(
                figsize=(10, 5.6), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
            )
            axes = figure.subplots()
            axes.set_title(f"{PICTURES[name]} ({comparison.task})", loc="left", fontweight="bold", pad=12)
            if name == "retained":
                _retained(axes, comparison)
            else:
                _scatter(figure, axes, comparison, LATENCY if name == "quality-latency" else SIZE)
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                files.append(folder / f"{name}{suffix}")
                figure.savefig(files[-1], metadata=metadata)
    return files


def _scatter(figure: "Figure", axes: "Axes", comparison: Comparison, cost: Quantity) -> None:
    known = points(comparison, cost)
    axes.set(xlabel=f"{cost.label} ({cost.unit}), log scale", ylabel=f"{score_name(comparison)} (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    reference = SCORE.value(comparison, comparison.reference)
    if not known or reference is None:
        _nothing(axes)
        return
    floor = _bottom(axes, [y for _, _, y in known], FLOOR / 100 * reference)
    _x_axis(axes, [x for _, x, _ in known])

    lines = []
    for share in (1.0, *LEVELS):
        if share * reference >= floor:
            lines.append(share * reference)
            axes.axhline(share * reference, color=GREY, linewidth=0.9, linestyle="--" if share == 1 else ":")
            axes.annotate(
                "teacher" if share == 1 else f"{share:.0%} of it",
                (1, share * reference),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=GREY,
            )

    best = front(comparison, cost)
    left, right = axes.get_xlim()
    corners: list[tuple[float, float]] = []
    for row in best:
        x, y = next((x, max(y, floor)) for other, x, y in known if other is row)
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    corners.append((right, corners[-1][1]))
    axes.plot(*zip(*corners, strict=True), color=INK, linewidth=1.1, zorder=2, label="Pareto front")
    bars = []
    for kind in KINDS:
        own = [point for point in known if point[0].kind == kind]
        if own:
            _dots(axes, kind, [(x, max(y, floor)) for _, x, y in own], [row in best for row, _, _ in own])
            for row, x, y in own:
                spread = deviation(row)
                if spread is not None and y >= floor:
                    axes.errorbar(x, y, spread, color=GREY, linewidth=0.9, capsize=2, zorder=2)
                    bars.append(((x, y - spread), (x, y + spread)))
    _legend(axes)

    # The front is labelled first, the teacher among it or next; what finds no room stays without a label.
    order = sorted(known, key=lambda p: (p[0] not in best, p[0].kind != "teacher", -p[2]))
    labels = [
        Label(f"{row.method}  {y:.1f} ↓" if y < floor else row.method, (x, max(y, floor)), row in best)
        for row, x, y in order
    ]
    segments = [*itertools.pairwise(corners), *bars, *(((left, y), (right, y)) for y in lines)]
    place_labels(figure, axes, labels, segments)


def _bottom(axes: "Axes", values: Sequence[float], least: float) -> float:
    """Set the limits of the scores; return where those below `least` are drawn."""
    high = max(values)
    low = min((value for value in values if value >= least), default=high)
    room = max(0.5, 0.08 * (high - low))
    below = any(value < least for value in values)
    axes.set_ylim(low - (2.5 if below else 1) * room, high + 1.3 * room)
    return low - 1.5 * room if below else low


def _x_axis(axes: "Axes", values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    axes.set_xscale("log")
    # Much of what is compared is no faster than the teacher: there is room for its labels on the right.
    span = max(high / low, 2)
    axes.set_xlim(low / span**0.11, high * span**0.16)
    steps = (1, 2, 5) if high / low > 5 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _dots(axes: "Axes", kind: Kind, where: Sequence[tuple[float, float]], strong: Sequence[bool]) -> None:
    look = LOOKS[kind]
    axes.scatter(
        [x for x, _ in where],
        [y for _, y in where],
        # A star and a cross cover less than their square.
        s=[(130 if look.marker in "*" else 62) * (1.25 if one else 0.85) for one in strong],
        c=look.colour,
        marker=look.marker,
        edgecolors=EDGE,
        linewidths=0.7,
        zorder=3,
        label=kind,
    )


def _legend(axes: "Axes") -> None:
    from matplotlib.collections import PathCollection

    legend = axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.1, 1),
        borderaxespad=0,
        frameon=False,
        labelspacing=0.7,
        handletextpad=0.4,
        alignment="left",
    )
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([60])


def _nothing(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=GREY)
    axes.set(xticks=[], yticks=[])


def _retained(axes: "Axes", comparison: Comparison) -> None:
    known = [
        (row, value)
        for row in comparison.rows[1:]
        if row.error is None and (value := RETAINED.value(comparison, row)) is not None
    ]
    axes.set(xlabel="share of the teacher's score (%)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", alpha=0.2)
    if not known:
        _nothing(axes)
        return
    best = {kind: max((value, -i) for i, (row, value) in enumerate(known) if row.kind == kind)
            for kind in KINDS if any(row.kind == kind for row, _ in known)}  # fmt: skip
    kinds = sorted(best, key=lambda kind: best[kind], reverse=True)
    low = min((value for _, value in known if value >= FLOOR), default=FLOOR)
    below = any(value < FLOOR for _, value in known)
    high = max(100.0, *(value for _, value in known))
    floor = low - 0.06 * (high - low) - 0.3
    axes.set_xlim(floor - 0.4 if below else low - 0.5, high + 0.4)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.5, -0.75)
    axes.tick_params(axis="y", length=0)
    for share in (1.0, *LEVELS):
        axes.axvline(100 * share, color=GREY, linewidth=0.9, linestyle="--" if share == 1 else ":", zorder=1)
    for y, kind in enumerate(kinds):
        own = [
            (row, value, (value, -i) == best[kind])
            for i, (row, value) in enumerate(known)
            if row.kind == kind
        ]
        _dots(axes, kind, [(max(value, floor), y) for _, value, _ in own], [top for _, _, top in own])
        for row, value, top in own:
            if top or value < FLOOR:
                # Toward the middle of the picture, so that no label leaves it.
                left = value < (low + high) / 2
                axes.annotate(
                    f"{_short(row.method, 44)}  {value:.1f}{' ←' if value < FLOOR else ''}",
                    (max(value, floor), y),
                    xytext=(7 if left else 0, 0 if left else 7),
                    textcoords="offset points",
                    ha="left" if left else "right",
                    va="center" if left else "bottom",
                    fontsize=8.5,
                    color=INK if top else GREY,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                    zorder=2,
                )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


@dataclass(frozen=True)
class Label:
    text: str
    point: tuple[float, float]  # in data
    strong: bool  # never left out


Segment = tuple[tuple[float, float], tuple[float, float]]

# Where a label may stand relative to its point, best first: points right and up.
_NEAR = [
    (right * distance, up * distance)
    for distance in (7, 12, 19, 28)
    for right, up in ((1, 0), (-1, 0), (-1, 1), (1, -1), (0, 1), (0, -1), (1, 1), (-1, -1))
]


def place_labels(
    figure: "Figure", axes: "Axes", labels: Sequence[Label], segments: Sequence[Segment] = ()
) -> list["Annotation"]:
    """Write each label beside its point, where it covers no point, label or segment, nor leaves the axes.

    Segments, in data, are level or upright. In the order given, each label takes the first of a few fixed
    places that is free. A weak one for which there is none is left out; a strong one takes the place where it
    covers least.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles the layout, and with it where the points are
    figure.set_layout_engine("none")
    inside = axes.get_window_extent()
    scale = figure.dpi / 72

    def around(corners: Sequence[tuple[float, float]], margin: float) -> Bbox:
        pixels = axes.transData.transform(corners)
        low, high = pixels.min(axis=0) - margin * scale, pixels.max(axis=0) + margin * scale
        return Bbox([low, high])

    # Wide enough that a label does not seem to belong to a point beside its own.
    points = [around([label.point], 9) for label in labels]
    taken = [around(segment, 0.8) for segment in segments]
    placed = []
    for i, label in enumerate(labels):
        others = [*taken, *points[:i], *points[i + 1 :]]
        tried = []
        for dx, dy in _NEAR:
            text = _write(axes, label, dx, dy)
            box = _text_box(text, canvas.get_renderer())
            tried.append((_covered(box, others, inside), text, box))
            if tried[-1][0] == 0:
                break
        least = min(tried, key=lambda one: one[0])
        for one in tried:
            if one is least and (one[0] == 0 or label.strong):
                placed.append(one[1])
                taken.append(one[2])
            else:
                one[1].remove()
    return placed


# Where a leader leaves its label, as a part of its width or height: at the side that is next to the point.
_PART = {"left": 0, "bottom": 0, "center": 0.5, "right": 1, "top": 1}


def _write(axes: "Axes", label: Label, dx: float, dy: float) -> "Annotation":
    ha = "left" if dx > 0 else "right" if dx < 0 else "center"
    va = "bottom" if dy > 0 else "top" if dy < 0 else "center"
    leader = {
        "arrowstyle": "-",
        "color": GREY,
        "linewidth": 0.5,
        "shrinkA": 0,
        "shrinkB": 3,
        "relpos": (_PART[ha], _PART[va]),
    }
    return axes.annotate(
        _short(label.text, 48),
        label.point,
        xytext=(dx, dy),
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=8.5 if label.strong else 7.5,
        color=INK if label.strong else GREY,
        zorder=4,
        arrowprops=leader if max(abs(dx), abs(dy)) > 7 else None,
    )


def _text_box(label: "Annotation", renderer: "RendererAgg") -> "Bbox":
    from matplotlib.text import Text

    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)  # without the leader


def _covered(box: "Bbox", taken: Sequence["Bbox"], inside: "Bbox") -> float:
    """Pixels of the box that cover another one or lie outside."""
    from matplotlib.transforms import Bbox

    parts = [Bbox.intersection(box, other) for other in (*taken, inside)]
    areas = [0.0 if part is None else part.width * part.height for part in parts]
    return sum(areas[:-1]) + box.width * box.height - areas[-1]
