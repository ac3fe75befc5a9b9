"""All costs of a few models, with the measurements themselves replaced."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil.compare import costs
from fastdistil.compare.costs import Cost, Measured, Setting, measure_costs
from fastdistil.compare.results import Timing
from fastdistil.errors import RunError

SETTING = Setting(length=16, rounds=2, device="cpu")
TIMINGS = [Timing(8, 16, 2, 4.0, 5.0)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was measured, and how. Peaks are 100 bytes for each letter of a name; "broken" has none."""
    asked: dict[str, Any] = {"dtypes": {}}

    def peak(folder: Path, *, length: int, device: str, dtype: torch.dtype | None) -> int:
        asked["dtypes"][folder.name] = dtype
        if folder.name == "broken":
            raise RunError("no such op")
        return 100 * len(folder.name)

    def measure(models: Any, *, groups: Any, load: Any, **setting: Any) -> dict[str, list[Timing]]:
        asked["groups"], asked["setting"] = groups, setting
        for folder in models.values():
            load(folder)
        return dict.fromkeys(models, TIMINGS)

    def load(folder: Path, dtype: torch.dtype | None) -> None:
        asked["dtypes"][folder.name] = (asked["dtypes"][folder.name], dtype)

    monkeypatch.setattr(costs, "measure_peak_memory", peak)
    monkeypatch.setattr(costs, "measure", measure)
    monkeypatch.setattr("fastdistil.compare.measure.load", load)
    monkeypatch.setattr(costs, "find_meter", lambda device: (None, "there is no counter"))
    monkeypatch.setattr(costs, "memory_bytes", lambda field: 10_000)
    return asked


def run(*names: str) -> Measured:
    folders = {name: Path("models") / name for name in names}
    return measure_costs(folders, dict.fromkeys(names, "print"), SETTING, lambda done, total: None)


def test_time_throughput_and_memory_of_each_model(asked):
    measured = run("teacher", "small")
    assert measured.costs == {
        "teacher": Cost(TIMINGS, 2000.0, 700, None),
        "small": Cost(TIMINGS, 2000.0, 500, None),
    }
    assert (asked["setting"]["rounds"], asked["setting"]["length"]) == (2, 16)
    assert measured.notes == ["Energy was not measured: there is no counter."]


def test_the_teacher_is_float32_and_the_others_as_their_files_are(asked):
    run("teacher", "small")
    assert asked["dtypes"] == {"teacher": (torch.float32, torch.float32), "small": (None, None)}


def test_a_model_that_cannot_be_run_is_left_out_and_the_others_are_measured(asked):
    measured = run("teacher", "broken", "small")
    assert measured.failures == {"broken": "no such op"}
    assert list(measured.costs) == ["teacher", "small"]
    assert asked["groups"] == [["teacher", "small"]]


def test_a_teacher_that_cannot_be_run_ends_it(asked):
    with pytest.raises(RunError, match="no such op"):
        run("broken", "small")


def test_groups_are_said_where_the_memory_does_not_hold_all(asked, monkeypatch):
    monkeypatch.setattr(costs, "memory_bytes", lambda field: 2000)  # of which 1400 are used
    measured = run("teacher", "small", "other", "last")
    assert asked["groups"] == [["teacher", "small"], ["teacher", "other"], ["teacher", "last"]]
    assert measured.notes[0].startswith("The memory does not hold all models at once: they were timed in 3")


def test_energy_is_measured_where_there_is_a_meter(asked, monkeypatch):
    class Meter:
        counts = "all of it"

    monkeypatch.setattr(costs, "find_meter", lambda device: (Meter(), Meter.counts))
    monkeypatch.setattr(costs, "joules_per_sequence", lambda folder, meter, **how: len(folder.name) / 10)
    measured = run("teacher", "small")
    assert [cost.joules for cost in measured.costs.values()] == [0.7, 0.5]
    assert measured.notes == ["Energy is that of a sequence at batch 1 on one thread: all of it."]


@pytest.mark.parametrize(
    ("models", "rounds", "expected"),
    [
        ({"teacher": 1}, 2, True),
        ({"teacher": 1, "small": 2}, 2, True),
        ({"teacher": 1, "small": 3}, 2, False),
        ({"teacher": 1, "new": 4}, 2, False),
        ({"teacher": 1}, 3, False),
    ],
)
def test_measurements_cover_the_same_models_measured_in_the_same_way(models, rounds, expected):
    measured = Measured(SETTING.key, {"teacher": 1, "small": 2}, {}, {}, [])
    assert measured.covers(Setting(16, rounds, "cpu").key, models) is expected
