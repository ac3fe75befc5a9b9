"""What the pictures show, read back from the artists that draw it."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastdistil.compare import pictures
from fastdistil.compare.pictures import KINDS, LOOKS, PICTURES, Label, draw, place_labels
from fastdistil.compare.quantities import FASTER, LATENCY, SIZE, front
from fastdistil.compare.results import Comparison


def scatter(comparison: Comparison, cost=LATENCY):
    figure = Figure(figsize=(10, 5.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    pictures._scatter(figure, axes, comparison, cost)
    FigureCanvasAgg(figure).draw()
    return axes


def dots(axes) -> dict[str, list[tuple[float, float]]]:
    """Class -> its points, of which error bars are none."""
    kinds = {c.get_label(): c for c in axes.collections if c.get_label() in LOOKS}
    return {kind: [tuple(at) for at in c.get_offsets().tolist()] for kind, c in kinds.items()}


def boxes(axes) -> dict[str, object]:
    renderer = axes.figure.canvas.get_renderer()
    return {text.get_text(): Text.get_window_extent(text, renderer) for text in axes.texts}


@pytest.fixture(scope="module")
def drawn(comparison: Comparison, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    assert set(draw(comparison, folder)) == set(folder.iterdir())
    return folder


def test_each_picture_is_written_as_png_and_svg(drawn: Path) -> None:
    assert {file.name for file in drawn.iterdir()} == {f"{n}{s}" for n in PICTURES for s in (".png", ".svg")}
    for file in drawn.iterdir():
        assert file.read_bytes().startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")


def test_the_same_comparison_gives_the_same_bytes(
    comparison: Comparison, drawn: Path, tmp_path: Path
) -> None:
    for file in draw(comparison, tmp_path):
        assert file.read_bytes() == (drawn / file.name).read_bytes(), file.name


def test_a_comparison_without_measurements_is_drawn(bare: Comparison, tmp_path) -> None:
    assert len(draw(bare, tmp_path)) == 2 * len(PICTURES)


@pytest.mark.parametrize(("cost", "at"), [(LATENCY, 3.42), (SIZE, 46.0)], ids=["latency", "size"])
def test_points_stand_at_their_numbers(comparison: Comparison, cost, at: float) -> None:
    axes = scatter(comparison, cost)
    assert axes.get_xscale() == "log"
    found = dots(axes)
    assert sum(map(len, found.values())) == len(comparison.rows) - 1  # all but the failed one
    assert any(x == pytest.approx(at) and y == pytest.approx(89.1833, abs=1e-3) for x, y in found["chain"])


def test_a_broken_model_stands_at_the_lower_edge_with_its_value(comparison: Comparison) -> None:
    axes = scatter(comparison)
    static = next(y for x, y in dots(axes)["quantisation"] if x == pytest.approx(11.9))
    others = [y for kind in dots(axes).values() for x, y in kind if x != pytest.approx(11.9)]
    assert axes.get_ylim()[0] < static < min(others)
    assert "int8-static  50.9 ↓" in boxes(axes)


def test_the_front_is_a_line_of_steps_through_its_rows(comparison: Comparison) -> None:
    axes = scatter(comparison)
    line = next(line for line in axes.lines if line.get_label() == "Pareto front")
    corners = list(zip(*line.get_data(), strict=True))
    best = [(LATENCY.value(comparison, row), 100 * row.score) for row in front(comparison, LATENCY)]
    assert np.array(corners[::2]) == pytest.approx(np.array(best))
    for (x, y), (right, up) in itertools.pairwise(corners):
        assert (y == up and right > x) or (x == right and up > y)


def test_lines_at_the_teacher_and_at_the_levels(comparison: Comparison) -> None:
    axes = scatter(comparison)
    across = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]  # shares of the width
    level = [line.get_ydata()[0] for line in across]
    assert sorted(level) == pytest.approx([0.93 * 92.43, 0.97 * 92.43, 92.43])


@pytest.mark.parametrize("cost", [LATENCY, SIZE], ids=["latency", "size"])
def test_labels_cover_neither_each_other_nor_leave_the_axes(comparison: Comparison, cost) -> None:
    axes = scatter(comparison, cost)
    methods = {row.method for row in comparison.rows}
    labels = {text: box for text, box in boxes(axes).items() if text.split("  ")[0] in methods}
    assert {row.method for row in front(comparison, cost)} <= set(labels)
    inside = axes.get_window_extent()
    for one, other in itertools.combinations(labels.values(), 2):
        assert not one.overlaps(other)
    assert all(
        inside.x0 <= b.x0 and b.x1 <= inside.x1 and inside.y0 <= b.y0 and b.y1 <= inside.y1
        for b in labels.values()
    )


@pytest.mark.parametrize("cost", [LATENCY, SIZE], ids=["latency", "size"])
def test_weak_labels_cover_no_bar_of_a_deviation(comparison: Comparison, cost) -> None:
    axes = scatter(comparison, cost)
    strong = {row.method for row in front(comparison, cost)}
    weak = [box for text, box in boxes(axes).items() if text not in strong and "of it" not in text]
    bars = [
        path.get_extents(axes.transData)
        for bar in axes.collections
        if isinstance(bar, LineCollection)
        for path in bar.get_paths()
    ]
    assert len(bars) > 10
    assert len(weak) > 3
    assert not any(bar.overlaps(box) for bar in bars for box in weak)


def test_a_leader_is_no_longer_than_the_way_to_its_label() -> None:
    figure = Figure(figsize=(6, 3), dpi=100)
    axes = figure.subplots()
    rows = [Label(f"a label of some length {i}", (0.5, 0.5), strong=True) for i in range(12)]
    texts = place_labels(figure, axes, rows)
    figure.canvas.draw()
    led = [text for text in texts if text.arrow_patch is not None]
    assert led
    point = axes.transData.transform((0.5, 0.5))
    for text in led:
        start = text.arrow_patch.get_path().vertices[0]
        way = np.hypot(*np.array(text.get_position())) * figure.dpi / 72
        assert np.hypot(*(start - point)) < way + 2


def test_a_weak_label_without_room_is_left_out_and_a_strong_one_is_not() -> None:
    figure = Figure(figsize=(1.2, 1.2), dpi=100)
    axes = figure.subplots()
    crowd = [Label(f"a label that is too long {i}", (0.5, 0.5), strong=i == 0) for i in range(3)]
    assert [text.get_text() for text in place_labels(figure, axes, crowd)] == ["a label that is too long 0"]


def test_every_class_has_its_own_colour_and_marker() -> None:
    assert set(LOOKS) == set(KINDS)
    assert (
        len({look.colour for look in LOOKS.values()})
        == len({look.marker for look in LOOKS.values()})
        == len(KINDS)
    )


def test_the_best_of_each_class_is_named_with_what_it_retains(comparison: Comparison) -> None:
    axes = Figure().subplots()
    pictures._retained(axes, comparison)
    kinds = [label.get_text() for label in axes.get_yticklabels()]
    assert set(kinds) == set(KINDS) - {"teacher"}
    assert kinds[0] == "quantisation"
    assert kinds[-1] == "sharing"
    named = {text.get_text() for text in axes.texts}
    assert {"bf16  100.0", "prune-heads:0.5+prune-ffn:0.5  98.0", "share-layers:3  94.3"} <= named
    assert "int8-static  55.1 ←" in named
    assert "pkd+int8  96.5" not in named


def test_a_class_is_drawn_in_its_colour(comparison: Comparison) -> None:
    axes = scatter(comparison)
    drawn = {c.get_label(): to_hex(c.get_facecolor()[0]) for c in axes.collections if c.get_label() in LOOKS}
    assert drawn == {kind: LOOKS[kind].colour for kind in drawn}
    assert len(drawn) == len(KINDS)


def test_one_point_is_enough(comparison: Comparison) -> None:
    axes = scatter(replace(comparison, rows=comparison.rows[:1]))
    assert dots(axes) == {"teacher": [(pytest.approx(48.2), pytest.approx(92.43))]}
    assert FASTER.value(comparison, comparison.rows[0]) == 1
