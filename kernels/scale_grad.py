"""A gradient times the upstream gradient, in place.

Where that is 1, as after `loss.backward()`, nothing is touched; it is decided on the device, so that the host
does not wait.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.online_softmax import ALIGNMENT, phase

BLOCK = 2048
# A fixed number of programs share the blocks: where there is nothing to do, few have to find it out.
PROGRAMS = 2048


@triton.jit
def _scale_block(
    start,  # of the block
    position,
    factor,
    valid,
    ACC: tl.constexpr,
):
    x = tl.load(start + position, mask=valid)
    tl.store(start + position, (x.to(ACC) * factor).to(x.dtype), mask=valid)


@triton.jit(do_not_specialize=["base_shift"])
def scale_grad_kernel(
    grad,  # (N, D), in and out
    scale,  # () or (N,)
    base_shift,  # elements from an aligned address to the first
    rows,
    width,  # D
    pitch,
    scale_stride,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(width + ALIGNMENT - 1, BLOCK).to(tl.int64)
    for index in range(tl.program_id(0).to(tl.int64), rows * blocks, tl.num_programs(0)):
        row, block = index // blocks, index % blocks
        factor = tl.load(scale + row * scale_stride).to(ACC)
        if factor != 1.0:
            # Blocks begin at aligned addresses; all but the row's first and last lie inside it.
            shift = (base_shift + row * pitch) % ALIGNMENT
            start = tl.multiple_of(grad + (row * pitch - shift + block * BLOCK), 16)
            position = tl.arange(0, BLOCK)
            first, end = shift - block * BLOCK, shift + width - block * BLOCK
            if (first <= 0) & (end >= BLOCK):
                _scale_block(start, position, factor, None, ACC)
            else:
                _scale_block(start, position, factor, (position >= first) & (position < end), ACC)


def compile_options(hip: bool) -> dict[str, int | bool]:
    # 16 elements a thread; fusion is stated because its default differs between versions of Triton.
    return {"num_warps": 2 if hip else 4, "enable_fp_fusion": True}


def scale_grad_(
    grad: Tensor,  # (N, D)
    scale: Tensor,  # () or (N,)
) -> None:
    if grad.numel() == 0:
        return
    rows, width = grad.shape
    if scale.dim() == 0 and grad.is_contiguous():
        rows, width = 1, grad.numel()
    blocks = rows * triton.cdiv(width + ALIGNMENT - 1, BLOCK)
    accumulator = tl.float64 if torch.float64 in (grad.dtype, scale.dtype) else tl.float32
    with torch.cuda.device(grad.device) if grad.is_cuda else contextlib.nullcontext():
        scale_grad_kernel[(min(blocks, PROGRAMS),)](
            grad,
            scale,
            phase(grad),
            rows,
            width,
            grad.stride(0),
            scale.stride(0) if scale.dim() else 0,
            BLOCK=BLOCK,
            ALIGNMENT=ALIGNMENT,
            ACC=accumulator,
            **compile_options(torch.version.hip is not None),
        )
