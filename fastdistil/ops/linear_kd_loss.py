"""Vocabulary distillation from hidden states: the logits of both models exist one chunk of rows at a time.

A chunk's logits, its loss and its gradient are made one after the other in the same two tiles, so that they
are still in cache when the next step reads them. The four matrix products are torch's; what is between them
is `kd_loss_fwd_`.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastdistil.ops import checks
from fastdistil.ops.logit_chunks import empty_grads, kd_loss_in_chunks
from fastdistil.ops.registry import define
from fastdistil.ops.scale_grad import refuse_double_backward, upstream_times
from fastdistil.ops.terms import (
    DIVERGENCES,
    accumulation_dtype,
    as_constant,
    as_rows,
    autocast,
    check_settings,
    combine_rows,
    prepare_terms,
    saved_grad_dtype,
)

SCHEMA = """linear_kd_loss_fwd(
    Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight,
    Tensor? student_bias, Tensor? teacher_bias, Tensor? labels, Tensor? kd_mask,
    Tensor kd_scale, Tensor ce_scale, float temperature, int divergence, float jsd_beta, int ignore_index,
    float label_smoothing, int chunk_size, bool reduce, bool grad_hidden, bool grad_weight, bool grad_bias
) -> (Tensor loss, Tensor kd, Tensor ce, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"""


def linear_kd_loss_impl(
    student_hidden: Tensor,  # (N, Ds)
    student_weight: Tensor,  # (V, Ds)
    teacher_hidden: Tensor,  # (N, Dt)
    teacher_weight: Tensor,  # (V, Dt)
    student_bias: Tensor | None,  # (V,)
    teacher_bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (N,)
    kd_mask: Tensor | None,  # (N,)
    kd_scale: Tensor,  # () or (N,)
    ce_scale: Tensor,  # () or (N,)
    temperature: float,
    divergence: int,
    jsd_beta: float,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int,
    reduce: bool,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = _active_rows(labels, kd_mask, ignore_index)
    dtype = accumulation_dtype(student_hidden.dtype)

    def gather(tensor: Tensor) -> Tensor:
        return tensor if rows is None or tensor.dim() == 0 else tensor.index_select(0, rows)

    kd, ce, hidden_grad, weight_sum, bias_sum = kd_loss_in_chunks(
        gather(student_hidden),
        student_weight,
        gather(teacher_hidden),
        teacher_weight,
        # Added by the kernel in its accumulation dtype.
        None if student_bias is None else student_bias.to(dtype).contiguous(),
        None if teacher_bias is None else teacher_bias.to(dtype).contiguous(),
        None if labels is None else gather(labels),
        None if kd_mask is None else gather(kd_mask),
        gather(kd_scale),
        gather(ce_scale),
        (temperature, divergence, jsd_beta, ignore_index, label_smoothing),
        chunk_size,
        (grad_hidden, grad_weight, grad_bias),
    )
    if rows is not None:
        total = student_hidden.shape[0]
        kd, ce = (x.new_zeros(total).index_copy_(0, rows, x) for x in (kd, ce))
        if grad_hidden:
            hidden_grad = hidden_grad.new_zeros(student_hidden.shape).index_copy_(0, rows, hidden_grad)
    weight_grad = weight_sum.to(saved_grad_dtype(student_weight.dtype))
    bias_grad = bias_sum.to(
        saved_grad_dtype(student_weight.dtype if student_bias is None else student_bias.dtype)
    )
    return combine_rows(kd, ce, kd_scale, ce_scale, reduce), kd, ce, hidden_grad, weight_grad, bias_grad


def _active_rows(labels: Tensor | None, kd_mask: Tensor | None, ignore_index: int) -> Tensor | None:
    """The indices of the rows that a term uses, or None if that is all of them."""
    if kd_mask is None:
        return None
    active = kd_mask if labels is None else kd_mask | (labels != ignore_index)
    rows = active.nonzero().squeeze(1)
    return None if rows.numel() == active.numel() else rows


# --- registration and autograd ------------------------------------------------------------------------------


def _fake(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    kd_mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    temperature: float,
    divergence: int,
    jsd_beta: float,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int,
    reduce: bool,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = student_hidden.new_empty(student_hidden.shape[0], dtype=accumulation_dtype(student_hidden.dtype))
    loss = rows.new_empty(()) if reduce else torch.empty_like(rows)
    grads = empty_grads(student_hidden, student_weight, student_bias, (grad_hidden, grad_weight, grad_bias))
    return loss, rows, torch.empty_like(rows), *grads


define(
    SCHEMA,
    eager=linear_kd_loss_impl,
    fake=_fake,
    composed="PyTorch matrix products, {kd_loss_fwd_} between them",
    reads_back=True,
)

_TENSORS = 10
_INPUTS = 20


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, *others = output
    reduce, wanted = inputs[16], inputs[17:20]
    ctx.reduce = reduce
    # Row by row, the upstream gradient is part of the sum over rows in the weight's gradient: only a second
    # pass knows it, so the inputs are kept and not the gradients.
    ctx.save_for_backward(*(others[2:] if reduce else inputs[:_TENSORS]))
    ctx.settings = inputs[_TENSORS:16]
    ctx.dtypes = tuple(None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[4]))
    ctx.wanted = wanted
    ctx.mark_non_differentiable(*others, *(() if any(wanted) or not reduce else (loss,)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_kd_loss")
    result: list[Tensor | None] = [None] * _INPUTS
    if upstream is None:
        return tuple(result)
    positions = (0, 1, 4)
    if ctx.reduce:
        for position, grad, want, dtype in zip(
            positions, ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True
        ):
            result[position] = upstream_times(grad, upstream, dtype) if want else None
        return tuple(result)
    *tensors, kd_scale, ce_scale = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[position] for position in positions]
    _, _, _, *grads = torch.ops.fastdistil.linear_kd_loss_fwd(
        *tensors, kd_scale * upstream, ce_scale * upstream, *ctx.settings, True, *wanted
    )
    for position, grad, want, dtype in zip(positions, grads, wanted, ctx.dtypes, strict=True):
        result[position] = grad.to(dtype) if want else None
    return tuple(result)


torch.library.register_autograd("fastdistil::linear_kd_loss_fwd", _backward, setup_context=_setup_context)


# --- public function ----------------------------------------------------------------------------------------


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_size: int | None = None,
    temperature: float = 2.0,
    kd_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    kd_mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_terms: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_size: int | None = None,
    temperature: float = 2.0,
    kd_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    kd_mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_terms: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_size: int | None = None,
    temperature: float = 2.0,
    kd_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    kd_mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`kd_loss` of the logits of two vocabulary heads, from the hidden states before them. ::

        student = student_hidden @ student_weight.T + student_bias
        teacher = teacher_hidden @ teacher_weight.T + teacher_bias
        kd_loss(student, teacher, labels, ...)

    without allocating `(N, V)` logits or their gradient, without a product for a row that no term uses, and
    without rounding the logits of low-precision hidden states before the loss (on a CPU with bfloat16 units
    they are rounded to bfloat16, as torch's own product does). Divergences, the factor T² (always applied)
    and their sources: `kd_loss`.

    The hidden states are what the vocabulary matrix multiplies: in BERT's family behind the head's transform
    (`fastdistil.models.heads.mlm_head` has both), not the encoder's last ones.

    Args:
        student_hidden: `(..., Ds)`; float32, bfloat16, float16 or float64.
        student_weight: `(V, Ds)`, usually the tied embedding. The products run in the dtype of the hidden
            states (under autocast: in autocast's), to which weights are converted; gradients come in the
            dtype of each input.
        teacher_hidden, teacher_weight: `(..., Dt)` and `(V, Dt)`; they never get a gradient.
        student_bias, teacher_bias: `(V,)`.
        chunk_size: rows of logits that exist at a time. Default: as many as fit a cache-sized budget.
        labels, temperature, kd_weight, ce_weight, divergence, jsd_beta, kd_mask, ignore_index,
            label_smoothing, reduction, return_terms: as in `kd_loss`; labels and mask have the shape of the
            hidden states without the last dimension.

    Returns:
        The loss in float32 (float64 for float64 students).

    Memory: two tiles of `chunk_size x V`, and the gradients of the student's hidden states, weight and bias
    that are asked for, which are computed here and kept for backward (the weight's is summed in float32).
    With `reduction="none"` the inputs are kept instead and backward computes the logits again.

    With labels or a kd_mask, the rows that no term uses are found first, which waits for a GPU.

    Raises:
        ValueError: as `kd_loss`, and hidden sizes that do not fit their weights, weights with different V, a
            chunk_size that is not > 0.
        RuntimeError: backward with `create_graph=True`; forward-mode differentiation.
    """
    checks.check_tensors(
        {
            "student_hidden": student_hidden,
            "student_weight": student_weight,
            "teacher_hidden": teacher_hidden,
            "teacher_weight": teacher_weight,
        },
        {
            "labels": labels,
            "student_bias": student_bias,
            "teacher_bias": teacher_bias,
            "kd_mask": kd_mask,
        },
    )
    check_settings(temperature, divergence, jsd_beta, label_smoothing, reduction)
    checks.refuse_forward_mode("linear_kd_loss", student_hidden, student_weight, student_bias)
    _check_head("student", student_hidden, student_weight, student_bias)
    _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    vocabulary, device = student_weight.shape[0], student_hidden.device
    if teacher_weight.shape[0] != vocabulary:
        raise ValueError(
            f"student and teacher must share one vocabulary: student_weight has V={vocabulary}, "
            f"teacher_weight has V={teacher_weight.shape[0]}"
        )
    shape = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"teacher_hidden must have as many rows as student_hidden {tuple(shape)}, "
            f"got {tuple(teacher_hidden.shape[:-1])}"
        )
    checks.check_device("teacher_hidden", teacher_hidden, device)
    checks.check_chunk_size(chunk_size)

    student_hidden, teacher_hidden = autocast(student_hidden), autocast(teacher_hidden)
    terms = prepare_terms(
        labels,
        kd_mask,
        shape,
        device,
        accumulation_dtype(student_hidden.dtype),
        vocabulary,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        return_terms=return_terms,
    )
    reduce = reduction != "none"
    constant = torch.Tensor.detach if reduce else as_constant  # row by row, inputs are kept for backward
    compute_grads = torch.is_grad_enabled() and reduce
    loss, kd, ce, _, _, _ = torch.ops.fastdistil.linear_kd_loss_fwd(
        as_rows(student_hidden),
        student_weight,
        as_rows(constant(teacher_hidden)),
        constant(teacher_weight),
        student_bias,
        None if teacher_bias is None else constant(teacher_bias),
        None if terms.labels is None else constant(terms.labels),
        None if terms.kd_mask is None else constant(terms.kd_mask),
        terms.kd_scale,
        terms.ce_scale,
        temperature,
        DIVERGENCES[divergence],
        jsd_beta,
        ignore_index,
        label_smoothing,
        chunk_size or 0,
        reduce,
        compute_grads and student_hidden.requires_grad,
        compute_grads and student_weight.requires_grad,
        compute_grads and student_bias is not None and student_bias.requires_grad,
    )
    return terms.outputs(reduction, shape, loss, kd, ce, return_terms)


def _check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hidden states (..., D), weight (V, D) and bias (V,) of one model belong together."""
    checks.check_floating(f"{model}_hidden", hidden)
    checks.check_floating(f"{model}_weight", weight)
    if hidden.dim() == 0:
        raise ValueError(f"{model}_hidden must have shape (..., D), got a 0-dim tensor")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{model}_weight must have shape (V, {hidden.shape[-1]}) to fit {model}_hidden, "
            f"got {tuple(weight.shape)}"
        )
    checks.check_device(f"{model}_weight", weight, hidden.device)
    if bias is not None:
        checks.check_floating(f"{model}_bias", bias)
        checks.check_shape(f"{model}_bias", bias, weight.shape[:1], f"one value a row of {model}_weight")
        checks.check_device(f"{model}_bias", bias, hidden.device)
