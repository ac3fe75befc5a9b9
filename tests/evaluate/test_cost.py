"""Costs of models whose parameters, bytes and relative speed are known."""

import json
import time

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, DistilBertConfig, DistilBertForMaskedLM

from fastdistil.errors import RunError, UserError
from fastdistil.evaluate import bytes_on_disk, count_parameters, measure_latency, measure_peak_memory
from fastdistil.models.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification


def bert(vocab_size: int = 50, family: str = "Bert"):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        type_vocab_size=1 if family == "Roberta" else 2,
    )
    return getattr(transformers, f"{family}ForMaskedLM")(config)


def bilstm(vocab_size: int = 50) -> BiLSTMForSequenceClassification:
    config = BiLSTMConfig(vocab_size=vocab_size, embedding_size=16, hidden_size=8, fc_size=4, pairs=True)
    return BiLSTMForSequenceClassification(config)


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


def test_bytes_on_disk_of_an_exported_model_are_those_of_its_file_and_what_lies_beside_it(tmp_path):
    config = {"fastdistil": {"runtime": "onnxruntime", "file": "model.onnx"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no model\.onnx in it"):
        bytes_on_disk(tmp_path)
    for name, size in (("model.onnx", 100), ("model.onnx.data", 2000), ("tokenizer.json", 30_000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert bytes_on_disk(tmp_path) == 2100


def test_an_exported_model_has_the_parameters_that_it_was_made_of():
    exported = nn.Module()
    exported.num_parameters_ = 1234
    assert count_parameters(exported) == 1234


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


@pytest.mark.parametrize("make", [bert, bilstm])
def test_peak_memory_holds_the_encoders_weights_and_little_more(make, tmp_path):
    model = make(1_000_000)  # 64 MB of word embeddings, of which the pass reads eight rows
    model.save_pretrained(tmp_path)
    weights = 4 * count_parameters(model.base_model)
    peak = measure_peak_memory(tmp_path, batch_size=1, length=8)
    assert weights < peak < weights + (24 << 20)


def test_peak_memory_is_that_of_the_files_dtype_where_none_is_given(tmp_path):
    model = bert(1_000_000).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    weights = 2 * count_parameters(model.base_model)
    peak = measure_peak_memory(tmp_path, batch_size=1, length=8, dtype=None)
    assert weights < peak < weights + (24 << 20)


def test_peak_memory_of_a_compressed_model(tmp_path):
    replacements = pytest.importorskip("fastdistil.compress.replacements")
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForSequenceClassification(config)
    wide = {"intermediate": (16, 1_000_000), "output": (1_000_000, 16)}
    for name, (inside, outside) in wide.items():
        spec = {"kind": "linear", "in_features": inside, "out_features": outside}
        path = f"bert.encoder.layer.0.{name}.dense"
        replacements.replace(model, path, nn.Linear(inside, outside), spec)
    model.save_pretrained(str(tmp_path))
    weights = 4 * count_parameters(model)
    activations = 2 * 4 * 1_000_000  # the intermediate states of one token, and what GELU makes of them
    peak = measure_peak_memory(tmp_path, batch_size=1, length=1)
    assert weights < peak < weights + activations + (24 << 20)


@pytest.mark.parametrize(
    ("make", "types"),
    [
        (bert, [0, 0, 1, 1, 1]),
        (bilstm, [0, 0, 1, 1, 1]),
        (lambda: bert(family="Roberta"), None),
        (lambda: DistilBertForMaskedLM(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2)), None),
    ],
    ids=["bert", "bilstm", "roberta, of one type", "distilbert, which takes none"],
)
def test_half_of_a_timed_text_is_a_second_segment_where_token_types_are_taken(make, types):
    model, calls = make(), []
    model.base_model.register_forward_pre_hook(lambda *called: calls.append(called[2]), with_kwargs=True)
    measure_latency({"model": model}, batch_sizes=(2,), length=5, runs=1, warmup=0)
    (inputs,) = calls
    assert inputs["input_ids"].shape == (2, 5)
    found = inputs.get("token_type_ids")
    assert (None if found is None else found.tolist()) == (None if types is None else [types] * 2)


def test_a_folder_that_cannot_be_measured_is_one_line(tmp_path):
    with pytest.raises(RunError, match="peak memory could not be measured") as caught:
        measure_peak_memory(tmp_path)
    assert "\n" not in str(caught.value)
