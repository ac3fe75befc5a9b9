"""Squared error of two rows, plain or L2-normalised, and its gradient, with one read of each element.

One program a row, which stays in registers between the reductions and the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.pair_rows import EPS, launch, read_pair, write_row


@triton.jit
def hidden_mse_kernel(
    student,  # (N, D)
    teacher,  # (N, D)
    mask,  # (N,)
    scale,  # () or (N,)
    loss,  # (N,), out
    grad,  # (N, D), out
    student_pitch,
    teacher_pitch,
    grad_pitch,
    scale_stride,
    NORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    STUDENT_ALIGNED: tl.constexpr,  # every row starts at a multiple of 16 bytes
    TEACHER_ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # D, or more
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    s, t, counts = read_pair(
        student,
        teacher,
        mask,
        row,
        student_pitch,
        teacher_pitch,
        position,
        HAS_MASK,
        STUDENT_ALIGNED,
        TEACHER_ALIGNED,
        D,
        ACC,
    )
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(s * s, 0))
        inverse = 1.0 / tl.maximum(norm, EPS)
        s *= inverse
        t *= 1.0 / tl.maximum(tl.sqrt(tl.sum(t * t, 0)), EPS)
    error = s - t
    weight = tl.load(scale + row * scale_stride).to(ACC)
    tl.store(loss + row, tl.where(counts, weight * tl.sum(error * error, 0), 0.0))
    if WITH_GRAD:
        row_grad = error
        factor = 2.0 * weight
        if NORMALIZE:
            # The part along the student changes its norm alone; a norm below EPS is replaced by a constant.
            row_grad -= s * tl.where(norm > EPS, tl.sum(error * s, 0), 0.0)
            factor *= inverse
        # A scale that is not finite must not reach a row that does not count.
        row_grad = tl.where(counts, row_grad * factor, 0.0)
        write_row(grad, row, grad_pitch, position, row_grad, GRAD_ALIGNED, D)


def hidden_mse_fwd(
    student: Tensor,  # (N, D), as the teacher: dense in D, any row pitch
    teacher: Tensor,  # (N, D)
    mask: Tensor | None,  # (N,)
    scale: Tensor,  # () or (N,)
    normalize: bool,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return launch(hidden_mse_kernel, student, teacher, mask, scale, reduce, with_grad, NORMALIZE=normalize)
