"""attention_kl alone: its operators, equal models, large scores, memory that does not grow with L²."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from fastdistil import attention_kl


def heads(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("mask", [None, "padding", "pairs"])
@pytest.mark.usefixtures("implementation")
def test_opcheck(mask: str | None, device: torch.device) -> None:
    q, k = (heads(2, 2, 6, 8, seed=i).to(device).requires_grad_() for i in range(2))
    t_q, t_k = (heads(2, 2, 6, 12, seed=i).to(device) for i in (2, 3))
    counts = None
    if mask is not None:
        counts = torch.ones(2, 6, dtype=torch.bool, device=device)
        counts[1, 4:] = False
        counts = counts[:, :, None] & counts[:, None] if mask == "pairs" else counts
    forward = torch.ops.fastdistil.attention_kl_fwd.default
    torch.library.opcheck(forward, (q, k, t_q, t_k, counts, 0.3, 0.2))
    with torch.no_grad():
        kl, *softmax = forward(q, k, t_q, t_k, counts, 0.3, 0.2)
        tensors = (torch.ones_like(kl), q.detach(), k.detach(), t_q, t_k, counts, *softmax)
    torch.library.opcheck(torch.ops.fastdistil.attention_kl_bwd.default, (*tensors, 0.3, 0.2))


@pytest.mark.usefixtures("implementation")
def test_equal_attention_has_no_divergence_and_no_gradient(device: torch.device) -> None:
    q, k = (heads(1, 2, 40, 16, seed=i).to(device).requires_grad_() for i in range(2))
    loss = attention_kl(q, k, q.detach().clone(), k.detach().clone())
    assert abs(loss.item()) < 1e-6
    assert all(grad.abs().max() < 1e-7 for grad in torch.autograd.grad(loss, (q, k)))


@pytest.mark.usefixtures("implementation")
def test_scores_that_overflow_an_exponential(device: torch.device) -> None:
    # Scores of hundreds: exp overflows, and far below the maximum it underflows.
    inputs = [12 * heads(1, 1, 24, 8, seed=i).to(device) for i in range(4)]
    q, k, t_q, t_k = (tensor.double() for tensor in inputs)
    s, t = ((x @ y.mT * 8**-0.5).log_softmax(-1) for x, y in ((q.requires_grad_(), k), (t_q, t_k)))
    exact = (t.exp() * (t - s)).sum() / 24
    (expected,) = torch.autograd.grad(exact, q)

    inputs[0].requires_grad_()
    loss = attention_kl(*inputs)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    # The rounding of a score in float32 is relative to it, and its exponential's that much.
    slack = 2 * torch.finfo(torch.float32).eps * (q @ k.mT).abs().max().item() * 8**-0.5
    (grad,) = torch.autograd.grad(loss, inputs[0])
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=slack * expected.abs().max().item())


@pytest.mark.parametrize("offset", ["all", "one"])
@pytest.mark.parametrize("size", [5.0, 20.0])
@pytest.mark.usefixtures("implementation")
def test_scores_that_share_an_offset_have_the_gradients_of_plain_pytorch(
    size: float, offset: str, device: torch.device
) -> None:
    """Queries and keys with a common part, in all dimensions or in one: any error of a row's probabilities
    that is common to them reaches the gradient of its query times the mean key. The student is near its
    teacher, so that little else is in the gradient."""
    common = torch.full((32,), size)
    if offset == "one":
        common = torch.zeros(32)
        common[3] = 5 * size
    student = [(heads(1, 2, 64, 32, seed=i) + common).to(device) for i in range(2)]
    teacher = [x + 0.1 * heads(1, 2, 64, 32, seed=i + 2).to(device) for i, x in enumerate(student)]
    grads = []
    for function, dtype in ((attention_kl, torch.float32), (_plain, torch.float32), (_plain, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in student]
        loss = function(*leaves, *(x.to(dtype) for x in teacher))
        grads.append(torch.autograd.grad(loss, leaves))
    for ours, plain, exact in zip(*grads, strict=True):
        errors = [(x.double() - exact).norm() / exact.norm() for x in (ours, plain)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps


def _plain(q: torch.Tensor, k: torch.Tensor, t_q: torch.Tensor, t_k: torch.Tensor) -> torch.Tensor:
    s, t = ((x @ y.mT * x.shape[3] ** -0.5).log_softmax(-1) for x, y in ((q, k), (t_q, t_k)))
    return (t.exp() * (t - s)).sum(-1).mean()


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    """A map at L 4096 takes 64 MiB: the high-water mark of a whole step of two heads stays below one."""
    if not hasattr(resource, "RUSAGE_SELF") or sys.platform != "linux":
        pytest.skip("reads the resident memory as Linux reports it")
    script = """
import resource, torch
from fastdistil import attention_kl
def step(length):
    q, k, a, b = (torch.randn(1, 2, length, 16) for _ in range(4))
    q.requires_grad_(); k.requires_grad_()
    attention_kl(q, k, a, b).backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 64
