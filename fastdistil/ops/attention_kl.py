"""KL divergence of the student's attention distributions from the teacher's, and its gradient, without maps.

The forward keeps two numbers a row and model, an origin of the exponents and the sum of exponentials from
there; the backward computes the scores again, tile by tile, and from them and these the probabilities.
Logsumexps would be one number, but its rounding, relative to the scores, would be common to a row: it would
reach the gradient of a query times the mean key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.ops import checks
from fastdistil.ops.attention import check_attention, pairs_of_block, query_blocks, without_masked
from fastdistil.ops.registry import define
from fastdistil.ops.scale_grad import refuse_double_backward
from fastdistil.ops.terms import accumulation_dtype, at_least_one, sum_rows

SCHEMA_FWD = """attention_kl_fwd(
    Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? mask,
    float student_scale, float teacher_scale
) -> (Tensor kl, Tensor student_softmax, Tensor teacher_softmax)"""

SCHEMA_BWD = """attention_kl_bwd(
    Tensor weight, Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? mask,
    Tensor student_softmax, Tensor teacher_softmax, float student_scale, float teacher_scale
) -> (Tensor grad_q, Tensor grad_k)"""


def attention_kl_fwd_ref(
    student_q: Tensor,  # (B, H, L, ds)
    student_k: Tensor,  # (B, H, L, ds)
    teacher_q: Tensor,  # (B, H, L, dt)
    teacher_k: Tensor,  # (B, H, L, dt)
    mask: Tensor | None,  # (B, L) or (B, L, L)
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kl, student_softmax, teacher_softmax = _fwd_fake(
        student_q, student_k, teacher_q, teacher_k, mask, student_scale, teacher_scale
    )
    student_kt, teacher_kt = (
        _transposed_keys(student_k, mask, kl.dtype),
        _transposed_keys(teacher_k, mask, kl.dtype),
    )
    for rows in query_blocks(student_q):
        pairs = pairs_of_block(mask, rows)
        s, student_softmax[:, :, :, rows] = _log_softmax(
            student_q[:, :, rows], student_kt, student_scale, pairs
        )
        t, teacher_softmax[:, :, :, rows] = _log_softmax(
            teacher_q[:, :, rows], teacher_kt, teacher_scale, pairs
        )
        terms = t.exp() * (t - s)
        kl[:, :, rows] = (terms if pairs is None else torch.where(pairs, terms, 0)).sum(-1)
    return kl, student_softmax, teacher_softmax


def attention_kl_bwd_ref(
    weight: Tensor,  # (B, H, L), the upstream gradient of kl
    student_q: Tensor,  # (B, H, L, ds)
    student_k: Tensor,  # (B, H, L, ds)
    teacher_q: Tensor,  # (B, H, L, dt)
    teacher_k: Tensor,  # (B, H, L, dt)
    mask: Tensor | None,  # (B, L) or (B, L, L)
    student_softmax: Tensor,  # (2, B, H, L), from the forward of the same implementation
    teacher_softmax: Tensor,  # (2, B, H, L)
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = student_softmax.dtype
    q = without_masked(student_q, mask, keys=False).to(dtype)
    k = without_masked(student_k, mask, keys=True).to(dtype)
    student_kt, teacher_kt = k.transpose(2, 3), _transposed_keys(teacher_k, mask, dtype)
    grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k)
    for rows in query_blocks(student_q):
        pairs = pairs_of_block(mask, rows)
        s = _scores(student_q[:, :, rows], student_kt, student_scale, pairs)
        t = _scores(teacher_q[:, :, rows], teacher_kt, teacher_scale, pairs)
        g = _probabilities(s, student_softmax[:, :, :, rows])
        g -= _probabilities(t, teacher_softmax[:, :, :, rows])
        g *= student_scale * weight[:, :, rows, None]
        if pairs is not None:
            g = torch.where(pairs, g, 0)
        grad_q[:, :, rows] = g @ k
        grad_k += g.transpose(2, 3) @ q[:, :, rows]
    return torch.empty_like(student_q).copy_(grad_q), torch.empty_like(student_k).copy_(grad_k)


def _transposed_keys(k: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    return without_masked(k, mask, keys=True).to(dtype).transpose(2, 3)


def _scores(
    q: Tensor,  # (B, H, block, d)
    kt: Tensor,  # (B, H, d, L), in the accumulation dtype
    scale: float,
    pairs: Tensor | None,  # (B, 1, block, L)
) -> Tensor:
    scores = (q.to(kt.dtype) @ kt) * scale
    return scores if pairs is None else scores.masked_fill_(~pairs, float("-inf"))


def _log_softmax(q: Tensor, kt: Tensor, scale: float, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, H, block, L); maxima and sums of exponentials of the rows (2, B, H, block)."""
    scores = _scores(q, kt, scale, pairs)
    maximum = scores.amax(-1)
    if pairs is not None:
        maximum = maximum.masked_fill(maximum == float("-inf"), 0)  # no pair of the row counts
    scores -= maximum.unsqueeze(-1)
    total = scores.exp().sum(-1)
    return scores - total.log().unsqueeze(-1), torch.stack((maximum, total))


