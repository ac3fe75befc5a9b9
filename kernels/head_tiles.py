"""Tiles of the queries or keys of one head: which rows count, reading them, and products of tiles.

A head is (L, d), dense in d. A tile is a power of two wide; what it has beyond d are zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Which query-key pairs count: all; those of tokens that count; or one flag a pair.
NO_MASK = tl.constexpr(0)
TOKENS = tl.constexpr(1)
PAIRS = tl.constexpr(2)

# tl.dot takes no operand with a side below this.
SMALLEST_SIDE = 16

# Flags of tokens that `end_of_counted` reads at a time.
FLAGS = tl.constexpr(1024)


@triton.jit
def locate(
    tiles,  # programs a head
    heads,
):
    """The tile, the sequence and the head of this program. Neighbours share a head, and so what they read."""
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    return program % tiles, head // heads, head % heads


@triton.jit
def counted(
    flags,  # (L,), of one sequence
    first,
    L,
    ROWS: tl.constexpr,
    MASK: tl.constexpr,
):
    """Which rows of a tile count; those past the end do not."""
    row = first + tl.arange(0, ROWS)
    wanted = row < L
    if MASK != NO_MASK:
        wanted = tl.load(flags + row, mask=wanted, other=0) != 0
    return wanted


@triton.jit
def end_of_counted(
    flags,  # (L,), of one sequence
    L,
    MASK: tl.constexpr,
):
    """1 + the last row that counts: the padding behind it need not be walked."""
    end = tl.cast(L, tl.int32)
    if MASK != NO_MASK:
        last = tl.zeros([FLAGS], tl.int32)
        for first in range(0, L, FLAGS):
            row = first + tl.arange(0, FLAGS)
            last = tl.where(tl.load(flags + row, mask=row < L, other=0) != 0, row + 1, last)
        end = tl.max(last, 0)
    return end


@triton.jit
def _pointers(
    head,
    first,  # row
    first_column,
    pitch,  # elements from a row to the next
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row of the head starts at a multiple of 16 bytes
):
    start = head + tl.cast(first, tl.int64) * pitch
    row = tl.arange(0, ROWS).to(tl.int64) * pitch
    if ALIGNED:
        # Before the column is added: where that is a constant 0, the sum is folded away, and a hint with it.
        start = tl.multiple_of(start, 16)
        row = tl.multiple_of(row, 128 // head.dtype.element_ty.primitive_bitwidth)
    return start + first_column + (row[:, None] + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _within(
    rows,  # (ROWS,)
    first_column,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    within = rows[:, None]
    if D % WIDTH != 0:
        within = within & (first_column + tl.arange(0, WIDTH) < D)[None, :]
    return within


@triton.jit
def read_tile(
    head,  # (L, D)
    first,
    first_column,  # a multiple of WIDTH
    pitch,
    rows,  # (ROWS,), which to read; the others are zeros, whatever their memory holds
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pointers = _pointers(head, first, first_column, pitch, rows.shape[0], WIDTH, ALIGNED)
    return tl.load(pointers, mask=_within(rows, first_column, D, WIDTH), other=0.0)


@triton.jit
def write_tile(
    head,  # (L, D)
    first,
    pitch,
    tile,
    rows,  # (ROWS,), which to write
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pointers = _pointers(head, first, 0, pitch, rows.shape[0], WIDTH, ALIGNED)
    tl.store(pointers, tile.to(head.dtype.element_ty), mask=_within(rows, 0, D, WIDTH))


@triton.jit
def product(
    a,  # (M, K)
    b,  # (K, N)
    DOT: tl.constexpr,  # type of the operands
    ACC: tl.constexpr,
):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="ieee").to(ACC)


# --- on the host --------------------------------------------------------------------------------------------


def tile_width(head_size: int) -> int:
    return max(SMALLEST_SIDE, triton.next_power_of_2(head_size))


def rows_aligned(tensor: Tensor) -> bool:
    """Whether each row of each head starts at a multiple of 16 bytes."""
    steps = [tensor.stride(dim) * tensor.element_size() for dim in range(3) if tensor.shape[dim] > 1]
    return all(start % 16 == 0 for start in (tensor.data_ptr(), *steps))


def operand_dtype(a: Tensor, b: Tensor) -> tl.dtype:
    """In which a product of tiles of these tensors runs: the tensor cores' 16 bits where both have them."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    if dtype is torch.bfloat16 and triton.knobs.runtime.interpret:
        # The interpreter multiplies the bits of bfloat16 as whole numbers.
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))


def mask_flags(mask: Tensor | None) -> tuple[int, Tensor | None, Tensor | None, Tensor | None]:
    """The kind of a mask, the flags (B, L) of queries and of keys that count anywhere, those of pairs."""
    if mask is None:
        return NO_MASK.value, None, None, None
    if mask.dim() == 2:
        tokens = mask.view(torch.uint8)
        return TOKENS.value, tokens, tokens, None
    queries, keys = mask.any(2), mask.any(1)
    return PAIRS.value, queries.view(torch.uint8), keys.view(torch.uint8), mask.view(torch.uint8)
