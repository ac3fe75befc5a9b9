"""1 - cosine similarity of hidden states, and its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistil.ops import checks
from fastdistil.ops.registry import define
from fastdistil.ops.scale_grad import register_kept_gradient
from fastdistil.ops.terms import accumulation_dtype, as_rows, at_least_one, saved_grad_dtype, sum_rows

SCHEMA = """cosine_loss_fwd(
    Tensor student, Tensor teacher, Tensor? mask, Tensor scale, bool reduce, bool with_grad
) -> (Tensor loss, Tensor grad)"""

# The norms are not taken smaller than this, as in torch.nn.functional.cosine_similarity: a zero vector has
# cosine 0.
EPS = 1e-8


def cosine_loss_ref(
    student: Tensor,  # (N, D)
    teacher: Tensor,  # (N, D)
    mask: Tensor | None,  # (N,)
    scale: Tensor,  # () or (N,)
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student.dtype)
    s, t = student.to(dtype), teacher.to(dtype)
    s_norm = torch.linalg.vector_norm(s, dim=-1)
    inverse_s = 1 / s_norm.clamp(min=EPS)
    inverse_t = 1 / torch.linalg.vector_norm(t, dim=-1).clamp(min=EPS)
    cos = (s * t).sum(-1) * inverse_s * inverse_t
    loss = scale * (1 - cos)
    if mask is not None:
        loss = torch.where(mask, loss, 0.0)
    grad = _empty_grad(student, with_grad)
    if with_grad:
        # A clamped norm is a constant, so only the first term is left there.
        along_student = torch.where(s_norm > EPS, cos * inverse_s**2, 0.0) * scale
        along_teacher = inverse_s * inverse_t * scale
        rows = s * along_student.unsqueeze(-1) - t * along_teacher.unsqueeze(-1)
        grad.copy_(rows if mask is None else torch.where(mask.unsqueeze(-1), rows, 0.0))
    return (sum_rows(loss) if reduce else loss), grad


def _empty_grad(student: Tensor, with_grad: bool) -> Tensor:
    return student.new_empty(student.shape if with_grad else (0,), dtype=saved_grad_dtype(student.dtype))


def _fake(
    student: Tensor, teacher: Tensor, mask: Tensor | None, scale: Tensor, reduce: bool, with_grad: bool
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty(() if reduce else student.shape[0], dtype=accumulation_dtype(student.dtype))
    return loss, _empty_grad(student, with_grad)


define(SCHEMA, eager=cosine_loss_ref, fake=_fake, kernel="cosine_loss")


register_kept_gradient("cosine_loss")


def cosine_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """1 - cos(student, teacher) of each row of hidden states, the L_cos of DistilBERT (Sanh et al., 2019,
    section 3). ::

        1 - sum(s * t) / (max(|s|, 1e-8) * max(|t|, 1e-8))

    Args:
        student_hidden: `(..., D)`; float32, bfloat16, float16 or float64; any strides. The only input with a
            gradient.
        teacher_hidden: `(..., D)`, the same shape, any of these dtypes.
        mask: `(...)`, bool or 0/1, true at the rows that count. Default: all rows.
        reduction: `"mean"` over the rows that count (no row: 0, never NaN), `"sum"`, or `"none"` (shape
            `(...)`, 0 at the rows that do not count).

    Returns:
        The loss in float32 (float64 for float64 students).

    Memory: one tensor of the student's shape, the gradient, computed here and kept for backward (in float32
    for float16).

    Raises:
        ValueError: types, shapes, dtypes or devices that do not fit, an unknown reduction.
        RuntimeError: backward with `create_graph=True`; forward-mode differentiation.
    """
    checks.check_tensors({"student_hidden": student_hidden, "teacher_hidden": teacher_hidden}, {"mask": mask})
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.refuse_forward_mode("cosine_loss", student_hidden)
    checks.check_floating("student_hidden", student_hidden)
    checks.check_floating("teacher_hidden", teacher_hidden)
    if student_hidden.dim() == 0:
        raise ValueError("student_hidden must have shape (..., D), got a 0-dim tensor")
    checks.check_shape("teacher_hidden", teacher_hidden, student_hidden.shape, "that of student_hidden")
    checks.check_device("teacher_hidden", teacher_hidden, student_hidden.device)
    shape, device = student_hidden.shape[:-1], student_hidden.device
    if mask is not None:
        mask = checks.check_mask("mask", mask, shape, device)

    dtype = accumulation_dtype(student_hidden.dtype)
    scale = torch.ones((), device=device, dtype=dtype)
    if reduction == "mean":
        scale = scale / at_least_one(math.prod(shape) if mask is None else mask.sum())
    loss, _ = torch.ops.fastdistil.cosine_loss_fwd(
        as_rows(student_hidden),
        as_rows(teacher_hidden.detach()),
        mask,
        scale,
        reduction != "none",
        torch.is_grad_enabled() and student_hidden.requires_grad,
    )
    return loss.view(shape) if reduction == "none" else loss
