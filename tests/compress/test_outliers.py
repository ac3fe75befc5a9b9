"""Large input channels outside the int8 product."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistil.compress.inputs import watch_inputs
from fastdistil.compress.int8_modules import Int8Linear
from fastdistil.compress.method import Calibration
from fastdistil.compress.outliers import OutlierLinear, ScaledLinear, separate_outliers
from fastdistil.compress.quantize import Int8Options, apply_dynamic, layers_to_quantize

Run = Callable[[Any], Tensor]
FFN = "bert.encoder.layer.1.intermediate.dense"
QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def outlying(tiny_bert: Any) -> Any:
    """A BERT with norms that make one input far larger than all others: of the second layer's attention,
    which has as many outputs as inputs, and of its feed-forward network, which has more."""
    with torch.no_grad():
        tiny_bert.bert.encoder.layer[0].output.LayerNorm.bias[5] = 40
        tiny_bert.bert.encoder.layer[1].attention.output.LayerNorm.bias[7] = 40
    return tiny_bert


@pytest.mark.parametrize("channels", [[4], [0, 6]])
@pytest.mark.parametrize("bias", [True, False])
def test_product_in_two_parts_is_the_product(channels: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(7, 5, bias=bias), torch.randn(3, 2, 7)
    split = OutlierLinear(linear, channels)
    torch.testing.assert_close(split(x), linear(x))
    assert split.linear.weight[:, channels].abs().max() == 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_scale_of_powers_of_two_rounds_nothing(bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(7, 9, bias=bias), torch.randn(3, 2, 7)
    scaled = ScaledLinear(linear, torch.tensor([1.0, 1, 8, 1, 1, 2, 1]))
    assert torch.equal(scaled(x), linear(x))
    assert torch.equal(scaled.linear.weight[:, 2], 8 * linear.weight[:, 2])


def test_outlying_channels_are_found_and_the_model_computes_the_same(
    outlying: Any, calibration: Calibration, run: Run, reload_equal: Any
) -> None:
    expected, seen = run(outlying), []
    watch_inputs(outlying, [FFN], calibration.batches, lambda path, x: seen.append(x.abs().amax((0, 1))))
    separate_outliers(outlying, layers_to_quantize(outlying, embeddings=False), calibration.batches)
    assert outlying.get_submodule(QUERY).channels == (5,)
    scale = outlying.get_submodule(FFN).scale
    assert scale.log2().nonzero().flatten().tolist() == [7]
    first, _, third = torch.stack(seen).amax(0).topk(3).values
    assert scale[7] == 2 ** round(0.75 * math.log2(first / third)) > 4
    torch.testing.assert_close(run(outlying), expected, rtol=1e-5, atol=1e-5)
    reload_equal(outlying)


def test_a_layer_without_outliers_is_left_alone(tiny_bert: Any, calibration: Calibration) -> None:
    separate_outliers(tiny_bert, [FFN], calibration.batches)
    assert type(tiny_bert.get_submodule(FFN)) is nn.Linear


def test_int8_without_the_outlier_is_closer() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(20, 64)
    x[:, 7] *= 200
    truth = x.double() @ linear.weight.double().t() + linear.bias.double()

    def error(layer: Any) -> float:
        if layer is linear:
            layer = Int8Linear.from_linear(layer)
        else:
            layer.linear = Int8Linear.from_linear(layer.linear)
        return float((layer(x) - truth).norm())

    scale = torch.ones(64)
    scale[7] = 64
    assert error(OutlierLinear(linear, [7])) < 0.1 * error(linear)
    assert error(ScaledLinear(linear, scale)) < 0.5 * error(linear)


@pytest.mark.parametrize("apart", [True, False])
def test_int8_takes_outliers_apart_if_wanted(
    apart: bool, outlying: Any, calibration: Calibration, reload_equal: Any
) -> None:
    options = Int8Options(backend="torchao", outliers=apart)
    loaded = reload_equal(apply_dynamic(outlying, options, calibration))
    for path, kind in ((QUERY, OutlierLinear), (FFN, ScaledLinear)):
        layer = loaded.get_submodule(path)
        assert isinstance(layer, kind) == apart
        assert isinstance(layer.linear if apart else layer, Int8Linear)
