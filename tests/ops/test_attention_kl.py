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
        _, *normalisers = forward(q, k, t_q, t_k, counts, 0.3, 0.2)
        tensors = (torch.ones_like(normalisers[0]), q.detach(), k.detach(), t_q, t_k, counts, *normalisers)
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
    # The backward takes probabilities from a logsumexp in float32: its rounding is relative to the scores.
    slack = 2 * torch.finfo(torch.float32).eps * (q @ k.mT).abs().max().item() * 8**-0.5
    (grad,) = torch.autograd.grad(loss, inputs[0])
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=slack * expected.abs().max().item())


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
