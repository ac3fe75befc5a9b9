"""Costs of models whose parameters, bytes and relative speed are known."""

import time

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from fastdistil.errors import RunError, UserError
from fastdistil.evaluate import bytes_on_disk, count_parameters, measure_latency, measure_peak_memory


def bert(hidden_size: int = 16, vocab_size: int = 50) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=hidden_size,
        )
    )


def test_tied_weights_count_once():
    model = bert()
    encoder = sum(p.numel() for p in model.bert.parameters())
    assert count_parameters(model) == encoder + (16 * 16 + 16) + 2 * 16 + 50


def test_bytes_on_disk_are_those_of_the_weights(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    data = 4 * count_parameters(model)
    assert data < bytes_on_disk(tmp_path) < data + 8192
    with pytest.raises(UserError, match="no safetensors weights"):
        bytes_on_disk(tmp_path / "nothing")


class Sleeper(nn.Module):
    """Stands in for an encoder that takes a known time; records whose turn it was."""

    def __init__(self, name: str, seconds: float, turns: list[tuple[str, int]]) -> None:
        super().__init__()
        self.name, self.seconds, self.turns = name, seconds, turns
        self.config, self.device = BertConfig(vocab_size=50), torch.device("cpu")

    @property
    def base_model(self) -> "Sleeper":
        return self

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        assert not self.training
        assert input_ids.shape == attention_mask.shape
        self.turns.append((self.name, len(input_ids)))
        # One slow run in ten: the median must not see it, the 95th percentile must.
        slow = sum(turn == self.turns[-1] for turn in self.turns) % 10 == 0
        time.sleep(self.seconds * (10 if slow else 1))


def test_latency_quantiles_of_models_that_take_turns():
    turns: list[tuple[str, int]] = []
    models = {"fast": Sleeper("fast", 0.002, turns), "slow": Sleeper("slow", 0.006, turns)}
    result = measure_latency(models, batch_sizes=(1, 8), length=4, runs=10, warmup=1)

    assert turns[:22] == [("fast", 1), ("slow", 1)] * 11
    assert turns[22:] == [("fast", 8), ("slow", 8)] * 11
    for name, seconds in (("fast", 0.002), ("slow", 0.006)):
        for latency, batch_size in zip(result[name], (1, 8), strict=True):
            assert (latency.batch_size, latency.length, latency.runs) == (batch_size, 4, 10)
            assert latency.threads == torch.get_num_threads()
            assert latency.p50_ms >= 1000 * seconds
            assert latency.p95_ms > 4 * 1000 * seconds
        assert result[name][0].p50_ms < result[name][0].p95_ms
    assert all(model.training for model in models.values())


def test_latency_runs_a_real_encoder():
    (latency,) = measure_latency({"bert": bert()}, batch_sizes=(2,), length=8, runs=2, warmup=1)["bert"]
    assert 0 < latency.p50_ms <= latency.p95_ms


def test_peak_memory_holds_the_weights_and_little_more(tmp_path):
    model = bert(vocab_size=500_000)
    model.save_pretrained(tmp_path)
    weights = 4 * count_parameters(model)
    peak = measure_peak_memory(tmp_path, batch_size=1, length=8)
    assert weights < peak < weights + (24 << 20)


def test_a_folder_that_cannot_be_measured_is_one_line(tmp_path):
    with pytest.raises(RunError, match="peak memory could not be measured") as caught:
        measure_peak_memory(tmp_path)
    assert "\n" not in str(caught.value)
