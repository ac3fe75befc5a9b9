"""What `cosine_loss` and `hidden_mse` share: reading a row of both models, options, allocation and launch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Norms are not taken smaller than this, as in torch.nn.functional.cosine_similarity.
EPS = tl.constexpr(1e-8)


@triton.jit
def read_pair(
    student,  # (N, D)
    teacher,  # (N, D)
    mask,  # (N,)
    row,
    student_pitch,
    teacher_pitch,
    position,  # (BLOCK,)
    HAS_MASK: tl.constexpr,
    STUDENT_ALIGNED: tl.constexpr,  # every row starts at a multiple of 16 bytes
    TEACHER_ALIGNED: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
):
    """A row of both models, with zeros behind it, and whether it counts."""
    student_row, teacher_row = student + row * student_pitch, teacher + row * teacher_pitch
    if STUDENT_ALIGNED:
        student_row = tl.multiple_of(student_row, 16)
    if TEACHER_ALIGNED:
        teacher_row = tl.multiple_of(teacher_row, 16)
    # A row that does not count is not read: its elements may be anything, NaN included.
    end = tl.full([], D, tl.int32)
    if HAS_MASK:
        end = tl.multiple_of(D * tl.load(mask + row).to(tl.int32), D)
    s = tl.load(student_row + position, mask=position < end, other=0.0).to(ACC)
    t = tl.load(teacher_row + position, mask=position < end, other=0.0).to(ACC)
    return s, t, end > 0


@triton.jit
def write_row(
    grad,  # (N, D)
    row,
    pitch,
    position,
    values,
    ALIGNED: tl.constexpr,
    D: tl.constexpr,
):
    start = grad + row * pitch
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    tl.store(start + position, values.to(grad.dtype.element_ty), mask=position < D)


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def compile_options(width: int, hip: bool) -> dict[str, int | bool]:
    """Eight elements a thread while there are threads to add."""
    # Fusion is stated because its default differs between versions of Triton.
    threads = min(1024, max(64, triton.next_power_of_2(width) // 8))
    return {"num_warps": threads // (64 if hip else 32), "enable_fp_fusion": True}


def launch(
    kernel: Any,
    student: Tensor,  # (N, D), as the teacher: dense in D, any row pitch
    teacher: Tensor,  # (N, D)
    mask: Tensor | None,  # (N,)
    scale: Tensor,  # () or (N,)
    reduce: bool,
    with_grad: bool,
    **constants: Any,
) -> tuple[Tensor, Tensor]:
    """One program a row, which stays in registers between the reductions and the gradient."""
    rows, width = student.shape
    accumulator = torch.float64 if student.dtype is torch.float64 else torch.float32
    # Before a loss scaler acts, a float16 gradient divided by the number of rows would underflow.
    grad_dtype = torch.float32 if student.dtype is torch.float16 else student.dtype
    loss = torch.empty(rows, dtype=accumulator, device=student.device)
    grad = torch.empty(student.shape if with_grad else (0,), dtype=grad_dtype, device=student.device)
    with torch.cuda.device(student.device) if student.is_cuda else contextlib.nullcontext():
        if rows > 0:
            kernel[(rows,)](
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
                **constants,
                **compile_options(width, torch.version.hip is not None),
            )
    return (loss.sum(dtype=torch.float64).to(loss.dtype) if reduce else loss), grad
