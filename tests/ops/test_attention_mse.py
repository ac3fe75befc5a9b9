"""attention_mse alone: its operators, the value near convergence, and what TinyBERT's code computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdistil import attention_mse


def heads(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("implementation")
def test_opcheck(masked: bool, weighted: bool, device: torch.device) -> None:
    q, k = (heads(2, 2, 6, 8, seed=i).to(device).requires_grad_() for i in range(2))
    t_q, t_k = (heads(2, 2, 6, 12, seed=i).to(device) for i in (2, 3))
    mask = torch.arange(6, device=device) < torch.tensor([[6], [4]], device=device) if masked else None
    # Positive: opcheck compares outputs after a backward, which would have scaled a kept gradient by -1.
    weight = heads(2, 2, 6, seed=4).abs().to(device) if weighted else torch.tensor(0.5, device=device)
    op = torch.ops.fastdistil.attention_mse_fwd.default
    torch.library.opcheck(op, (q, k, t_q, t_k, mask, weight, 0.3, 0.2, True))


@pytest.mark.parametrize("op", ["attention_mse_pairs_fwd", "attention_mse_rows"])
def test_opcheck_of_the_composed_forms(op: str) -> None:
    q, k = (heads(2, 2, 6, 8, seed=i).requires_grad_() for i in range(2))
    t_q, t_k = (heads(2, 2, 6, 12, seed=i) for i in (2, 3))
    pairs = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(5)) > 0.3
    rest = (torch.tensor(0.5), 0.3, 0.2, True) if op == "attention_mse_pairs_fwd" else (0.3, 0.2)
    torch.library.opcheck(getattr(torch.ops.fastdistil, op).default, (q, k, t_q, t_k, pairs, *rest))


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
@pytest.mark.usefixtures("implementation")
def test_the_value_keeps_its_accuracy_near_the_teacher(distance: float, device: torch.device) -> None:
    teacher = [heads(2, 2, 96, 32, seed=i).to(device) for i in range(2)]
    q, k = ((t + distance * heads(*t.shape, seed=7).to(device)).requires_grad_() for t in teacher)
    loss = attention_mse(q, k, *teacher)
    wide_q, wide_k = (tensor.detach().double().requires_grad_() for tensor in (q, k))
    scores = [a.double() @ b.double().mT * 32**-0.5 for a, b in ((wide_q, wide_k), teacher)]
    exact = F.mse_loss(*scores)
    assert abs(loss.item() / exact.item() - 1) < 1e-3
    for own, expected in zip(
        torch.autograd.grad(loss, (q, k)), torch.autograd.grad(exact, (wide_q, wide_k)), strict=True
    ):
        # The difference of the scores has that much fewer digits than the scores.
        assert (own - expected).abs().max() < 1e-6 / distance * expected.abs().max()


@pytest.mark.parametrize("length", [7, 300])
@pytest.mark.usefixtures("implementation")
def test_equal_scores_have_no_error_and_none_below_zero(length: int, device: torch.device) -> None:
    for seed in range(8):
        q, k = (heads(1, 2, length, 8, seed=seed + i).to(device).requires_grad_() for i in (0, 100))
        loss = attention_mse(q, k, q.detach().clone(), k.detach().clone())
        assert 0 <= loss.item() < 1e-11
        assert all(grad.abs().max() < 1e-6 for grad in torch.autograd.grad(loss, (q, k)))


@pytest.mark.usefixtures("implementation")
def test_it_is_tinybert_without_padding_and_counts_no_padding_with_it(device: torch.device) -> None:
    """task_distill.py sets scores at or below -1e2 to 0 in both models and averages over all L² pairs."""
    tensors = [heads(2, 3, 10, 8, seed=i).to(device) for i in range(4)]
    mask = torch.arange(10, device=device) < torch.tensor([[10], [6]], device=device)
    scores = [q @ k.mT * 8**-0.5 for q, k in (tensors[:2], tensors[2:])]
    tinybert = F.mse_loss(*(torch.where(s <= -1e2, 0.0, s) for s in scores))
    torch.testing.assert_close(attention_mse(*tensors), tinybert)

    additive = torch.where(mask, 0.0, -10000.0)[:, None, None]
    padded = F.mse_loss(*(torch.where(s + additive <= -1e2, 0.0, s + additive) for s in scores))
    # It keeps the padded queries: 10 x 6 pairs of the second sequence are in the sum, all 100 in the mean.
    error = (scores[0] - scores[1]) ** 2
    assert torch.isclose(padded, (error[0].sum() + error[1, :, :, :6].sum()) / (2 * 3 * 100))
    ours = (error[0].sum() + error[1, :, :6, :6].sum()) / (3 * (100 + 36))
    torch.testing.assert_close(attention_mse(*tensors, mask), ours)


@pytest.mark.usefixtures("implementation")
def test_a_mask_of_pairs_that_is_separable_gives_the_same(device: torch.device) -> None:
    q, k, t_q, t_k = (
        heads(2, 2, 9, 8, seed=i, dtype=torch.float64).to(device).requires_grad_() for i in range(4)
    )
    mask = torch.arange(9, device=device) < torch.tensor([[9], [5]], device=device)
    pairs = mask[:, :, None] & mask[:, None, :]
    losses = [attention_mse(q, k, t_q, t_k, m) for m in (mask, pairs)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)
    grads = (torch.autograd.grad(loss, (q, k)) for loss in losses)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    assert torch.autograd.grad(attention_mse(q, k, t_q, t_k), (t_q,), allow_unused=True) == (None,)
