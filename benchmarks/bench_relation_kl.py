"""relation_kl, forward + backward: MiniLMv2's loss of one relation, against splitting the states into
relation heads and comparing maps, eager and compiled.

With states in the place of queries and of keys, the work cannot do without three matrix products a head: both
models' scores, and the gradient of the scores plus its transpose times the states. The bound is those three,
bare, as many heads at a time as keep a map in cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
from attention import Inputs, bare_map_products, make_lengths, make_mask
from bench_attention_kl import sum_of_kl, upcast_sum_of_kl
from harness import Variant, Work, cases, compare, compiled, device, matrix_rate
from records import OURS, THREE_PRODUCTS
from torch import Tensor

from fastdistil.functional import relation_kl


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    student_dim: int = 384
    teacher_dim: int = 384
    dtype: str = "float32"
    masked: bool = False
    relation_heads: int = 48
    memory: bool = False

    def __str__(self) -> str:
        widths = f"{self.student_dim}-of-{self.teacher_dim}"
        return f"{self.batch}x{self.length}-{widths}-{self.dtype}{'-masked' if self.masked else ''}"

    def small(self) -> Self:
        return dataclasses.replace(self, batch=1, length=min(self.length, 32))


CPU = [Case(16, 128, memory=True), Case(16, 128, masked=True)]
GPU = [Case(128, 128, 384, 768, "bfloat16")]
QUICK = [
    Case(2, 32, 48, 48, relation_heads=6, memory=True),
    Case(2, 33, 48, 96, masked=True, relation_heads=6),
]


def build(case: Case) -> Work:
    on = device()
    random = torch.Generator(on).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    student, teacher = (
        torch.randn(case.batch, case.length, dim, device=on, generator=random).to(dtype)
        for dim in (case.student_dim, case.teacher_dim)
    )
    student.requires_grad_()
    lengths = make_lengths(case.batch, case.length, case.masked)
    mask = make_mask(lengths, case.length) if case.masked else None
    rows = sum(lengths) * case.relation_heads

    def split(states: Tensor) -> Tensor:
        return states.unflatten(2, (case.relation_heads, -1)).transpose(1, 2)

    def of_maps(total: Callable[..., Tensor]) -> Variant:
        def run() -> object:
            s, t = split(student), split(teacher)
            return torch.autograd.grad(total(s, s, t, t, mask, mask) / rows, [student])

        return run

    s, t = split(student), split(teacher)
    bare, flops = bare_map_products(Inputs(s, s, t, t, mask, lengths), symmetric=True)
    work = Work(
        variants={
            "eager": of_maps(sum_of_kl),
            "torch.compile": of_maps(compiled(upcast_sum_of_kl)),
            THREE_PRODUCTS: bare,
            OURS: lambda: torch.autograd.grad(
                relation_kl(student, teacher, case.relation_heads, mask), [student]
            ),
        },
        bound=THREE_PRODUCTS,
        flops=flops,
        gradient_bytes=student.nbytes,
        compiled=frozenset({"torch.compile"}),
    )
    if on.type == "cuda":
        work.notes["matrix_flops_per_second"] = matrix_rate()
    return work


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_relation_kl(benchmark: Any, case: Case) -> None:
    compare(benchmark, "relation_kl", case, build, op="attention_kl_fwd")
