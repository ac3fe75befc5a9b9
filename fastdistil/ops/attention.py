"""What the attention losses share: checks of queries, keys and masks, what counts, blocks of queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistil.ops import checks
from fastdistil.ops.terms import as_constant

# The eager references form scores for this many query-key pairs at a time, so that their temporaries stay in
# cache or close to it.
_REF_BLOCK_PAIRS = 1 << 20


class Attention(NamedTuple):
    """Queries and keys of both models in the form that the ops take: dense in d, any other strides."""

    student_q: Tensor  # (B, H, L, ds)
    student_k: Tensor  # (B, H, L, ds)
    teacher_q: Tensor  # (B, H, L, dt), detached
    teacher_k: Tensor  # (B, H, L, dt), detached
    mask: Tensor | None  # (B, L) or (B, L, L) bool
    student_scale: float
    teacher_scale: float

    def count_rows(self) -> Tensor | int:
        """Query rows that count, over all heads. A row of a pair mask counts if it has a key."""
        batch, heads, length, _ = self.student_q.shape
        if self.mask is None:
            return batch * heads * length
        rows = self.mask if self.mask.dim() == 2 else self.mask.any(2)
        return rows.sum() * heads

    def count_pairs(self) -> Tensor | int:
        """Query-key pairs that count, over all heads."""
        batch, heads, length, _ = self.student_q.shape
        if self.mask is None:
            return batch * heads * length**2
        pairs = self.mask.sum(1) ** 2 if self.mask.dim() == 2 else self.mask
        return pairs.sum() * heads


def check_attention(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None,
    student_scale: float | None,
    teacher_scale: float | None,
) -> Attention:
    """Raise a ValueError that names what does not fit."""
    tensors = {
        "student_q": student_q,
        "student_k": student_k,
        "teacher_q": teacher_q,
        "teacher_k": teacher_k,
    }
    for name, tensor in tensors.items():
        checks.check_floating(name, tensor)
        checks.check_device(name, tensor, student_q.device)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (B, H, L, d), got {tuple(tensor.shape)}")
        if tensor.shape[3] == 0:
            raise ValueError(f"{name} must have a head size above 0, got {tuple(tensor.shape)}")
    if teacher_q.shape[1] != student_q.shape[1]:
        raise ValueError(
            f"student and teacher must have the same number of heads, got {student_q.shape[1]} and "
            f"{teacher_q.shape[1]}; relation_kl splits states anew, into as many heads as divide both widths"
        )
    for model, q, k in (("student", student_q, student_k), ("teacher", teacher_q, teacher_k)):
        if q.dtype != k.dtype:
            raise ValueError(f"{model}_k must have the dtype of {model}_q, {q.dtype}, got {k.dtype}")
    checks.check_shape("student_k", student_k, student_q.shape, "that of student_q")
    checks.check_shape(
        "teacher_q", teacher_q, (*student_q.shape[:3], teacher_q.shape[3]), "B, H, L of student_q"
    )
    checks.check_shape("teacher_k", teacher_k, teacher_q.shape, "that of teacher_q")
    if mask is not None:
        mask = _check_mask(mask, student_q)
    return Attention(
        _dense(student_q),
        _dense(student_k),
        _dense(as_constant(teacher_q)),
        _dense(as_constant(teacher_k)),
        mask,
        _check_scale("student_scale", student_scale, student_q.shape[3]),
        _check_scale("teacher_scale", teacher_scale, teacher_q.shape[3]),
    )


def _check_mask(mask: Tensor, student_q: Tensor) -> Tensor:
    checks.check_mask_dtype("mask", mask)
    checks.check_device("mask", mask, student_q.device)
    batch, _, length, _ = student_q.shape
    if mask.shape not in ((batch, length), (batch, length, length)):
        raise ValueError(
            f"mask must have shape (B, L) = {(batch, length)}, one value a token, or (B, L, L) = "
            f"{(batch, length, length)}, one value a query-key pair, got {tuple(mask.shape)}"
        )
    return as_constant(mask.bool().contiguous())


def _check_scale(name: str, scale: float | None, head_size: int) -> float:
    if scale is None:
        return float(head_size**-0.5)
    checks.check_weight(name, scale)
    return float(scale)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def without_masked(tensor: Tensor, mask: Tensor | None, keys: bool) -> Tensor:
    """Queries or keys with zeros at the tokens that count nowhere, whose memory may hold anything."""
    if mask is None:
        return tensor
    tokens = mask if mask.dim() == 2 else mask.any(1 if keys else 2)
    return torch.where(tokens[:, None, :, None], tensor, 0)


def query_blocks(student_q: Tensor) -> Iterator[slice]:
    """Slices of the query positions for which the scores of all sequences and heads are formed at a time."""
    batch, heads, length, _ = student_q.shape
    block = max(1, _REF_BLOCK_PAIRS // max(1, batch * heads * length))
    for start in range(0, length, block):
        yield slice(start, start + block)


def pairs_of_block(mask: Tensor | None, rows: slice) -> Tensor | None:
    """(B, 1, block, L) bool, the pairs of these queries that count; None: all."""
    if mask is None:
        return None
    pairs = mask[:, rows, None] & mask[:, None, :] if mask.dim() == 2 else mask[:, rows]
    return pairs.unsqueeze(1)
