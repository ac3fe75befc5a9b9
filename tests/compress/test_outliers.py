"""Large input channels outside the int8 product."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistil.compress.int8_modules import Int8Linear
from fastdistil.compress.method import Calibration
from fastdistil.compress.outliers import OutlierLinear, separate_outliers
from fastdistil.compress.quantize import Int8Options, apply_dynamic, layers_to_quantize

Run = Callable[[Any], Tensor]
FFN = "bert.encoder.layer.1.intermediate.dense"


@pytest.fixture
def outlying(tiny_bert: Any) -> Any:
    """A BERT whose second layer's norm makes one channel of the FFN's input far larger than all others."""
    with torch.no_grad():
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


def test_the_outlying_channel_is_found_and_the_model_computes_the_same(
    outlying: Any, calibration: Calibration, run: Run, reload_equal: Any
) -> None:
    expected = run(outlying)
    separate_outliers(outlying, layers_to_quantize(outlying, embeddings=False), calibration.batches)
    assert outlying.get_submodule(FFN).channels == (7,)
    torch.testing.assert_close(run(outlying), expected, rtol=1e-5, atol=1e-5)
    reload_equal(outlying)


def test_a_layer_without_outliers_is_left_alone(tiny_bert: Any, calibration: Calibration) -> None:
    separate_outliers(tiny_bert, [FFN], calibration.batches)
    assert type(tiny_bert.get_submodule(FFN)) is nn.Linear


def test_int8_of_the_other_channels_is_an_order_closer() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(20, 64)
    x[:, 7] *= 200
    truth = x.double() @ linear.weight.double().t() + linear.bias.double()
    split = OutlierLinear(linear, [7])
    split.linear = Int8Linear.from_linear(split.linear)
    plain = Int8Linear.from_linear(linear)
    assert (split(x) - truth).norm() < 0.1 * (plain(x) - truth).norm()


@pytest.mark.parametrize("apart", [True, False])
def test_int8_takes_outliers_apart_if_wanted(
    apart: bool, outlying: Any, calibration: Calibration, reload_equal: Any
) -> None:
    options = Int8Options(backend="torchao", outliers=apart)
    loaded = reload_equal(apply_dynamic(outlying, options, calibration))
    layer = loaded.get_submodule(FFN)
    assert isinstance(layer, OutlierLinear) == apart
    assert isinstance(layer.linear if apart else layer, Int8Linear)
