"""int8 layers in a model: its outputs, its folder, the scales of its activations."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdistil.compress.int8_modules import Int8Embedding, Int8Linear, quantize
from fastdistil.compress.method import Calibration
from fastdistil.compress.quantize import (
    Int8Options,
    Int8StaticOptions,
    NoOptions,
    apply_dynamic,
    apply_embeddings,
    apply_static,
    layers_to_quantize,
)
from fastdistil.compress.quantize_torchao import calibrate
from fastdistil.evaluate.cost import count_parameters

Run = Callable[[Any], Tensor]
DYNAMIC = Int8Options(backend="torchao")
STATIC = Int8StaticOptions(backend="torchao")


def _relative_error(output: Tensor, expected: Tensor) -> float:
    return ((output - expected).norm() / expected.norm()).item()


def test_every_family_keeps_its_outputs(family: str, build: Any, run: Run) -> None:
    model = build(family)
    expected = run(model)
    assert _relative_error(run(apply_dynamic(model, DYNAMIC, None)), expected) < 0.04


def test_every_family_reloads_to_the_last_bit(family: str, build: Any, reload_equal: Any) -> None:
    reload_equal(apply_dynamic(build(family), DYNAMIC, None))


def test_static_keeps_outputs_and_reloads(
    tiny_bert: Any, run: Run, calibration: Calibration, reload_equal: Any
) -> None:
    expected = run(tiny_bert)
    model = apply_static(tiny_bert, STATIC, calibration)
    assert _relative_error(run(model), expected) < 0.08
    scale = reload_equal(model).bert.pooler.dense.input_scale
    assert scale == model.bert.pooler.dense.input_scale > 0


def test_the_folder_holds_int8(tiny_bert: Any, save: Callable[..., Path]) -> None:
    weights = load_file(save(apply_dynamic(tiny_bert, DYNAMIC, None)) / "model.safetensors")
    # The linear layers' weights and both tables of 16 rows and more are int8.
    plain = 2 * (4 * 32 * 32 + 2 * 32 * 48) + 32 * 32 + (100 + 40) * 32
    assert sum(tensor.numel() for tensor in weights.values() if tensor.dtype == torch.int8) == plain
    largest_float = max(tensor.numel() for tensor in weights.values() if tensor.dtype == torch.float32)
    assert largest_float == 100  # the scales of the word embeddings


def test_parameters_are_counted_as_before(tiny_bert: Any) -> None:
    before = count_parameters(tiny_bert)
    assert count_parameters(apply_dynamic(tiny_bert, DYNAMIC, None)) == before


def test_embeddings_can_stay_in_float(tiny_bert: Any) -> None:
    model = apply_dynamic(tiny_bert, Int8Options(backend="torchao", embeddings=False), None)
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding
    assert isinstance(model.bert.pooler.dense, Int8Linear)


def test_embeddings_alone(tiny_bert: Any, reload_equal: Any, run: Run) -> None:
    expected = run(tiny_bert)
    model = apply_embeddings(tiny_bert, NoOptions(), None)
    assert _relative_error(run(model), expected) < 0.02
    assert isinstance(model.bert.embeddings.word_embeddings, Int8Embedding)
    assert type(model.bert.pooler.dense) is nn.Linear
    reload_equal(model)


def test_tied_matrices_stay_in_float(build: Any) -> None:
    model = build("bert", "MaskedLM")
    paths = layers_to_quantize(model, embeddings=True)
    assert "bert.embeddings.position_embeddings" in paths
    assert not {"bert.embeddings.word_embeddings", "cls.predictions.decoder"} & {*paths}


class _Lookup(nn.Module):
    """A linear layer whose inputs are the rows of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.linear = nn.Linear(table.shape[1], 3)

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.linear(self.table[input_ids])


def test_calibration_takes_the_best_of_its_scales() -> None:
    table = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    table[2500, 3] = -6  # in the second batch
    batches: Any = [SimpleNamespace(inputs={"input_ids": ids}) for ids in torch.arange(4000).view(2, -1)]
    scale = calibrate(_Lookup(table), ["linear"], batches)["linear"]
    errors = {}
    for step in range(4, 17):
        tried = table.abs().max() / 127 * step / 16
        errors[step] = (quantize(table, tried) * tried - table).double().square().sum().item()
    best = min(errors, key=errors.__getitem__)
    torch.testing.assert_close(scale, table.abs().max() / 127 * best / 16)
    assert best < 16  # one outlier does not set it


def test_calibration_leaves_no_hook(tiny_bert: Any, calibration: Calibration) -> None:
    calibrate(tiny_bert, layers_to_quantize(tiny_bert, embeddings=False), calibration.batches)
    assert not any(module._forward_pre_hooks for module in tiny_bert.modules())


def test_int8_after_low_rank(tiny_bert: Any, run: Run, reload_equal: Any) -> None:
    from fastdistil.compress.low_rank import LowRankOptions, low_rank

    model = low_rank(tiny_bert, LowRankOptions(ratio=0.7), None)
    expected = run(model)
    model = apply_dynamic(model, DYNAMIC, None)
    assert _relative_error(run(model), expected) < 0.06
    assert isinstance(model.bert.encoder.layer[0].intermediate.dense.up, Int8Linear)
    reload_equal(model)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_int8_after_sharing_keeps_layers_shared(family: str, build: Any, run: Run, reload_equal: Any) -> None:
    from fastdistil.compress.share_layers import ShareLayersOptions, share_layers

    model = share_layers(build(family), ShareLayersOptions(groups=1, init="first"), None)
    expected, parameters = run(model), count_parameters(model)
    model = apply_dynamic(model, DYNAMIC, None)
    assert _relative_error(run(model), expected) < 0.04
    assert count_parameters(reload_equal(model)) == parameters


def test_int8_after_factorised_embeddings(tiny_bert: Any, run: Run, reload_equal: Any) -> None:
    from fastdistil.compress.factorize_embeddings import METHODS

    (method,) = METHODS
    model = method.apply(tiny_bert, method.options.model_validate({"rank": 12}), None)
    expected = run(model)
    model = apply_dynamic(model, DYNAMIC, None)
    assert _relative_error(run(model), expected) < 0.04
    reload_equal(model)
