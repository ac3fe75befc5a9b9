"""1 - cosine similarity of two rows, and its gradient, with one read of each element.

One program a row, which stays in registers between the reductions and the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.pair_rows import EPS, launch, read_pair, write_row


@triton.jit
def cosine_loss_kernel(
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
    s_norm = tl.sqrt(tl.sum(s * s, 0))
    inverse_s = 1.0 / tl.maximum(s_norm, EPS)
    inverse_t = 1.0 / tl.maximum(tl.sqrt(tl.sum(t * t, 0)), EPS)
    cos = tl.sum(s * t, 0) * inverse_s * inverse_t
    weight = tl.load(scale + row * scale_stride).to(ACC)
    tl.store(loss + row, tl.where(counts, weight * (1.0 - cos), 0.0))
    if WITH_GRAD:
        # A norm below EPS is replaced by a constant, and then only the teacher's direction is left.
        along_student = tl.where(s_norm > EPS, weight * cos * inverse_s * inverse_s, 0.0)
        along_teacher = weight * inverse_s * inverse_t
        row_grad = s * along_student - t * along_teacher
        write_row(grad, row, grad_pitch, position, row_grad, GRAD_ALIGNED, D)


def cosine_loss_fwd(
    student: Tensor,  # (N, D), as the teacher: dense in D, any row pitch
    teacher: Tensor,  # (N, D)
    mask: Tensor | None,  # (N,)
    scale: Tensor,  # () or (N,)
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return launch(cosine_loss_kernel, student, teacher, mask, scale, reduce, with_grad)
