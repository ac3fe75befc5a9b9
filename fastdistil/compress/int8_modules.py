"""Linear layers and embeddings that are stored as int8 and multiplied as int8.

The scheme is torchao's `Int8DynamicActivationInt8WeightConfig`: symmetric, round to nearest, one scale for
each output channel of a weight and one for each token of the activations,

    y = s_x s_w (x_q W_qᵀ) + b,   x_q = round(x / s_x),   s_x = max|x| / 127   (Jacob et al. 2018, eq. 5).

The stored tensors are the int8 ones, so a folder's bytes are those of the coding.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistil.compress.replacements import replacement

LEVELS = 127  # of either sign: -128 is left out, so that a weight and its negative are coded alike


def row_scale(x: Tensor) -> Tensor:  # (..., K) -> (..., 1)
    """float32 max|x| / 127 of each row; the smallest normal number where that is 0."""
    scale = x.abs().amax(dim=-1, keepdim=True).float() / LEVELS
    return scale.clamp_min(torch.finfo(torch.float32).tiny)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """int8 round(x / scale), which saturates at ±127."""
    return (x / scale).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


class Int8Linear(nn.Module):
    """`nn.Linear` with an int8 weight and int8 activations.

    Attributes:
        weight_int8: (N, K) int8.
        weight_scale: (N,) float32.
        bias: (N,), or None.
        input_scale: () float32, the one scale of all activations (static), or None: one for each token, taken
            from its values (dynamic).
    """

    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None, *, static: bool, device: Any
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        empty = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight_int8 = nn.Parameter(empty, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(out_features, device=device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_buffer("input_scale", torch.empty((), device=device) if static else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, input_scale: Tensor | None = None) -> "Int8Linear":
        weight = linear.weight.detach()
        outputs, inputs = weight.shape
        static = input_scale is not None
        module = cls(inputs, outputs, linear.bias, static=static, device=weight.device)
        scale = row_scale(weight)
        module.weight_int8.copy_(quantize(weight, scale))
        module.weight_scale.copy_(scale[:, 0])
        if module.input_scale is not None and input_scale is not None:
            module.input_scale.copy_(input_scale)
        return module.eval()

    @property
    def weight(self) -> Tensor:
        """(N, K) float32, what the int8 weight stands for."""
        return self.weight_int8 * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        rows = x.reshape(-1, self.in_features)
        scale = row_scale(rows) if self.input_scale is None else self.input_scale
        product = scaled_product(quantize(rows, scale), self.weight_int8, scale)
        product = product.mul_(self.weight_scale)
        if self.bias is not None:
            product = product.add_(self.bias)
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        mode = "dynamic" if self.input_scale is None else "static"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {mode}"


class Int8Embedding(nn.Module):
    """`nn.Embedding` with an int8 table and a float32 scale for each of its rows."""

    weight_scale: Tensor

    def __init__(self, rows: int, width: int, padding_idx: int | None, *, dtype: torch.dtype, device: Any):
        super().__init__()
        self.num_embeddings = rows
        self.embedding_dim = width
        self.padding_idx = padding_idx
        self._dtype = dtype
        empty = torch.empty(rows, width, dtype=torch.int8, device=device)
        self.weight_int8 = nn.Parameter(empty, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(rows, 1, device=device))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "Int8Embedding":
        weight = embedding.weight.detach()
        rows, width = weight.shape
        module = cls(rows, width, embedding.padding_idx, dtype=weight.dtype, device=weight.device)
        scale = row_scale(weight)
        module.weight_int8.copy_(quantize(weight, scale))
        module.weight_scale.copy_(scale)
        return module.eval()

    @property
    def weight(self) -> Tensor:
        """(V, D) float, what the int8 table stands for."""
        return (self.weight_int8 * self.weight_scale).to(self._dtype)

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., D)
        # Only the rows that are read are decoded.
        rows = F.embedding(ids, self.weight_int8) * F.embedding(ids, self.weight_scale)
        return rows.to(self._dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


@replacement("int8_linear")
def _build_linear(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    linear: Any = module
    return Int8Linear(
        linear.in_features,
        linear.out_features,
        linear.bias,
        static=spec["static"],
        device=linear.weight.device,
    )


@replacement("int8_embedding")
def _build_embedding(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    table: Any = module
    weight = table.weight
    rows, width = weight.shape
    return Int8Embedding(rows, width, table.padding_idx, dtype=weight.dtype, device=weight.device)


def scaled_product(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """float32 scale · (a bᵀ), the sums in int32.

    On a CPU with VNNI by `torch._int_mm`, which torchao's kernel wraps in a conversion of `a` to uint8; on a
    GPU by torchao's kernel. Elsewhere the product of the same numbers in float32, which is exact while
    K · 127² < 2²⁴: without VNNI, `torch._int_mm` may saturate its sums.

    Args:
        a: (M, K) int8.
        b: (N, K) int8.
        scale: (M, 1) or () float32.
    """
    if a.device.type == "cuda" and _has_torchao():
        from torchao.kernel import int_scaled_matmul

        return int_scaled_matmul(a, b.t(), scale.expand(len(a), 1).contiguous())
    if a.device.type == "cpu" and _has_vnni():
        return torch._int_mm(a, b.t()).float().mul_(scale)
    return F.linear(a.float(), b.float()).mul_(scale)


@cache
def _has_torchao() -> bool:
    from importlib.util import find_spec

    return find_spec("torchao") is not None


@cache
def _has_vnni() -> bool:
    return torch.cpu._is_vnni_supported()
