"""Mean squared error of raw attention scores, and its gradient, in time linear in L and without maps.

With X = [as Qs, -at Qt] and Y = [Ks, Kt], both (L, ds + dt), the difference of the scores is X Yᵀ, and

    sum_i w_i sum_j (X Yᵀ)_ij²  =  <Xᵀ W X, Yᵀ Y>,    dX = 2 W X (Yᵀ Y),    dY = 2 Y (Xᵀ W X)

where only matrices of (ds + dt)² numbers a head are formed. This needs a mask that is separable, one value a
token; for a mask of pairs the scores are formed tile by tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.ops import checks
from fastdistil.ops.attention import check_attention, pairs_of_block, query_blocks, without_masked
from fastdistil.ops.registry import define
from fastdistil.ops.scale_grad import refuse_double_backward, upstream_times
from fastdistil.ops.terms import accumulation_dtype, at_least_one, saved_grad_dtype, wide_dtype

_ARGUMENTS = "Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? mask"
_SCALES = "float student_scale, float teacher_scale"
SCHEMA = f"""attention_mse_fwd(
    {_ARGUMENTS}, Tensor weight, {_SCALES}, bool with_grad
) -> (Tensor loss, Tensor grad_q, Tensor grad_k)"""
SCHEMA_PAIRS = SCHEMA.replace("attention_mse_fwd", "attention_mse_pairs_fwd")
SCHEMA_ROWS = f"attention_mse_rows({_ARGUMENTS}, {_SCALES}) -> Tensor"


def attention_mse_ref(
    student_q: Tensor,  # (B, H, L, ds)
    student_k: Tensor,  # (B, H, L, ds)
    teacher_q: Tensor,  # (B, H, L, dt)
    teacher_k: Tensor,  # (B, H, L, dt)
    mask: Tensor | None,  # (B, L)
    weight: Tensor,  # () or (B, H, L)
    student_scale: float,
    teacher_scale: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k = _empty_grads(student_q, student_k, with_grad)
    dtype, size = accumulation_dtype(student_q.dtype), student_q.shape[3]
    loss = student_q.new_zeros((), dtype=wide_dtype(student_q.device, student_q.dtype))
    for index in range(student_q.shape[0]):  # one sequence at a time bounds the temporaries
        x, y = _operands(
            student_q, student_k, teacher_q, teacher_k, mask, student_scale, teacher_scale, index
        )
        weighted = x * (weight if weight.dim() == 0 else weight[index].unsqueeze(-1))
        gram_x, gram_y = weighted.mT @ x, y.mT @ y  # (H, ds + dt, ds + dt)
        loss += (gram_x * gram_y).sum()
        if with_grad:
            of_q, of_k = (2 * gram[..., :size].to(dtype) for gram in (gram_y, gram_x))
            grad_q[index] = student_scale * (weighted.to(dtype) @ of_q)
            grad_k[index] = y.to(dtype) @ of_k
    return loss.to(dtype), grad_q, grad_k


def attention_mse_pairs_ref(
    student_q: Tensor,  # (B, H, L, ds)
    student_k: Tensor,  # (B, H, L, ds)
    teacher_q: Tensor,  # (B, H, L, dt)
    teacher_k: Tensor,  # (B, H, L, dt)
    mask: Tensor,  # (B, L, L)
    weight: Tensor,  # () or (B, H, L)
    student_scale: float,
    teacher_scale: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k = _empty_grads(student_q, student_k, with_grad)
    dtype = accumulation_dtype(student_q.dtype)
    loss = student_q.new_zeros((), dtype=wide_dtype(student_q.device, student_q.dtype))
    q, k = _without_masked(student_q, student_k, mask, dtype)
    total_k = torch.zeros_like(k)
    for rows in query_blocks(student_q):
        error = _pair_errors(q, k, teacher_q, teacher_k, mask, student_scale, teacher_scale, rows)
        weighted = error * (weight if weight.dim() == 0 else weight[:, :, rows, None])
        loss += (weighted * error).sum(dtype=loss.dtype)
        if with_grad:
            weighted *= 2 * student_scale
            grad_q[:, :, rows] = weighted @ k
            total_k += weighted.mT @ q[:, :, rows]
    if with_grad:
        grad_k.copy_(total_k)
    return loss.to(dtype), grad_q, grad_k


def attention_mse_rows_ref(
    student_q: Tensor,  # (B, H, L, ds)
    student_k: Tensor,  # (B, H, L, ds)
    teacher_q: Tensor,  # (B, H, L, dt)
    teacher_k: Tensor,  # (B, H, L, dt)
    mask: Tensor | None,  # (B, L) or (B, L, L)
    student_scale: float,
    teacher_scale: float,
) -> Tensor:
    """The sum of squared errors of each query row (B, H, L)."""
    sums = _rows_fake(student_q)
    if mask is None or mask.dim() == 2:
        for index in range(student_q.shape[0]):
            x, y = _operands(
                student_q, student_k, teacher_q, teacher_k, mask, student_scale, teacher_scale, index
            )
            sums[index] = ((x @ (y.mT @ y)) * x).sum(-1).clamp(min=0)
        return sums
    q, k = _without_masked(student_q, student_k, mask, sums.dtype)
    for rows in query_blocks(student_q):
        error = _pair_errors(q, k, teacher_q, teacher_k, mask, student_scale, teacher_scale, rows)
        sums[:, :, rows] = error.square().sum(-1)
    return sums


def _without_masked(q: Tensor, k: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return without_masked(q, mask, keys=False).to(dtype), without_masked(k, mask, keys=True).to(dtype)


def _operands(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    index: int,
) -> tuple[Tensor, Tensor]:
    """X and Y of one sequence, (H, L, ds + dt), zero at the tokens that do not count.

    They are float64, where the device has it, whatever the inputs are: near convergence the Gram products
    cancel to a value that is many orders smaller.
    """
    wide = wide_dtype(student_q.device, student_q.dtype)
    own = None if mask is None else mask[index, :, None]

    def select(tensor: Tensor) -> Tensor:
        return tensor[index] if own is None else torch.where(own, tensor[index], 0)

    x = torch.cat(
        [select(student_q).to(wide) * student_scale, select(teacher_q).to(wide) * -teacher_scale], -1
    )
    return x, torch.cat([select(student_k).to(wide), select(teacher_k).to(wide)], -1)


def _pair_errors(
    q: Tensor,  # (B, H, L, ds), in the accumulation dtype, as k: zero where masked
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor,
    student_scale: float,
    teacher_scale: float,
    rows: slice,
) -> Tensor:
    """Student's less teacher's scores of a block of queries (B, H, block, L), 0 where a pair does not
    count."""
    teacher = teacher_q[:, :, rows].to(q.dtype) @ teacher_k.to(q.dtype).mT
    error = student_scale * (q[:, :, rows] @ k.mT) - teacher_scale * teacher
    pairs = pairs_of_block(mask, rows)
    assert pairs is not None
    return torch.where(pairs, error, 0)


def _empty_grads(student_q: Tensor, student_k: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    dtype = saved_grad_dtype(student_q.dtype)
    if not with_grad:
        return student_q.new_empty(0, dtype=dtype), student_k.new_empty(0, dtype=dtype)
    return torch.empty_like(student_q, dtype=dtype), torch.empty_like(student_k, dtype=dtype)


def _fwd_fake(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    student_scale: float,
    teacher_scale: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = student_q.new_empty((), dtype=accumulation_dtype(student_q.dtype))
    return loss, *_empty_grads(student_q, student_k, with_grad)


def _rows_fake(student_q: Tensor, *_: Any) -> Tensor:
    return student_q.new_empty(student_q.shape[:3], dtype=accumulation_dtype(student_q.dtype))


define(SCHEMA, eager=attention_mse_ref, fake=_fwd_fake, kernel="attention_mse")
define(SCHEMA_PAIRS, eager=attention_mse_pairs_ref, fake=_fwd_fake, composed="PyTorch matrix products")
define(SCHEMA_ROWS, eager=attention_mse_rows_ref, fake=_rows_fake, composed="PyTorch matrix products")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    with_grad = inputs[-1]
    loss, grad_q, grad_k = output
    ctx.mark_non_differentiable(grad_q, grad_k, *(() if with_grad else (loss,)))
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(grad_q, grad_k)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("attention_mse")
    if upstream is None:
        return (None,) * 9
    grads = (
        upstream_times(grad, upstream, dtype)
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return (*grads, *(None,) * 7)


def _setup_rows_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.student_scale, ctx.teacher_scale = inputs
    ctx.save_for_backward(*tensors)


def _rows_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("attention_mse")
    *tensors, mask = ctx.saved_tensors
    op = _op_for(mask)
    _, *grads = op(*tensors, mask, upstream.contiguous(), ctx.student_scale, ctx.teacher_scale, True)
    student_q, student_k = tensors[:2]
    return grads[0].to(student_q.dtype), grads[1].to(student_k.dtype), *(None,) * 5


for name in ("attention_mse_fwd", "attention_mse_pairs_fwd"):
    torch.library.register_autograd(f"fastdistil::{name}", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "fastdistil::attention_mse_rows", _rows_backward, setup_context=_setup_rows_context
)


def _op_for(mask: Tensor | None) -> Any:
    separable = mask is None or mask.dim() == 2
    ops = torch.ops.fastdistil
    return ops.attention_mse_fwd if separable else ops.attention_mse_pairs_fwd


def attention_mse(
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
    """Mean squared error of raw attention scores, the L_attn of TinyBERT (Jiao et al., 2020, equation 7). ::

        error = student_scale * student_q @ student_k.mT - teacher_scale * teacher_q @ teacher_k.mT
        mean of error ** 2 over the query-key pairs that count, of all heads

    The `(L, L)` scores of neither model are formed. With one mask value a token the time is linear in L, by
    products of (ds + dt)² numbers a head; they are accumulated in float64, so that the value keeps its
    relative accuracy when the student comes close to the teacher. With a mask of pairs the scores are formed
    tile by tile.

    Padding: a pair counts if both its tokens do. TinyBERT's code sets the scores at padded keys to 0 in both
    models, along with all others at or below -100, but keeps the rows of padded queries, and divides by all
    L² pairs of a batch; without padding (and such scores) both are the same.

    Args:
        student_q, student_k: `(B, H, L, ds)`, queries and keys of one layer; float32, bfloat16, float16 or
            float64; any strides. The only inputs with a gradient.
        teacher_q, teacher_k: `(B, H, L, dt)`, the same number of heads; the head size may differ.
        mask: `(B, L)`, bool or 0/1, true at the tokens that count; or `(B, L, L)`, true at the query-key
            pairs that count. Default: all.
        student_scale, teacher_scale: factor of the scores. Default: `d ** -0.5`.
        reduction: `"mean"` over the pairs that count, of all heads (no pair: 0, never NaN); `"sum"` over
            them; or `"none"`, the sum of each query row, `(B, H, L)`.

    Returns:
        The loss in float32 (float64 for float64 students).

    Memory: the gradients of student_q and student_k, computed here and kept for backward (in float32 for
    float16), and matrices of (ds + dt)² numbers. With `reduction="none"` the inputs are kept instead.

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
    checks.refuse_forward_mode("attention_mse", student_q, student_k)
    attention = check_attention(
        student_q, student_k, teacher_q, teacher_k, mask, student_scale, teacher_scale
    )
    *tensors, mask, student_scale, teacher_scale = attention
    if reduction == "none":
        rows: Tensor = torch.ops.fastdistil.attention_mse_rows(*attention)
        return rows
    weight = torch.ones((), device=student_q.device, dtype=accumulation_dtype(student_q.dtype))
    if reduction == "mean":
        weight = weight / at_least_one(attention.count_pairs())
    with_grad = torch.is_grad_enabled() and (student_q.requires_grad or student_k.requires_grad)
    loss: Tensor = _op_for(mask)(*tensors, mask, weight, student_scale, teacher_scale, with_grad)[0]
    # Where student and teacher agree, the products cancel to a rounding error of either sign.
    return loss.clamp(min=0)