def _probabilities(scores: Tensor, softmax: Tensor) -> Tensor:
    """Of scores, which are overwritten, by the maxima and sums (2, B, H, block) of their rows."""
    maximum, total = softmax.unsqueeze(-1)
    return scores.sub_(maximum).exp_().div_(total)


def _fwd_fake(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student_q.dtype)
    kl = student_q.new_empty(student_q.shape[:3], dtype=dtype)
    student_softmax, teacher_softmax = (kl.new_empty((2, *kl.shape)) for _ in range(2))
    return kl, student_softmax, teacher_softmax


def _bwd_fake(weight: Tensor, student_q: Tensor, student_k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(student_q), torch.empty_like(student_k)


define(SCHEMA_FWD, eager=attention_kl_fwd_ref, fake=_fwd_fake, kernel="attention_kl")
define(SCHEMA_BWD, eager=attention_kl_bwd_ref, fake=_bwd_fake, kernel="attention_kl")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.student_scale, ctx.teacher_scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("attention_kl")
    if upstream is None:
        return (None,) * 7
    grads = torch.ops.fastdistil.attention_kl_bwd(
        upstream.contiguous(), *ctx.saved_tensors, ctx.student_scale, ctx.teacher_scale
    )
    return (*grads, *(None,) * 5)


torch.library.register_autograd("fastdistil::attention_kl_fwd", _backward, setup_context=_setup_context)


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None = None,
    *,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KL divergence of the student's attention distributions from the teacher's: the attention transfer of
    MiniLM (Wang et al., 2020, section 3.1, L_AT) and of MobileBERT (Sun et al., 2020, section 3, L_AT). ::

        A_t = softmax(teacher_scale * teacher_q @ teacher_k.mT)      # over the keys that count
        A_s = softmax(student_scale * student_q @ student_k.mT)
        KL_i = sum_j A_t[i, j] * (log A_t[i, j] - log A_s[i, j])     # of each query row i

    without allocating an `(L, L)` map of either model, forward or backward: tiles of scores pass through the
    cache, and the backward computes them again.

    Args:
        student_q, student_k: `(B, H, L, ds)`, queries and keys of one layer; float32, bfloat16, float16 or
            float64; any strides. The only inputs with a gradient.
        teacher_q, teacher_k: `(B, H, L, dt)`, the same number of heads; the head size may differ.
        mask: `(B, L)`, bool or 0/1, true at the tokens that count, as queries and as keys. Or `(B, L, L)`,
            true at the query-key pairs that count, as sliding windows need; a row then counts if it has a
            key. Default: all tokens.
        student_scale, teacher_scale: factor of the scores. Default: `d ** -0.5`.
        reduction: `"mean"` over the query rows that count, of all heads (no row: 0, never NaN), `"sum"`, or
            `"none"` (shape `(B, H, L)`, 0 at the rows that do not count).

    Returns:
        The loss in float32 (float64 for float64 students).

    Memory: five numbers a query row and head, `5 * B * H * L`; the inputs are kept for backward.

    Raises:
        ValueError: head counts that differ, other types, shapes, dtypes or devices that do not fit, an
            unknown reduction.
        RuntimeError: backward with `create_graph=True`; forward-mode differentiation.
    """
    checks.check_tensors(
        {"student_q": student_q, "student_k": student_k, "teacher_q": teacher_q, "teacher_k": teacher_k},
        {"mask": mask},
    )
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.refuse_forward_mode("attention_kl", student_q, student_k)
    attention = check_attention(
        student_q, student_k, teacher_q, teacher_k, mask, student_scale, teacher_scale
    )
    kl, _, _ = torch.ops.fastdistil.attention_kl_fwd(*attention)
    if reduction == "none":
        return kl
    total = sum_rows(kl)
    return total / at_least_one(attention.count_rows()) if reduction == "mean" else total
