"""Multiply a saved gradient by the upstream gradient, in place, and not at all where that is 1.

The losses compute their gradient in the forward pass. `loss.backward()` then has only the upstream gradient
to apply, which is 1 unless the loss is scaled: reading and writing the whole gradient for that would cost as
much as the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.ops.registry import define

SCHEMA = "scale_grad_(Tensor(a!) grad, Tensor scale) -> ()"


def scale_grad_ref_(
    grad: Tensor,  # (N, D)
    scale: Tensor,  # () or (N,)
) -> None:
    # Reading the scale back costs nothing on a CPU and a synchronisation anywhere else.
    if grad.device.type == "cpu" and bool((scale == 1).all()):
        return
    grad.mul_(scale if scale.dim() == 0 else scale.unsqueeze(-1))


def _fake(grad: Tensor, scale: Tensor) -> None:
    return None


define(SCHEMA, eager=scale_grad_ref_, fake=_fake, kernel="scale_grad")


def upstream_times(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """`upstream * grad` in `dtype`, for the backward of the losses: the only reader of a gradient saved in
    the forward.

    The saved buffer itself is scaled and handed on when the graph is freed after this backward. With
    `retain_graph=True` it is left as it is, so that the next backward finds it unscaled. In a traced graph,
    where a tensor subclass stands for the buffer, nobody knows yet how often the backward will run; and many
    upstream gradients at a time (`is_grads_batched=True`) have one buffer.
    """
    traced = type(grad) is not Tensor
    batched = torch._C._functorch.is_functorch_wrapped_tensor(
        upstream
    ) or torch._C._functorch.is_legacy_batchedtensor(upstream)
    if traced or batched or torch._C._autograd._get_current_graph_task_keep_graph():
        # The upstream gradient is rounded to a low precision only with the product.
        factor = upstream if upstream.dim() == 0 else upstream.unsqueeze(-1)
        return (grad * factor).to(dtype)
    torch.ops.fastdistil.scale_grad_(grad if grad.dim() == 2 else _as_one_row(grad), upstream)
    return grad.to(dtype)


def _as_one_row(grad: Tensor) -> Tensor:
    """The memory of a gradient that was allocated densely, in whatever order of its dimensions."""
    return grad.as_strided((1, grad.numel()), (grad.numel(), 1))


def refuse_double_backward(op: str) -> None:
    """Raise if the backward itself is being recorded: the gradient was computed in the forward and has no
    graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} cannot be differentiated twice: its gradient is computed in the forward pass, "
            "so backward with create_graph=True is not supported"
        )


def register_kept_gradient(op: str) -> None:
    """The autograd of `fastdistil::<op>_fwd(student, ..., with_grad) -> (loss, grad)`, which computes the
    gradient of the summed losses by the student in the forward and keeps it."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        student, with_grad = inputs[0], inputs[-1]
        loss, grad = output
        ctx.mark_non_differentiable(grad, *(() if with_grad else (loss,)))
        ctx.set_materialize_grads(False)
        ctx.student_dtype, ctx.others = student.dtype, len(inputs) - 1
        ctx.save_for_backward(grad)

    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(op)
        (grad,) = ctx.saved_tensors
        student_grad = None if upstream is None else upstream_times(grad, upstream, ctx.student_dtype)
        return (student_grad, *(None,) * ctx.others)

    torch.library.register_autograd(f"fastdistil::{op}_fwd", backward, setup_context=setup_context)
