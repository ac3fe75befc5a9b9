"""1 - cosine similarity of two rows, and its gradient, with one read of each element.

One program a row, which stays in registers between the reductions and the gradient.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# Norms are not taken smaller than this, as in torch.nn.functional.cosine_similarity.
EPS = tl.constexpr(1e-8)


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

    s_norm = tl.sqrt(tl.sum(s * s, 0))
    inverse_s = 1.0 / tl.maximum(s_norm, EPS)
    inverse_t = 1.0 / tl.maximum(tl.sqrt(tl.sum(t * t, 0)), EPS)
    cos = tl.sum(s * t, 0) * inverse_s * inverse_t
    weight = tl.load(scale + row * scale_stride).to(ACC)
    tl.store(loss + row, tl.where(end > 0, weight * (1.0 - cos), 0.0))
    if WITH_GRAD:
        # A norm below EPS is replaced by a constant, and then only the teacher's direction is left.
        along_student = tl.where(s_norm > EPS, weight * cos * inverse_s * inverse_s, 0.0)
        along_teacher = weight * inverse_s * inverse_t
        row_grad = s * along_student - t * along_teacher
        tl.store(grad_row + position, row_grad.to(grad.dtype.element_ty), mask=position < D)


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def compile_options(width: int, hip: bool) -> dict[str, int | bool]:
    """Eight elements a thread while there are threads to add."""
    # Fusion is stated because its default differs between versions of Triton.
    threads = min(1024, max(64, triton.next_power_of_2(width) // 8))
    return {"num_warps": threads // (64 if hip else 32), "enable_fp_fusion": True}


def cosine_loss_fwd(
    student: Tensor,  # (N, D), as the teacher: dense in D, any row pitch
    teacher: Tensor,  # (N, D)
    mask: Tensor | None,  # (N,)
    scale: Tensor,  # () or (N,)
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
            cosine_loss_kernel[(rows,)](
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
