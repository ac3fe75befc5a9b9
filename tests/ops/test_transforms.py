"""What torch may do around an op: forward-mode and batched differentiation, inference mode, tracing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from fastdistil import (
    attention_kl,
    attention_mse,
    cosine_loss,
    hidden_mse,
    kd_loss,
    linear_kd_loss,
    relation_kl,
)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in [-2, 2], by no generator: vmap refuses those."""
    return 2 * torch.sin((1.7 + 0.37 * seed) * torch.arange(1.0, 1 + math.prod(shape))).view(shape)


ROWS, HEADS, STATES = (6, 16), (1, 2, 6, 8), (1, 6, 16)
# Name -> a function of the student alone, and the student's shape.
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "kd_loss": (lambda x: kd_loss(x, tensor(*ROWS, seed=1)), ROWS),
    "linear_kd_loss": (
        lambda x: linear_kd_loss(x, tensor(9, 16, seed=2), tensor(*ROWS, seed=1), tensor(9, 16, seed=3)),
        ROWS,
    ),
    "weight of linear_kd_loss": (
        lambda x: linear_kd_loss(tensor(4, 16, seed=2), x, tensor(4, 16, seed=1), tensor(*ROWS, seed=3)),
        ROWS,
    ),
    "cosine_loss": (lambda x: cosine_loss(x, tensor(*ROWS, seed=1)), ROWS),
    "hidden_mse": (lambda x: hidden_mse(x, tensor(*ROWS, seed=1)), ROWS),
    "projection of hidden_mse": (lambda x: hidden_mse(tensor(4, 16), tensor(4, 6, seed=1), x), ROWS),
    "attention_kl": (lambda x: attention_kl(x, *(tensor(*HEADS, seed=i) for i in (1, 2, 3))), HEADS),
    "keys of attention_mse": (
        lambda x: attention_mse(tensor(*HEADS, seed=1), x, *(tensor(*HEADS, seed=i) for i in (2, 3))),
        HEADS,
    ),
    "relation_kl": (lambda x: relation_kl(x, tensor(*STATES, seed=1), 2), STATES),
}


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused_and_not_zero(name: str) -> None:
    function, shape = LOSSES[name]
    student, tangent = tensor(*shape), tensor(*shape, seed=9)
    refused = "forward-mode differentiation, torch.func.grad and torch.func.jvp are not supported"
    with pytest.raises(RuntimeError, match=refused):
        torch.func.jvp(function, (student,), (tangent,))
    with pytest.raises(RuntimeError, match=refused):
        torch.func.grad(function)(student)
    with pytest.raises(RuntimeError, match=refused):
        torch.func.grad(lambda x: torch.func.vmap(function)(x).sum())(student[None])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=refused):
        function(forward_ad.make_dual(student, tangent))
    function(student)


@pytest.mark.parametrize("name", ["kd_loss", "cosine_loss", "hidden_mse"])
def test_gradients_of_many_upstreams_at_a_time(name: str) -> None:
    by_rows = {
        "kd_loss": lambda x: kd_loss(x, tensor(*ROWS, seed=1), reduction="none"),
        "cosine_loss": lambda x: cosine_loss(x, tensor(*ROWS, seed=1), reduction="none"),
        "hidden_mse": lambda x: hidden_mse(x, tensor(*ROWS, seed=1), reduction="none"),
    }[name]
    student = tensor(*ROWS).requires_grad_()
    upstreams = torch.eye(ROWS[0])
    (together,) = torch.autograd.grad(by_rows(student), student, upstreams, is_grads_batched=True)
    each = [torch.autograd.grad(by_rows(student), student, upstream)[0] for upstream in upstreams]
    torch.testing.assert_close(together, torch.stack(each))
    jacobian = torch.autograd.functional.jacobian(by_rows, student, vectorize=True)
    torch.testing.assert_close(jacobian, torch.stack(each))


def _in_inference_mode(*tensors: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [x.clone() for x in tensors]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_but_the_student_may_come_from_inference_mode(reduction: str) -> None:
    labels, tokens = torch.tensor([[1, -100, 3, 0, 2, -100]]), torch.tensor([[True] * 5 + [False]])
    weight, states, heads = tensor(9, 16, seed=2), tensor(*STATES, seed=1), tensor(*HEADS, seed=3)

    def losses(
        labels: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, states: Tensor, heads: Tensor
    ) -> list[Callable[[Tensor], Tensor]]:
        own, shared = tensor(9, 16, seed=4), {"reduction": reduction}
        return [
            lambda x: kd_loss(x, states, labels, ce_weight=1.0, **shared),
            lambda x: linear_kd_loss(
                x, own, states, weight, labels, teacher_bias=bias, ce_weight=1.0, kd_mask=tokens, **shared
            ),
            lambda x: cosine_loss(x, states, tokens, **shared),
            lambda x: hidden_mse(x, states, tensor(16, 16, seed=5), None, tokens, **shared),
            lambda x: attention_kl(*2 * [x.view(1, 6, 2, 8).transpose(1, 2)], heads, heads, tokens, **shared),
            lambda x: attention_mse(
                *2 * [x.view(1, 6, 2, 8).transpose(1, 2)], heads, heads, tokens, **shared
            ),
        ]

    others = (labels, tokens, weight, tensor(9, seed=6), states, heads)
    for inferred, plain in zip(losses(*_in_inference_mode(*others)), losses(*others), strict=True):
        grads = []
        for loss in (inferred, plain):
            student = tensor(*STATES, seed=7).requires_grad_()
            grads.append(torch.autograd.grad(loss(student).sum(), student)[0])
        assert torch.equal(*grads)


def _recompiled(function: Callable[..., Tensor], *args: Any, **settings: Any) -> None:
    """The same values compiled in one graph as eagerly, for each value of the settings in turn."""
    torch._dynamo.reset()
    for dynamic in (None, True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for values in zip(*settings.values(), strict=True):
            chosen = dict(zip(settings, values, strict=True))
            torch.testing.assert_close(compiled(*args, **chosen), function(*args, **chosen))


def test_settings_may_change_from_step_to_step_in_one_compiled_graph() -> None:
    student, labels = tensor(*ROWS).requires_grad_(), torch.tensor([1, 2, -100, 4, 5, 6])
    teacher, own, weight = tensor(*ROWS, seed=1), tensor(16, 16, seed=2), tensor(16, 16, seed=3)
    annealed = {"temperature": (4.0, 3.0, 2.5), "kd_weight": (1.0, 0.75, 0.5), "ce_weight": (0.5, 0.75, 1.0)}
    _recompiled(kd_loss, student, teacher, labels, **annealed)
    _recompiled(linear_kd_loss, student, own, teacher, weight, labels, **annealed)
    heads = [tensor(*HEADS, seed=i).requires_grad_(i < 2) for i in range(4)]
    _recompiled(attention_kl, *heads, student_scale=(0.5, 0.4, 0.3))


def test_shapes_alone_can_be_traced() -> None:
    with FakeTensorMode() as mode:
        logits, labels = torch.empty(4, 9, requires_grad=True), torch.zeros(4, dtype=torch.long)
        assert isinstance(logits, type(mode.from_tensor(torch.empty(1))))
        loss = kd_loss(logits, torch.empty(4, 9), labels, ce_weight=1.0)
        (grad,) = torch.autograd.grad(loss, logits)
    assert loss.shape == ()
    assert grad.shape == (4, 9)
