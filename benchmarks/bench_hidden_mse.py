"""hidden_mse, forward + backward, against F.linear, F.normalize and F.mse_loss, eager and compiled.

Between states of one width the work must read both and write one gradient; the bound is torch.add of the two
into fresh memory. With a learned projection (TinyBERT) it cannot do without three matrix products: the
projection and the gradients of states and matrix; the bound is those three, bare.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from harness import Variant, Work, cases, compare, compiled, device
from records import OURS, THREE_PASSES, THREE_PRODUCTS
from torch import Tensor

from fastdistil.functional import hidden_mse


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    student_dim: int
    teacher_dim: int  # another width needs a projection
    dtype: str = "float32"
    normalize: bool = False
    memory: bool = False

    def __str__(self) -> str:
        widths = f"{self.student_dim}-to-{self.teacher_dim}"
        return f"{self.rows}x{widths}-{self.dtype}{'-normalize' if self.normalize else ''}"

    def small(self) -> Self:
        return dataclasses.replace(self, rows=min(self.rows, 32))


CPU = [
    Case(4096, 768, 768, memory=True),
    Case(4096, 768, 768, normalize=True),
    Case(2048, 312, 768, memory=True),  # TinyBERT's general stage
    Case(4096, 768, 768, "bfloat16"),
]
GPU = [Case(16384, 768, 768, "bfloat16"), Case(16384, 312, 768, "bfloat16")]
QUICK = [Case(65, 48, 48, normalize=True, memory=True), Case(65, 26, 48, memory=True)]


def plain_loss(
    student: Tensor,  # (N, Ds)
    teacher: Tensor,  # (N, Dt)
    projection: Tensor | None,  # (Dt, Ds)
    bias: Tensor | None,  # (Dt,)
    normalize: bool,
) -> Tensor:
    if projection is not None:
        student = F.linear(student, projection, bias)
    return _loss(student, teacher, normalize)


def upcast_loss(
    student: Tensor, teacher: Tensor, projection: Tensor | None, bias: Tensor | None, normalize: bool
) -> Tensor:
    """In float32 from the projection on, whatever the dtype: free where it is fused."""
    if projection is not None:
        student = F.linear(student, projection, bias)
    return _loss(student.float(), teacher.float(), normalize)


def _loss(student: Tensor, teacher: Tensor, normalize: bool) -> Tensor:
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return F.mse_loss(student, teacher)


def bare_products(student: Tensor, projection: Tensor) -> Variant:
    hidden, matrix = student.detach(), projection.detach()
    projected = hidden @ matrix.mT
    gradient = torch.empty_like(projected).copy_(projected)
    grad_hidden, grad_matrix = torch.empty_like(hidden), torch.empty_like(matrix)

    def run() -> None:
        torch.mm(hidden, matrix.mT, out=projected)
        torch.mm(gradient, matrix, out=grad_hidden)
        torch.mm(gradient.mT, hidden, out=grad_matrix)

    return run


def build(case: Case) -> Work:
    on = device()
    random = torch.Generator(on).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=on, generator=random) * scale).to(dtype)

    student, teacher = normal(case.rows, case.student_dim), normal(case.rows, case.teacher_dim)
    projection = bias = None
    if case.student_dim != case.teacher_dim:
        projection = normal(case.teacher_dim, case.student_dim, scale=case.student_dim**-0.5)
        bias = normal(case.teacher_dim)
    raw = student.detach()
    trained = [tensor.requires_grad_() for tensor in (student, projection, bias) if tensor is not None]
    compiled_loss = compiled(upcast_loss)

    def backward(loss: Any) -> Variant:
        return lambda: torch.autograd.grad(loss(student, teacher, projection, bias, case.normalize), trained)

    def ours() -> object:
        loss = hidden_mse(student, teacher, projection, bias, normalize=case.normalize)
        return torch.autograd.grad(loss, trained)

    work = Work(
        variants={"eager": backward(plain_loss), "torch.compile": backward(compiled_loss), OURS: ours},
        gradient_bytes=sum(tensor.nbytes for tensor in trained),
        compiled=frozenset({"torch.compile"}),
        skipped={"Liger": "0.8.5 has no loss of hidden states", "TRL": "1.16 has none"},
    )
    if projection is None:
        work.bound, work.bytes_moved = THREE_PASSES, 3 * raw.nbytes
        work.variants[THREE_PASSES] = lambda: torch.add(raw, teacher)
    else:
        work.bound, work.flops = THREE_PRODUCTS, 3 * 2 * case.rows * case.student_dim * case.teacher_dim
        work.variants[THREE_PRODUCTS] = bare_products(student, projection)
    return work


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_hidden_mse(benchmark: Any, case: Case) -> None:
    compare(benchmark, "hidden_mse", case, build, op="hidden_mse_fwd")
