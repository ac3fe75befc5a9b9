"""Quantisation-aware training: layers that compute in float what their int8 form will compute.

On the way forward each weight and each activation is rounded to the values that int8 can hold. The gradient
passes the rounding as if it were not there (the straight-through estimator; Jacob et al. 2018, section 3).
The ranges are those of the values, so nothing is clipped and the estimator is the identity everywhere.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistil.compress.int4_blocks import dequantize_blocks, quantize_blocks
from fastdistil.compress.int8_modules import quantize, row_scale
from fastdistil.compress.replacements import drop, replace, replacement, replacements

_UINT8_MAX = 255

# What shares one scale. "row": a token's activations, a row of a table, as in `int8_modules`. "tensor": the
# activations of a forward pass, the whole table, in uint8 with a zero point, as in ONNX Runtime. Both
# have one for each row of a weight. "block": of a table with 4 bits, as in `int4_blocks`.
Scales = Literal["row", "tensor", "block"]


def fake_quantize_rows(x: Tensor) -> Tensor:
    """What the int8 form of each row stands for; its gradient is that of `x`."""
    with torch.no_grad():
        scale = row_scale(x)
        coded = (quantize(x, scale) * scale).to(x.dtype)
    return _straight_through(x, coded)


def fake_quantize_tensor(x: Tensor, whole: Tensor | None = None) -> Tensor:
    """The same in uint8, with the scale and zero point of ONNX's DynamicQuantizeLinear for all of `whole`.

    Args:
        whole: what `x` is a part of; default `x` itself.
    """
    with torch.no_grad():
        low, high = torch.aminmax(x if whole is None else whole)
        low, high = low.float().clamp_max(0), high.float().clamp_min(0)
        scale = ((high - low) / _UINT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round()
        levels = ((x / scale).round() + zero).clamp(0, _UINT8_MAX)
        coded = ((levels - zero) * scale).to(x.dtype)
    return _straight_through(x, coded)


def fake_quantize_blocks(x: Tensor) -> Tensor:
    """What the 4-bit form of each row stands for; its gradient is that of `x`."""
    with torch.no_grad():
        coded = dequantize_blocks(*quantize_blocks(x)).to(x.dtype)
    return _straight_through(x, coded)


def _straight_through(x: Tensor, coded: Tensor) -> Tensor:
    # x - x is exactly 0, so that the value is that of `coded` to the last bit.
    return coded + (x - x.detach())


class FakeInt8Linear(nn.Linear):
    """`nn.Linear` over the parameters of another, its weight and its input rounded to int8."""

    def __init__(self, linear: nn.Linear, scales: Scales) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.scales = scales
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        rounded = fake_quantize_rows(x) if self.scales == "row" else fake_quantize_tensor(x)
        return F.linear(rounded, fake_quantize_rows(self.weight), self.bias)

    def float_module(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


class FakeInt8Embedding(nn.Embedding):
    """`nn.Embedding` over the table of another, its values rounded to int8, or with "block" to 4 bits."""

    def __init__(self, embedding: nn.Embedding, scales: Scales) -> None:
        rows, width = embedding.weight.shape
        super().__init__(rows, width, embedding.padding_idx, device="meta")
        self.weight = embedding.weight
        self.scales = scales
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight, self.padding_idx)
        if self.scales == "tensor":
            return fake_quantize_tensor(rows, self.weight)
        return fake_quantize_rows(rows) if self.scales == "row" else fake_quantize_blocks(rows)

    def float_module(self) -> nn.Embedding:
        rows, width = self.weight.shape
        embedding = nn.Embedding(rows, width, self.padding_idx, device="meta")
        embedding.weight = self.weight
        return embedding.train(self.training)


@replacement("fake_int8")
def _build(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return FakeInt8Embedding(module, spec["scales"])
    linear: Any = module
    return FakeInt8Linear(linear, spec["scales"])


def add_fake_quantisation(model: Any, paths: list[str], scales: Scales) -> Any:
    """`model`, its linear layers and embeddings at `paths` replaced; the parameters stay the same objects."""
    for path in paths:
        spec = {"kind": "fake_int8", "scales": scales}
        replace(model, path, _build(model.get_submodule(path), spec), spec)
    return model


def remove_fake_quantisation(model: Any) -> list[str]:
    """Puts the float layers back, and returns their paths."""
    paths = [path for path, spec in replacements(model) if spec["kind"] == "fake_int8"]
    for path in paths:
        drop(model, path, "fake_int8", model.get_submodule(path).float_module())
    return paths
