"""Mean squared error of hidden states, plain, projected or normalised, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdistil.ops import checks
from fastdistil.ops.matmul import unrounded_mm
from fastdistil.ops.registry import define
from fastdistil.ops.scale_grad import register_kept_gradient
from fastdistil.ops.terms import (
    accumulation_dtype,
    as_constant,
    as_rows,
    at_least_one,
    autocast,
    saved_grad_dtype,
    sum_rows,
)

SCHEMA = """hidden_mse_fwd(
    Tensor student, Tensor teacher, Tensor? mask, Tensor scale, bool normalize, bool reduce, bool with_grad
) -> (Tensor loss, Tensor grad)"""
SCHEMA_PROJECT = "project_hidden(Tensor hidden, Tensor weight, Tensor? bias) -> Tensor"

# Norms are not taken smaller than this: a zero vector stays one.
EPS = 1e-8


def hidden_mse_ref(
    student: Tensor,  # (N, D)
    teacher: Tensor,  # (N, D)
    mask: Tensor | None,  # (N,)
    scale: Tensor,  # () or (N,)
    normalize: bool,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student.dtype)
    s, t = student.to(dtype), teacher.to(dtype)
    if mask is not None:
        s, t = (torch.where(mask.unsqueeze(-1), x, 0) for x in (s, t))
    if normalize:
        norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
        inverse = 1 / norm.clamp(min=EPS)
        s = s * inverse
        t = t / torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp(min=EPS)
    error = s - t
    loss = scale * error.square().sum(-1)
    grad = _empty_grad(student, with_grad)
    if with_grad:
        rows = error * (2 * scale.expand(len(s)).unsqueeze(-1))
        if normalize:
            # A clamped norm is a constant; else the gradient has no part along the student.
            along = torch.where(norm > EPS, (rows * s).sum(-1, keepdim=True), 0)
            rows = (rows - along * s) * inverse
        grad.copy_(rows)
    return (sum_rows(loss) if reduce else loss), grad


def _empty_grad(student: Tensor, with_grad: bool) -> Tensor:
    return student.new_empty(student.shape if with_grad else (0,), dtype=saved_grad_dtype(student.dtype))


def _fake(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    normalize: bool,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty(() if reduce else student.shape[0], dtype=accumulation_dtype(student.dtype))
    return loss, _empty_grad(student, with_grad)


def project_hidden_impl(
    hidden: Tensor,  # (N, Ds)
    weight: Tensor,  # (Dt, Ds)
    bias: Tensor | None,  # (Dt,)
) -> Tensor:
    """`hidden @ weight.T + bias` in the accumulation dtype, not rounded to that of the hidden states."""
    product = unrounded_mm(hidden, weight.T, hidden.dtype)
    return product if bias is None else product.add_(bias)


def _project_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=accumulation_dtype(hidden.dtype))


define(SCHEMA, eager=hidden_mse_ref, fake=_fake, kernel="hidden_mse")
define(SCHEMA_PROJECT, eager=project_hidden_impl, fake=_project_fake, composed="PyTorch matrix products")


def _setup_project_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight)


def _project_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        unrounded_mm(upstream, weight, hidden.dtype).to(hidden.dtype) if wanted[0] else None,
        unrounded_mm(upstream.T, hidden, hidden.dtype).to(weight.dtype) if wanted[1] else None,
        upstream.sum(0).to(ctx.bias_dtype) if wanted[2] else None,
    )


register_kept_gradient("hidden_mse")
torch.library.register_autograd(
    "fastdistil::project_hidden", _project_backward, setup_context=_setup_project_context
)


def hidden_mse(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error of hidden states: the L_hidn and L_embd of TinyBERT (Jiao et al., 2020, equations 8
    and 9), with a learned projection of the student's; or of normalised ones, the patient loss of BERT-PKD
    (Sun et al., 2019, equation 7). ::

        s = student_hidden @ projection.T + bias
        mean of (s - t) ** 2                                     # over the rows that count, and over D
        mean of (s / |s| - t / |t|) ** 2                         # normalize=True

    Args:
        student_hidden: `(..., Ds)`; float32, bfloat16, float16 or float64; any strides.
        teacher_hidden: `(..., D)`; without a projection D is Ds. The only input that never gets a gradient.
        projection: `(D, Ds)`, the weight of a `torch.nn.Linear(Ds, D)`. The product runs in the dtype of the
            hidden states (under autocast: in autocast's) and is not rounded to it.
        bias: `(D,)`, of the projection.
        mask: `(...)`, bool or 0/1, true at the rows that count. Default: all rows.
        normalize: divide both by their L2 norm (not taken smaller than 1e-8) first.
        reduction: `"mean"` over elements of the rows that count (no row: 0, never NaN), as
            `torch.nn.MSELoss`; `"sum"` over them; or `"none"`, the sum of each row, shape `(...)`.

    Returns:
        The loss in float32 (float64 for float64 students).

    Memory: one tensor of the teacher's shape, the gradient, computed here and kept for backward (in float32
    for float16 and with a projection); with a projection, the projected states while this runs.

    Raises:
        ValueError: types, shapes, dtypes or devices that do not fit (a projection is the weight of a layer,
            and not the layer), a bias without a projection, an unknown reduction.
        RuntimeError: backward with `create_graph=True`; forward-mode differentiation.
    """
    checks.check_tensors(
        {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden},
        {"projection": projection, "bias": bias, "mask": mask},
    )
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.refuse_forward_mode("hidden_mse", student_hidden, projection, bias)
    checks.check_floating("student_hidden", student_hidden)
    checks.check_floating("teacher_hidden", teacher_hidden)
    for name, tensor in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if tensor.dim() == 0:
            raise ValueError(f"{name} must have shape (..., D), got a 0-dim tensor")
    shape, device = student_hidden.shape[:-1], student_hidden.device
    checks.check_device("teacher_hidden", teacher_hidden, device)
    _check_projection(student_hidden, teacher_hidden, projection, bias)
    if projection is None:
        checks.check_shape("teacher_hidden", teacher_hidden, student_hidden.shape, "that of student_hidden")
    else:
        expected = (*shape, teacher_hidden.shape[-1])
        checks.check_shape("teacher_hidden", teacher_hidden, expected, "the rows of student_hidden")
    if mask is not None:
        mask = as_constant(checks.check_mask("mask", mask, shape, device))

    student, teacher = as_rows(student_hidden), as_rows(teacher_hidden.detach())
    if projection is not None:
        student = as_rows(autocast(student))
        if mask is not None:
            # A row that does not count may hold anything, and must not reach the projection's gradient.
            student = torch.where(mask.unsqueeze(-1), student, 0)
        student = torch.ops.fastdistil.project_hidden(student, projection, bias)
    dtype = accumulation_dtype(student.dtype)
    scale = torch.ones((), device=device, dtype=dtype)
    if reduction == "mean":
        rows = math.prod(shape) if mask is None else mask.sum()
        scale = scale / at_least_one(rows * teacher.shape[1])
    loss, _ = torch.ops.fastdistil.hidden_mse_fwd(
        student,
        teacher,
        mask,
        scale,
        normalize,
        reduction != "none",
        torch.is_grad_enabled() and student.requires_grad,
    )
    return loss.view(shape) if reduction == "none" else loss


def _check_projection(
    student_hidden: Tensor, teacher_hidden: Tensor, projection: Tensor | None, bias: Tensor | None
) -> None:
    device = student_hidden.device
    if projection is None:
        if bias is not None:
            raise ValueError("bias belongs to the projection, and there is none")
        return
    shape = (teacher_hidden.shape[-1], student_hidden.shape[-1])
    checks.check_floating("projection", projection)
    checks.check_shape("projection", projection, shape, "from the student's width to the teacher's")
    checks.check_device("projection", projection, device)
    if bias is not None:
        checks.check_floating("bias", bias)
        checks.check_shape("bias", bias, shape[:1], "one value a column of the teacher's")
        checks.check_device("bias", bias, device)
