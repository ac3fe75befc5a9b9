"""The arithmetic of rows, the Pareto front, and the file that keeps a comparison."""

from dataclasses import replace

import pytest

from fastdistil.compare.results import (
    Comparison,
    Row,
    Timing,
    pareto_front,
    read_comparison,
    write_comparison,
)
from fastdistil.errors import UserError


def find(comparison: Comparison, method: str) -> Row:
    return next(row for row in comparison.rows if row.method == method)


def test_score_is_the_mean_over_seeds_of_the_mean_metric() -> None:
    row = Row("m", "chain", "", scores=[{"accuracy": 0.8, "f1": 0.9}, {"accuracy": 0.7, "f1": 0.84}])
    assert row.means() == pytest.approx([0.85, 0.77])
    assert row.score == pytest.approx(0.81)
    # Sample deviation of two values: their distance over the square root of two.
    assert row.deviation == pytest.approx(0.08 / 2**0.5)


def test_one_seed_has_no_deviation() -> None:
    assert Row("m", "chain", "", scores=[{"accuracy": 0.8}]).deviation is None


def test_ratios_are_to_the_teacher(comparison: Comparison) -> None:
    row = find(comparison, "pkd+int8")
    assert comparison.retained(row) == pytest.approx((0.8922 + 0.8888 + 0.8945) / 3 / 0.9243)
    assert comparison.smaller(row) == pytest.approx(438 / 46)
    assert comparison.speedup(row) == pytest.approx(48.2 / 3.42)
    assert comparison.speedup(row, 8) == pytest.approx(48.2 / 3.42, rel=1e-3)


def test_ratios_of_a_failed_row_are_unknown(comparison: Comparison) -> None:
    row = find(comparison, "prune-width:0.99")
    assert comparison.retained(row) is comparison.smaller(row) is comparison.speedup(row) is None


def test_timing_takes_the_fewest_or_the_most_threads() -> None:
    timings = [Timing(1, 128, threads, 10 / threads, 11) for threads in (2, 4, 1)]
    row = Row("m", "chain", "", timings=timings)
    assert row.timing() == timings[2]
    assert row.timing(one_thread=False) == timings[1]
    assert row.timing(batch_size=8) is None


def test_front_leaves_out_what_another_beats() -> None:
    points = [(3.0, 0.9), (1.0, 0.7), (2.0, 0.6), (4.0, 0.9), (2.0, 0.8)]
    assert pareto_front(points) == [1, 4, 0]


def test_front_takes_the_first_of_equal_points() -> None:
    assert pareto_front([(1.0, 0.5), (1.0, 0.5)]) == [0]
    assert pareto_front([]) == []


def test_a_comparison_is_read_as_it_was_written(comparison: Comparison, tmp_path) -> None:
    write_comparison(tmp_path, comparison)
    assert read_comparison(tmp_path) == comparison
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["{", '{"rows": []}', '{"rows": [{"method": "m"}]}', "[]"])
def test_another_file_is_refused_by_name(text: str, tmp_path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json does not hold the results of a comparison"):
        read_comparison(tmp_path)


def test_writing_replaces_what_stood_there(comparison: Comparison, tmp_path) -> None:
    write_comparison(tmp_path, comparison)
    write_comparison(tmp_path, replace(comparison, task="rte"))
    assert read_comparison(tmp_path).task == "rte"
