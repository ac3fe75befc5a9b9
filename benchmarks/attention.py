"""What the attention benchmarks share: cases, queries and keys as a model makes them, the bare products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Self

import torch
from harness import device
from torch import Tensor

# Scores of this many bytes at a time stay in cache, as the tiles of a fused kernel do.
CACHED_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    dtype: str = "float32"
    masked: bool = False
    # Time fastdistil at a quarter of the length beside it, in the same rounds.
    growth: bool = False
    heads: int = 12
    student_dim: int = 32  # of a head
    teacher_dim: int = 64
    memory: bool = False

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}-{self.dtype}{'-masked' if self.masked else ''}"

    def small(self) -> Self:
        return dataclasses.replace(self, batch=1, length=min(self.length, 32))


@dataclasses.dataclass
class Inputs:
    student_q: Tensor  # (B, H, L, ds)
    student_k: Tensor
    teacher_q: Tensor  # (B, H, L, dt)
    teacher_k: Tensor
    mask: Tensor | None  # (B, L)
    lengths: list[int]  # tokens of each sequence that count

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_q, self.student_k, self.teacher_q, self.teacher_k

    def trained(self) -> list[Tensor]:
        return [self.student_q, self.student_k]

    def count_rows(self) -> int:
        return sum(self.lengths) * self.student_q.shape[1]

    def count_pairs(self) -> int:
        return sum(length**2 for length in self.lengths) * self.student_q.shape[1]


def make_lengths(batch: int, length: int, masked: bool) -> list[int]:
    """Full sequences; or padded to the longest, with lengths spread evenly from a quarter of it on."""
    if not masked:
        return [length] * batch
    return [round(length * share) for share in torch.linspace(0.25, 1, batch).tolist()]


def make_mask(lengths: list[int], length: int) -> Tensor:
    on = device()
    return torch.arange(length, device=on) < torch.tensor(lengths, device=on)[:, None]


def make_inputs(case: Case) -> Inputs:
    """Queries and keys are transposed views of `(B, L, H * d)` states, as in every transformers model."""
    on = device()
    random = torch.Generator(on).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def states(head_dim: int) -> Tensor:
        shape = case.batch, case.length, case.heads, head_dim
        return torch.randn(shape, device=on, generator=random).to(dtype).transpose(1, 2)

    lengths = make_lengths(case.batch, case.length, case.masked)
    return Inputs(
        student_q=states(case.student_dim).requires_grad_(),
        student_k=states(case.student_dim).requires_grad_(),
        teacher_q=states(case.teacher_dim),
        teacher_k=states(case.teacher_dim),
        mask=make_mask(lengths, case.length) if case.masked else None,
        lengths=lengths,
    )


def without_padding(x: Inputs) -> Iterator[list[Tensor]]:
    """The four tensors as contiguous `(heads, length, d)`: all heads at once, or one padded sequence after
    another."""
    tensors = [tensor.detach() for tensor in x.tensors()]
    if x.mask is None:
        yield [tensor.flatten(0, 1).contiguous() for tensor in tensors]
        return
    for i, length in enumerate(x.lengths):
        yield [tensor[i, :, :length].contiguous() for tensor in tensors]


def cached_groups(x: Inputs) -> Iterator[tuple[Tensor, ...]]:
    """The same, only so many heads at a time that one map of all of them stays in cache."""
    for part in without_padding(x):
        map_bytes = part[0].shape[1] ** 2 * part[0].element_size()
        heads = max(1, CACHED_BYTES[part[0].device.type] // map_bytes)
        yield from zip(*(tensor.split(heads) for tensor in part), strict=True)


def bare_map_products(x: Inputs, *, symmetric: bool = False) -> tuple[Callable[[], None], int]:
    """The matrix products that no comparison of maps can do without, into existing memory; and their FLOPs.

    They are the scores of both models and the gradients of the student's queries and keys. If these are the
    same tensor (`symmetric`), one product with the gradient of the scores plus its transpose gives both.
    """
    groups = list(cached_groups(x))
    largest = max(len(group[0]) * group[0].shape[1] ** 2 for group in groups)
    memory = groups[0][0].new_empty(largest)
    gradient = torch.empty_like(max((group[0] for group in groups), key=Tensor.numel)).flatten()
    flops = 0
    for student_q, _, teacher_q, _ in groups:
        heads, length, dim = student_q.shape
        flops += 2 * heads * length**2 * ((2 if symmetric else 3) * dim + teacher_q.shape[2])

    def run() -> None:
        for student_q, student_k, teacher_q, teacher_k in groups:
            heads, length, _ = student_q.shape
            scores = memory[: heads * length**2].view(heads, length, length)
            into = gradient[: student_q.numel()].view_as(student_q)
            torch.bmm(student_q, student_k.mT, out=scores)
            torch.bmm(teacher_q, teacher_k.mT, out=scores)
            torch.bmm(scores, student_k, out=into)
            if not symmetric:
                torch.bmm(scores.mT, student_q, out=into)

    return run, flops
