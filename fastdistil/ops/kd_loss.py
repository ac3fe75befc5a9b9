"""Vocabulary distillation: T^2 * D(teacher || student) and the cross-entropy with labels, and their gradient.

The forward computes the gradient too, so that each logit is read once; the backward only applies the upstream
gradient.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastdistil.ops import checks
from fastdistil.ops.registry import define
from fastdistil.ops.scale_grad import refuse_double_backward, upstream_times
from fastdistil.ops.terms import (
    DIVERGENCES,
    accumulation_dtype,
    as_rows,
    check_settings,
    combine_rows,
    prepare_terms,
    saved_grad_dtype,
)

SCHEMA = """kd_loss_fwd(
    Tensor student, Tensor teacher, Tensor? labels, Tensor? kd_mask, Tensor kd_scale, Tensor ce_scale,
    float temperature, int divergence, float jsd_beta, int ignore_index, float label_smoothing,
    bool reduce, bool with_grad
) -> (Tensor loss, Tensor kd, Tensor ce, Tensor grad)"""

# The form that a loop over chunks of logits uses: biases are added while reading, the student's logits are
# overwritten by their gradient.
SCHEMA_ = """kd_loss_fwd_(
    Tensor(a!) student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, Tensor? labels,
    Tensor? kd_mask, Tensor kd_scale, Tensor ce_scale, float temperature, int divergence, float jsd_beta,
    int ignore_index, float label_smoothing, bool with_grad
) -> (Tensor kd, Tensor ce)"""

# The reference works on this many logits at a time: its dozen float32 temporaries then stay in cache or close
# to it.
_REF_BLOCK_ELEMENTS = 1 << 21


# --- eager reference ----------------------------------------------------------------------------------------


def _divergence_ref(
    log_p: Tensor,  # (N, V), the student's log-probabilities at T
    log_q: Tensor,  # (N, V), the teacher's
    divergence: int,
    jsd_beta: float,
) -> tuple[Tensor, Tensor]:
    """D(q || p) of each row (N,), and its derivative by the student's logits over T (N, V)."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == DIVERGENCES["forward_kl"]:
        return _expected_log_ratio(q, log_q, log_p)[0], p - q
    if divergence == DIVERGENCES["reverse_kl"]:
        kl, log_ratio = _expected_log_ratio(p, log_p, log_q)
        return kl, p * (log_ratio - kl.unsqueeze(-1))
    # Logarithms of ratios, and not differences of logarithms, whose rounding is relative to them. Where both
    # probabilities underflow, so does their mixture.
    m = (jsd_beta * q + (1 - jsd_beta) * p).clamp_(min=torch.finfo(p.dtype).tiny)
    teacher_kl = (q * _log_ratio(q, m)).sum(-1)
    log_ratio = _log_ratio(p, m)
    student_kl = (p * log_ratio).sum(-1)
    value = jsd_beta * teacher_kl + (1 - jsd_beta) * student_kl
    return value, (1 - jsd_beta) * p * (log_ratio - student_kl.unsqueeze(-1))


def _log_ratio(share: Tensor, mixture: Tensor) -> Tensor:
    """log(share / mixture), 0 where the share is 0."""
    return torch.where(share > 0, (share / mixture).clamp_(min=torch.finfo(share.dtype).tiny).log_(), 0.0)


