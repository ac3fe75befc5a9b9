"""relation_kl: MiniLM's relations from whole maps, and what a user may do wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistil import relation_kl
from fastdistil.nn import RelationKL


def states(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def maps(x: Tensor, heads: int, mask: Tensor) -> Tensor:
    """log softmax(X_a X_aᵀ / sqrt(d)) over the tokens that count (B, A, L, L)."""
    batch, length, width = x.shape
    x = x.view(batch, length, heads, width // heads).transpose(1, 2)
    scores = x @ x.transpose(2, 3) / (width // heads) ** 0.5
    return scores.masked_fill(~mask[:, None, None, :], -1e9).log_softmax(-1)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.usefixtures("implementation")
def test_value_and_gradient_are_those_of_the_maps(heads: int, device: torch.device) -> None:
    student = states(2, 9, 12, seed=0).to(device).requires_grad_()
    teacher = states(2, 9, 24, seed=1).to(device).requires_grad_()
    mask = torch.arange(9, device=device) < torch.tensor([[9], [5]], device=device)
    loss = relation_kl(student, teacher, heads, mask)
    s, t = maps(student, heads, mask), maps(teacher.detach(), heads, mask)
    rows = (t.exp() * (t - s)).sum(-1) * mask[:, None]
    expected = rows.sum() / (14 * heads)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    grads = (torch.autograd.grad(x, student)[0] for x in (3 * loss, 3 * expected))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(relation_kl(student, teacher, heads, mask, reduction="none"), rows)
    assert (
        torch.autograd.grad(relation_kl(student, teacher, heads), (student, teacher), allow_unused=True)[1]
        is None
    )


def test_module_is_the_function() -> None:
    student, teacher = states(1, 5, 8, seed=0), states(1, 5, 16, seed=1)
    assert torch.equal(
        RelationKL(4, reduction="sum")(student, teacher), relation_kl(student, teacher, 4, reduction="sum")
    )


X = torch.zeros(2, 3, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (X, torch.zeros(2, 3, 18), 4),
            r"num_heads must divide .* 12 \(student\) and 18 \(teacher\), got 4; .* 1, 2, 3, 6",
        ),
        ((X, X, 0), "num_heads must divide .* got 0"),
        ((X, torch.zeros(2, 4, 12), 2), r"teacher_states must have shape \(2, 3, 12\) .* got \(2, 4, 12\)"),
        ((X[0], X, 2), r"student_states must have shape \(B, L, D\), got \(3, 12\)"),
        ((X.int(), X, 2), "student_states must be float32"),
        ((X, X, 2, torch.ones(3, 3).bool()), "mask must have shape"),
    ],
)
def test_a_mistake_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relation_kl(*arguments)
