"""Matrix products in a low precision whose results are not rounded to it, on the devices that can."""

from __future__ import annotations

import platform
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistil.ops.terms import accumulation_dtype

# A part of a product that is converted before the next one is computed; it stays in the second-level cache.
_PART_BYTES = 1 << 20


def native_bf16_products(device: torch.device) -> bool:
    """Whether `device` has instructions for matrix products in bfloat16, faster ones than in float32.

    An x86 CPU has them with AVX512-BF16 or AMX; oneDNN calls bfloat16 supported on any with AVX-512, where it
    emulates the products at a fraction of float32's speed.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Precision(NamedTuple):
    """In what the matrix products of one model run, and what their logits are stored in."""

    product: torch.dtype
    logits: torch.dtype


def precision(hidden: Tensor) -> Precision:
    """The products run in the hidden states' dtype where the device is fast at it, and their logits are not
    rounded.

    A CPU without bfloat16 units emulates the product many times slower than float32, and one with them has no
    product that returns float32.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return Precision(hidden.dtype, hidden.dtype)
    if hidden.device.type == "cuda":
        return Precision(hidden.dtype, torch.float32)
    if hidden.device.type == "cpu" and hidden.dtype is torch.bfloat16 and native_bf16_products(hidden.device):
        return Precision(torch.bfloat16, torch.bfloat16)
    return Precision(torch.float32, torch.float32)


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, rounded once, to out's dtype, where the device can."""
    add_mm(out, a, b, first=True)


def add_mm(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out += a @ b; the first time out = a @ b, which spares filling it with zeros."""
    beta = 0 if first else 1
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.device.type == "cuda" and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        # The product is rounded to its operands' dtype and added while a part of it is still in the cache.
        step = max(1, _PART_BYTES // (b.shape[1] * b.element_size()))
        part = a.new_empty(min(step, a.shape[0]), b.shape[1])
        for start in range(0, a.shape[0], step):
            rows = slice(start, start + step)
            product = torch.mm(a[rows], b, out=part[: len(a[rows])])
            if first:
                out[rows].copy_(product)
            else:
                out[rows].add_(product)


def unrounded_mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of operands in `dtype`, in its accumulation dtype; where the device cannot do that, of operands
    in the accumulation dtype."""
    accumulator = accumulation_dtype(dtype)
    with torch.autocast(a.device.type, enabled=False):
        if dtype != accumulator and a.device.type == "cuda":
            return torch.mm(a.to(dtype), b.to(dtype), out_dtype=accumulator)
        return a.to(accumulator) @ b.to(accumulator)
