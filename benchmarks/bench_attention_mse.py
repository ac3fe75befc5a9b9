"""attention_mse, forward + backward: mean squared error of raw attention scores, against score maps in
PyTorch, eager and compiled, and against the Gram identity that attention_mse itself uses, in plain PyTorch.

No map is needed: with X = [as Qs, -at Qt] and Y = [Ks, Kt] the loss is <XᵀX, YᵀY>, and the gradients are the
first columns of X (YᵀY) and Y (XᵀX). The bound is these four products, bare, in the case's dtype
(attention_mse accumulates the Gram matrices of float32 in float64, which its accuracy near convergence
needs). The FLOPs count half of each Gram matrix, since it is symmetric; PyTorch's products cannot leave the
other half out, so a kernel that does may pass the bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention import Case, Inputs, make_inputs, without_padding
from harness import Variant, Work, cases, compare, compiled, device, matrix_rate
from records import GRAM, GRAM_PRODUCTS, OURS, QUARTER
from torch import Tensor

from fastdistil.functional import attention_mse

CPU = [
    Case(8, 128),
    Case(8, 512, memory=True),
    Case(8, 512, masked=True),
    # A map of 8 sequences of this length takes 1.6 GB, and three are alive at a time.
    Case(2, 2048, growth=True, memory=True),
]
GPU = [Case(32, 512, "bfloat16"), Case(32, 2048, "bfloat16", growth=True)]
QUICK = [
    Case(2, 64, growth=True, heads=2, memory=True),
    Case(3, 33, masked=True, heads=2, student_dim=26),
]


def sum_of_squares(
    student_q: Tensor,  # (B, H, L, ds)
    student_k: Tensor,
    teacher_q: Tensor,  # (B, H, L, dt)
    teacher_k: Tensor,
    mask: Tensor | None,  # (B, L)
) -> Tensor:
    """As TinyBERT's code has it: two maps of scores, 0 where masked, and nn.MSELoss."""
    student, teacher = _scores(student_q, student_k), _scores(teacher_q, teacher_k)
    return _sum_of_squares(student, teacher, mask)


def upcast_sum_of_squares(
    student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, mask: Tensor | None
) -> Tensor:
    """In float32 from the scores on, whatever the dtype: free where it is fused."""
    student, teacher = _scores(student_q, student_k).float(), _scores(teacher_q, teacher_k).float()
    return _sum_of_squares(student, teacher, mask)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT) * q.shape[-1] ** -0.5


def _sum_of_squares(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        pairs = (mask[:, :, None] & mask[:, None])[:, None]
        student, teacher = torch.where(pairs, student, 0), torch.where(pairs, teacher, 0)
    return F.mse_loss(student, teacher, reduction="sum")


def gram_identity(
    student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, mask: Tensor | None
) -> Tensor:
    """Three inner products of d x d matrices; autograd does the rest."""
    student_q, teacher_q = student_q * student_q.shape[-1] ** -0.5, teacher_q * teacher_q.shape[-1] ** -0.5
    if mask is not None:
        tokens = mask[:, None, :, None]
        student_q, student_k, teacher_q, teacher_k = (
            torch.where(tokens, tensor, 0) for tensor in (student_q, student_k, teacher_q, teacher_k)
        )

    def inner(q: Tensor, other_q: Tensor, k: Tensor, other_k: Tensor) -> Tensor:
        return ((q.mT @ other_q) * (k.mT @ other_k)).sum(dtype=torch.float32)

    return (
        inner(student_q, student_q, student_k, student_k)
        + inner(teacher_q, teacher_q, teacher_k, teacher_k)
        - 2 * inner(student_q, teacher_q, student_k, teacher_k)
    )


def bare_gram_products(x: Inputs) -> tuple[Variant, int]:
    """Into memory that is already there; and the FLOPs."""
    parts, flops = [], 0
    for student_q, student_k, teacher_q, teacher_k in without_padding(x):
        heads, length, student_dim = student_q.shape
        both_q, both_k = torch.cat([student_q, teacher_q], -1), torch.cat([student_k, teacher_k], -1)
        both_dim = both_q.shape[2]
        gram = student_q.new_empty(heads, both_dim, both_dim)
        columns = student_q.new_ones(heads, both_dim, student_dim)
        parts.append((both_q, both_k, gram, columns, torch.empty_like(student_q)))
        flops += 2 * 2 * heads * length * (both_dim * both_dim // 2 + both_dim * student_dim)

    def run() -> None:
        for both_q, both_k, gram, columns, gradient in parts:
            for of_gram, of_gradient in ((both_q, both_k), (both_k, both_q)):
                torch.bmm(of_gram.mT, of_gram, out=gram)
                torch.bmm(of_gradient, columns, out=gradient)

    return run, flops


def build(case: Case) -> Work:
    x = make_inputs(case)
    pairs, trained = x.count_pairs(), x.trained()
    compiled_sum = compiled(upcast_sum_of_squares)

    def backward(total: Callable[..., Tensor]) -> Variant:
        return lambda: torch.autograd.grad(total(*x.tensors(), x.mask) / pairs, trained)

    bare, flops = bare_gram_products(x)
    work = Work(
        variants={
            "eager": backward(sum_of_squares),
            "torch.compile": backward(compiled_sum),
            GRAM: backward(gram_identity),
            GRAM_PRODUCTS: bare,
            OURS: lambda: torch.autograd.grad(attention_mse(*x.tensors(), x.mask), trained),
        },
        bound=GRAM_PRODUCTS,
        flops=flops,
        # Reads all four, writes two gradients.
        bytes_moved=sum(tensor.nbytes for tensor in (*x.tensors(), *trained)),
        gradient_bytes=sum(tensor.nbytes for tensor in trained),
        compiled=frozenset({"torch.compile"}),
    )
    if case.growth:
        shorter = make_inputs(dataclasses.replace(case, length=case.length // 4))

        def quarter() -> list[Tensor]:  # no tuple: gradients of another shape are not to be compared
            loss = attention_mse(*shorter.tensors(), shorter.mask)
            return list(torch.autograd.grad(loss, shorter.trained()))

        work.variants[QUARTER] = quarter
    if device().type == "cuda":
        work.notes["matrix_flops_per_second"] = matrix_rate()
    return work


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_attention_mse(benchmark: Any, case: Case) -> None:
    compare(benchmark, "attention_mse", case, build, op="attention_mse_fwd")
