"""Turns, threads and groups of a measurement, on models whose time is known beforehand."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig

from fastdistil.compare import measure as module
from fastdistil.compare.measure import joules_per_sequence, measure, memory_groups, throughput, whole_inputs
from fastdistil.compare.results import Timing


class Fake(nn.Module):
    """Notes whose turn it was, with the threads it had and its batch size."""

    def __init__(self, name: str, calls: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.config, self.device = BertConfig(vocab_size=50), torch.device("cpu")

    @property
    def base_model(self) -> "Fake":
        return self

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        assert torch.is_inference_mode_enabled()
        assert input_ids.shape == attention_mask.shape
        self.calls.append((self.name, torch.get_num_threads(), len(input_ids)))


class OtherRuntime(Fake):
    def set_threads(self, count: int) -> None:
        self.calls.append((self.name, -count, 0))


@pytest.fixture
def threads() -> Iterator[int]:
    """Three threads, so that one and all differ on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Seconds of a pass of each model; a list is used up."""
    seconds: dict[str, Any] = {}

    def time_forward(model: Fake, inputs: dict[str, torch.Tensor]) -> float:
        model(**{key: inputs[key] for key in ("input_ids", "attention_mask")})
        taken = seconds.get(model.name, 0.001)
        return taken.pop(0) if isinstance(taken, list) else taken

    monkeypatch.setattr(module, "time_forward", time_forward)
    return seconds


def fakes(calls: list[tuple[str, int, int]], kind: type[Fake] = Fake) -> dict[str, Any]:
    return {"load": lambda folder: kind(str(folder), calls), "length": 6}


def folders(*names: str) -> dict[str, Path]:
    return {name: Path(name) for name in names}


def test_one_timing_for_each_number_of_threads_and_batch_size(threads, clock):
    found = measure(folders("a", "b"), rounds=1, passes=1, **fakes([]))
    for name in ("a", "b"):
        assert [(t.threads, t.batch_size, t.length) for t in found[name]] == [
            (1, 1, 6),
            (1, 8, 6),
            (threads, 1, 6),
            (threads, 8, 6),
        ]


def test_one_thread_that_is_all_is_measured_once(clock):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure(folders("a"), rounds=1, passes=1, batch_sizes=(2,), **fakes([]))
    finally:
        torch.set_num_threads(before)
    assert [(t.threads, t.batch_size) for t in found["a"]] == [(1, 2)]


def test_every_model_has_one_turn_a_round_in_an_order_that_is_drawn_anew(threads, clock):
    calls: list[tuple[str, int, int]] = []
    rounds, passes = 6, 2
    measure(
        folders("a", "b", "c"), rounds=rounds, passes=passes, threads=(2,), batch_sizes=(4,), **fakes(calls)
    )
    assert {call[1:] for call in calls} == {(2, 4)}
    turns = [[call[0] for call in calls[i : i + passes + 1]] for i in range(0, len(calls), passes + 1)]
    assert all(len(set(turn)) == 1 for turn in turns)
    orders = ["".join(turn[0] for turn in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(orders) == rounds + 1
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2


def test_the_order_is_the_same_whenever_it_is_drawn(threads, clock):
    first: list[tuple[str, int, int]] = []
    second: list[tuple[str, int, int]] = []
    for calls in (first, second):
        random.seed(len(calls))
        measure(folders("a", "b", "c"), rounds=5, passes=1, **fakes(calls))
    assert first == second


def test_quantiles_leave_out_the_first_round_and_the_first_pass_of_a_turn(threads, clock):
    warm_up = [9.0, 9.0, 9.0]
    clock["a"] = [*warm_up, 9.0, 0.001, 0.002, 9.0, 0.003, 0.004]
    found = measure(folders("a"), rounds=2, passes=2, threads=(1,), batch_sizes=(1,), **fakes([]))
    (timing,) = found["a"]
    assert timing.p50_ms == pytest.approx(2.5)
    assert timing.p95_ms == pytest.approx(3.85)  # linear between 3 and 4 ms: 0.95 * 3 = 2.85
    assert clock["a"] == []


def test_another_runtime_is_told_the_threads(threads, clock):
    calls: list[tuple[str, int, int]] = []
    measure(folders("a"), rounds=1, passes=1, batch_sizes=(1,), **fakes(calls, OtherRuntime))
    assert [call[1] for call in calls if call[1] < 0] == [-1, -threads]


def test_threads_are_put_back_even_after_a_failure(threads, clock):
    measure(folders("a"), rounds=1, passes=1, **fakes([]))
    assert torch.get_num_threads() == threads
    clock["a"] = []
    with pytest.raises(IndexError):
        measure(folders("a"), rounds=1, passes=1, **fakes([]))
    assert torch.get_num_threads() == threads


def test_a_later_group_is_put_on_the_scale_of_the_first_by_its_reference(threads, clock):
    # The machine is three times as slow while the second group is measured.
    clock.update(a=[0.010] * 4 + [0.030] * 4, b=0.004, c=0.006)
    found = measure(
        folders("a", "b", "c"),
        rounds=1,
        passes=1,
        threads=(1,),
        batch_sizes=(1,),
        groups=[["a", "b"], ["a", "c"]],
        **fakes([]),
    )
    assert [found[name][0].p50_ms for name in "abc"] == pytest.approx([10, 4, 2])
    assert [len(found[name]) for name in "abc"] == [1, 1, 1]


def test_progress_counts_all_rounds(threads, clock):
    seen: list[tuple[int, int]] = []
    measure(
        folders("a", "b"), rounds=2, passes=1, progress=lambda *counted: seen.append(counted), **fakes([])
    )
    assert seen == [(i, 12) for i in range(1, 13)]  # 2 numbers of threads, 2 batch sizes, 3 rounds


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [
        ({"t": 4, "a": 2, "b": 2}, None, [["t", "a", "b"]]),
        ({"t": 4, "a": 2, "b": 2}, 8, [["t", "a", "b"]]),
        ({"t": 4, "a": 2, "b": 2, "c": 1}, 7, [["t", "a"], ["t", "b", "c"]]),
        ({"t": 4, "a": 9, "b": 1}, 7, [["t", "a"], ["t", "b"]]),  # a fits nowhere
        ({"t": 4}, 1, [["t"]]),
    ],
)
def test_groups_hold_what_fits_beside_the_first(sizes, budget, expected):
    assert memory_groups(sizes, budget) == expected


def test_throughput_is_that_of_the_largest_batch_on_all_threads():
    timings = [Timing(1, 128, 1, 5, 6), Timing(8, 128, 1, 40, 41), Timing(8, 128, 4, 16, 20)]
    assert throughput([*timings, Timing(1, 128, 4, 2, 3)]) == pytest.approx(500)


class Counter:
    counts = "calls"

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def start(self) -> None:
        self.first = len(self.calls)

    def joules(self) -> float:
        return 0.5 * (len(self.calls) - self.first)


def test_joules_are_divided_by_every_pass_since_the_start(threads, clock):
    calls: list[tuple[str, int, int]] = []
    found = joules_per_sequence(Path("a"), Counter(calls), seconds=0.01, **fakes(calls))
    assert found == pytest.approx(0.5)
    assert {call[1:] for call in calls} == {(1, 1)}
    assert torch.get_num_threads() == threads


def tiny(auto: str) -> Any:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    return getattr(transformers, auto)(config).eval()


@pytest.mark.parametrize(
    ("auto", "shape"),
    [("BertForSequenceClassification", (2, 3)), ("BertForMultipleChoice", (2, 1))],
)
def test_the_head_is_run_too(auto, shape):
    model = tiny(auto)
    output = model(**whole_inputs(model, 2, 8))
    assert output.logits.shape == shape


def test_folders_are_loaded_and_timed(tmp_path):
    pytest.importorskip("fastdistil.compress.store")
    tiny("BertForSequenceClassification").save_pretrained(str(tmp_path / "tiny"))
    found = measure({"tiny": tmp_path / "tiny"}, rounds=2, passes=1, threads=(1,), batch_sizes=(1,), length=8)
    (timing,) = found["tiny"]
    assert 0 < timing.p50_ms <= timing.p95_ms