def _expected_log_ratio(weight: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """sum(weight * (log a - log b)) of each row, and the log ratio, both 0 where the weight is 0 (log a may
    be -inf)."""
    log_ratio = torch.where(weight > 0, log_a - log_b, 0.0)
    return (weight * log_ratio).sum(-1), log_ratio


def _block_ref(
    student: Tensor,  # (N, V) in the accumulation dtype, as is the teacher
    teacher: Tensor,
    labels: Tensor | None,  # (N,)
    kd_rows: Tensor | None,  # (N,) bool
    kd_scale: Tensor,  # (N,)
    ce_scale: Tensor,  # (N,)
    temperature: float,
    divergence: int,
    jsd_beta: float,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    vocabulary = student.shape[-1]
    log_p = torch.log_softmax(student / temperature, dim=-1)
    log_q = torch.log_softmax(teacher / temperature, dim=-1)
    value, derivative = _divergence_ref(log_p, log_q, divergence, jsd_beta)
    kd = temperature**2 * value
    grad = derivative.mul_((kd_scale * temperature).unsqueeze(-1))
    if kd_rows is not None:
        kd = torch.where(kd_rows, kd, 0.0)
        # Not a product: the logits of a row that is left out may be anything, NaN included.
        grad = torch.where(kd_rows.unsqueeze(-1), grad, 0.0)
    if labels is None:
        return kd, torch.zeros_like(kd), grad

    ce_rows = labels != ignore_index
    target = torch.where(ce_rows, labels, 0).unsqueeze(-1)
    log_p1 = log_p if temperature == 1.0 else torch.log_softmax(student, dim=-1)
    ce = -(1 - label_smoothing) * log_p1.gather(-1, target).squeeze(-1)
    ce_grad = log_p1.exp()
    if label_smoothing > 0:
        ce = ce - label_smoothing / vocabulary * log_p1.sum(-1)
        ce_grad -= label_smoothing / vocabulary
    ce_grad.scatter_add_(-1, target, torch.full_like(ce_grad[:, :1], label_smoothing - 1))
    ce_grad.mul_(ce_scale.unsqueeze(-1))
    grad += torch.where(ce_rows.unsqueeze(-1), ce_grad, 0.0)
    return kd, torch.where(ce_rows, ce, 0.0), grad


def kd_loss_ref_(
    student: Tensor,  # (N, V), overwritten by the gradient
    teacher: Tensor,  # (N, V)
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
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return _rows_ref(
        student,
        teacher,
        student_bias,
        teacher_bias,
        labels,
        kd_mask,
        kd_scale,
        ce_scale,
        (temperature, divergence, jsd_beta, ignore_index, label_smoothing),
        student if with_grad else None,
    )


def _rows_ref(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    kd_mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    settings: tuple[float, int, float, int, float],
    grad_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, vocabulary = student.shape
    dtype = accumulation_dtype(student.dtype)
    kd, ce = student.new_zeros(rows, dtype=dtype), student.new_zeros(rows, dtype=dtype)
    kd_scale, ce_scale = kd_scale.expand(rows), ce_scale.expand(rows)
    step = max(1, _REF_BLOCK_ELEMENTS // max(1, vocabulary))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        s, t = student[block].to(dtype), teacher[block].to(dtype)
        kd[block], ce[block], grad = _block_ref(
            s if student_bias is None else s + student_bias,
            t if teacher_bias is None else t + teacher_bias,
            None if labels is None else labels[block],
            None if kd_mask is None else kd_mask[block],
            kd_scale[block],
            ce_scale[block],
            *settings,
        )
        if grad_out is not None:
            grad_out[block] = grad
    return kd, ce


def kd_loss_ref(
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    labels: Tensor | None,  # (N,)
    kd_mask: Tensor | None,  # (N,)
    kd_scale: Tensor,  # () or (N,)
    ce_scale: Tensor,  # () or (N,)
    temperature: float,
    divergence: int,
    jsd_beta: float,
    ignore_index: int,
    label_smoothing: float,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = _empty_grad(student, with_grad)
    kd, ce = _rows_ref(
        student,
        teacher,
        None,
        None,
        labels,
        kd_mask,
        kd_scale,
        ce_scale,
        (temperature, divergence, jsd_beta, ignore_index, label_smoothing),
        grad if with_grad else None,
    )
    return combine_rows(kd, ce, kd_scale, ce_scale, reduce), kd, ce, grad


# --- registration and autograd ------------------------------------------------------------------------------


def _empty_grad(student: Tensor, with_grad: bool) -> Tensor:
    return student.new_empty(student.shape if with_grad else (0,), dtype=saved_grad_dtype(student.dtype))


def _fake(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    kd_mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    temperature: float,
    divergence: int,
    jsd_beta: float,
    ignore_index: int,
    label_smoothing: float,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = student.new_empty(student.shape[0], dtype=accumulation_dtype(student.dtype))
    loss = rows.new_empty(()) if reduce else torch.empty_like(rows)
    return loss, rows, torch.empty_like(rows), _empty_grad(student, with_grad)


def _fake_(student: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = student.new_empty(student.shape[0], dtype=accumulation_dtype(student.dtype))
    return rows, torch.empty_like(rows)


define(SCHEMA, eager=kd_loss_ref, fake=_fake, kernel="kd_loss")
define(SCHEMA_, eager=kd_loss_ref_, fake=_fake_, kernel="kd_loss")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, with_grad = inputs[0], inputs[-1]
    loss, kd, ce, grad = output
    ctx.mark_non_differentiable(kd, ce, grad, *(() if with_grad else (loss,)))
    ctx.set_materialize_grads(False)
    ctx.student_dtype = student.dtype
    ctx.save_for_backward(grad)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("kd_loss")
    (grad,) = ctx.saved_tensors
    student_grad = None if upstream is None else upstream_times(grad, upstream, ctx.student_dtype)
    return (student_grad, *(None,) * 12)


torch.library.register_autograd("fastdistil::kd_loss_fwd", _backward, setup_context=_setup_context)


# --- public function ----------------------------------------------------------------------------------------


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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
    """Distillation of logits, and cross-entropy with labels, in one read of each logit.

    With p = softmax(student / T) and q = softmax(teacher / T), each row's loss is ::

        kd_weight * T**2 * D(q || p) + ce_weight * cross_entropy(student, label)

    where D is, by `divergence`:

    - `"forward_kl"`: KL(q || p) = sum q log(q / p), the soft-target loss of Hinton et al. (2015), section 2,
      and L_ce of DistilBERT (Sanh et al., 2019);
    - `"reverse_kl"`: KL(p || q), the mode-seeking direction of MiniLLM (Gu et al., 2024, equation 1);
    - `"jsd"`: jsd_beta KL(q || m) + (1 - jsd_beta) KL(p || m), m = jsd_beta q + (1 - jsd_beta) p, the
      Jensen-Shannon divergence with weights (Lin, 1991, equation 4.1).

    **The factor T² is always applied** (Hinton et al.: it keeps the size of the gradient when T changes); the
    cross-entropy is taken at T = 1.

    Args:
        student_logits: `(..., V)`; float32, bfloat16, float16 or float64; any strides. The only input with a
            gradient.
        teacher_logits: `(..., V)`, the same shape, any of these dtypes. `-inf` is legal where both sides have
            it.
        labels: `(...)`, integers in `[0, V)` or `ignore_index`. Rows with `ignore_index` have no
            cross-entropy.
        temperature: T > 0.
        kd_weight, ce_weight: floats or 0-dim tensors; constants, they get no gradient.
        jsd_beta: the teacher's share of the mixture, inside (0, 1).
        kd_mask: `(...)`, bool or 0/1, true at the rows to distil. Default: the rows with a label that counts;
            without labels, all rows.
        label_smoothing: in [0, 1); the target is (1 - label_smoothing) * onehot + label_smoothing / V.
        reduction: `"mean"` divides each term by the number of rows that it uses (no row: 0, never NaN),
            `"sum"`, `"none"` (one value a row, shape `(...)`).
        return_terms: return `(loss, kd, ce)`: the terms reduced as the loss is, unweighted (kd includes T²),
            detached.

    Returns:
        The loss in float32 (float64 for float64 students).

    Memory: one tensor of the student's shape, the gradient, which is computed here and kept for backward (in
    float32 for float16 students, where it would underflow before a loss scaler acts). Nothing else of size V.

    Raises:
        ValueError: an argument of another type, such as an output of a model for its logits; shapes, dtypes,
            devices or vocabularies that do not fit, a temperature that is not > 0 and finite, a ce_weight
            without labels, an unknown divergence or reduction, labels outside `[0, V)` (on a GPU and in
            compiled code: a device assertion, without a synchronisation).
        RuntimeError: backward with `create_graph=True`; forward-mode differentiation.
    """
    checks.check_tensors(
        {"student_logits": student_logits, "teacher_logits": teacher_logits},
        {"labels": labels, "kd_mask": kd_mask},
    )
    check_settings(temperature, divergence, jsd_beta, label_smoothing, reduction)
    checks.refuse_forward_mode("kd_loss", student_logits)
    checks.check_floating("student_logits", student_logits)
    checks.check_floating("teacher_logits", teacher_logits)
    if student_logits.dim() == 0:
        raise ValueError("student_logits must have shape (..., V), got a 0-dim tensor")
    if teacher_logits.dim() > 0 and teacher_logits.shape[-1] != student_logits.shape[-1]:
        raise ValueError(
            "student and teacher must share one vocabulary: "
            f"student_logits has V={student_logits.shape[-1]}, "
            f"teacher_logits has V={teacher_logits.shape[-1]}"
        )
    checks.check_shape("teacher_logits", teacher_logits, student_logits.shape, "that of student_logits")
    checks.check_device("teacher_logits", teacher_logits, student_logits.device)
    shape, vocabulary = student_logits.shape[:-1], student_logits.shape[-1]
    if vocabulary == 0:
        raise ValueError("student_logits must have a vocabulary, got V=0")

    terms = prepare_terms(
        labels,
        kd_mask,
        shape,
        student_logits.device,
        accumulation_dtype(student_logits.dtype),
        vocabulary,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        return_terms=return_terms,
    )
    loss, kd, ce, _ = torch.ops.fastdistil.kd_loss_fwd(
        as_rows(student_logits),
        as_rows(teacher_logits.detach()),
        terms.labels,
        terms.kd_mask,
        terms.kd_scale,
        terms.ce_scale,
        temperature,
        DIVERGENCES[divergence],
        jsd_beta,
        ignore_index,
        label_smoothing,
        reduction != "none",
        torch.is_grad_enabled() and student_logits.requires_grad,
    )
    return terms.outputs(reduction, shape, loss, kd, ce, return_terms)
