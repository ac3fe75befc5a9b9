"""Squared error of two rows, plain or L2-normalised, and its gradient, with one read of each element.

One program a row, which stays in registers between the reductions and the gradient.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# Norms are not taken smaller than this: a zero vector stays one.
EPS = tl.constexpr(1e-8)


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
    student_row, teacher_row = student + row * student_pitch, teacher + row * teacher_pitch
    grad_row = grad + row * grad_pitch
    if STUDENT_ALIGNED:
        student_row = tl.multiple_of(student_row, 16)
    if TEACHER_ALIGNED:
        teacher_row = tl.multiple_of(teacher_row, 16)
    if GRAD_ALIGNED:
        grad_row = tl.multiple_of(grad_row, 16)
    position = tl.arange(0, BLOCK)
    # A row that does not count is not read: its elements may be anything, NaN included.
    end = tl.full([], D, tl.int32)
    if HAS_MASK:
        end = tl.multiple_of(D * tl.load(mask + row).to(tl.int32), D)
    s = tl.load(student_row + position, mask=position < end, other=0.0).to(ACC)
    t = tl.load(teacher_row + position, mask=position < end, other=0.0).to(ACC)

    if NORMALIZE:
        norm = tl.sqrt(tl.sum(s * s, 0))
        inverse = 1.0 / tl.maximum(norm, EPS)
        s *= inverse
        t *= 1.0 / tl.maximum(tl.sqrt(tl.sum(t * t, 0)), EPS)
    error = s - t
    weight = tl.load(scale + row * scale_stride).to(ACC)
    tl.store(loss + row, tl.where(end > 0, weight * tl.sum(error * error, 0), 0.0))
    if WITH_GRAD:
        row_grad = error
        factor = 2.0 * weight
        if NORMALIZE:
            # The part along the student changes its norm alone; a norm below EPS is replaced by a constant.
            row_grad -= s * tl.where(norm > EPS, tl.sum(error * s, 0), 0.0)
            factor *= inverse
        # A scale that is not finite must not reach a row that does not count.
        row_grad = tl.where(end > 0, row_grad * factor, 0.0)
        tl.store(grad_row + position, row_grad.to(grad.dtype.element_ty), mask=position < D)


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def compile_options(width: int, hip: bool) -> dict[str, int | bool]:
    """Eight elements a thread while there are threads to add."""
    # Fusion is stated because its default differs between versions of Triton.
    threads = min(1024, max(64, triton.next_power_of_2(width) // 8))
    return {"num_warps": threads // (64 if hip else 32), "enable_fp_fusion": True}


def hidden_mse_fwd(
    student: Tensor,  # (N, D), as the teacher: dense in D, any row pitch
    teacher: Tensor,  # (N, D)
    mask: Tensor | None,  # (N,)
    scale: Tensor,  # () or (N,)
    normalize: bool,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    rows, width = student.shape
    accumulator = torch.float64 if student.dtype is torch.float64 else torch.float32
    # Before a loss scaler acts, a float16 gradient divided by the number of rows would underflow.
    grad_dtype = torch.float32 if student.dtype is torch.float16 else student.dtype
    loss = torch.empty(rows, dtype=accumulator, device=student.device)
    grad = torch.empty(student.shape if with_grad else (0,), dtype=grad_dtype, device=student.device)
    with torch.cuda.device(student.device) if student.is_cuda else contextlib.nullcontext():
        if rows > 0:
            hidden_mse_kernel[(rows,)](
                student,
                teacher,
                None if mask is None else mask.contiguous().view(torch.uint8),
                scale,
                loss,
                grad,
                student.stride(0),
                teacher.stride(0),
                grad.stride(0),
                scale.stride(0) if scale.dim() else 0,
                NORMALIZE=normalize,
                HAS_MASK=mask is not None,
                WITH_GRAD=with_grad,
                STUDENT_ALIGNED=_aligned(student),
                TEACHER_ALIGNED=_aligned(teacher),
                GRAD_ALIGNED=_aligned(grad),
                D=width,
                BLOCK=triton.next_power_of_2(max(width, 1)),
                ACC=tl.float64 if accumulator is torch.float64 else tl.float32,
                **compile_options(width, torch.version.hip is not None),
            )
    return (loss.sum(dtype=torch.float64).to(loss.dtype) if reduce else loss), grad
