"""cosine_loss, forward + backward, against DistilBERT's F.cosine_embedding_loss, eager and compiled.

The work must read both hidden states and write one gradient; the bound is torch.add of the two into fresh
memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from harness import Work, cases, compare, compiled, device
from records import OURS, THREE_PASSES

from fastdistil.functional import cosine_loss


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    dim: int
    dtype: str = "float32"
    memory: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.dim}-{self.dtype}"

    def small(self) -> Self:
        return dataclasses.replace(self, rows=min(self.rows, 32))


CPU = [
    Case(2048, 384),
    Case(4096, 768, memory=True),
    Case(4096, 768, "bfloat16"),
]
GPU = [Case(16384, 768, "bfloat16"), Case(4096, 768)]
QUICK = [Case(65, 48, memory=True)]


def plain_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.cosine_embedding_loss(student, teacher, student.new_ones(student.shape[0]))


def upcast_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return plain_loss(student.float(), teacher.float())


def build(case: Case) -> Work:
    on = device()
    random = torch.Generator(on).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    student, teacher = (
        torch.randn(case.rows, case.dim, device=on, generator=random).to(dtype) for _ in range(2)
    )
    raw = student.detach()
    student.requires_grad_()
    compiled_loss = compiled(upcast_loss)
    return Work(
        variants={
            "eager": lambda: torch.autograd.grad(plain_loss(student, teacher), [student]),
            "torch.compile": lambda: torch.autograd.grad(compiled_loss(student, teacher), [student]),
            THREE_PASSES: lambda: torch.add(raw, teacher),
            OURS: lambda: torch.autograd.grad(cosine_loss(student, teacher), [student]),
        },
        bound=THREE_PASSES,
        bytes_moved=3 * raw.nbytes,
        compiled=frozenset({"torch.compile"}),
        skipped={"Liger": "0.8.5 has no plain cosine loss of hidden states", "TRL": "1.16 has none"},
    )


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_cosine_loss(benchmark: Any, case: Case) -> None:
    compare(benchmark, "cosine_loss", case, build, op="cosine_loss_fwd")
