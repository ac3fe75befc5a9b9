"""KL(teacher || student) of attention distributions and its gradient, without a map of either.

Forward: one pass over tiles of keys with the online softmax of both models. Backward: scores are computed
again, and made probabilities by each row's origin and sum of exponentials, once for the gradient of the
queries and once for that of the keys, so that no program adds to what another one writes. README.md derives
the formulas.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.head_tiles import (
    NO_MASK,
    PAIRS,
    counted,
    end_of_counted,
    locate,
    mask_flags,
    operand_dtype,
    product,
    read_tile,
    rows_aligned,
    tile_width,
    write_tile,
)
from fastdistil.kernels.online_softmax import LOG2E

LN2 = tl.constexpr(math.log(2.0))
# The score of a pair that does not count, and the first origin: finite, so that differences of two are 0.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _move_origin(origin, x):
    """The origin of exponents that a tile needs, and the factor that brings earlier sums to it.

    Origins are whole numbers, so that the factor is a power of two and no rounding of them enters.
    """
    moved = tl.maximum(origin, tl.ceil(tl.max(x, 1)))
    return moved, tl.exp2(origin - moved)


@triton.jit(do_not_specialize=["rows", "heads"])
def attention_kl_fwd_kernel(
    student_q,  # (B, H, L, DS)
    student_k,  # (B, H, L, DS)
    teacher_q,  # (B, H, L, DT)
    teacher_k,  # (B, H, L, DT)
    query_flags,  # (B, L)
    key_flags,  # (B, L)
    pair_flags,  # (B, L, L)
    kl,  # (B, H, L), out
    student_softmax,  # (2, B, H, L), out: origins and sums of exponentials from there
    teacher_softmax,  # (2, B, H, L), out
    student_scale: tl.float64,  # as a float32, it would cost a float64 loss its precision
    teacher_scale: tl.float64,
    rows,  # B * H * L
    heads,  # H
    L,
    student_q_batch,  # strides
    student_q_head,
    student_q_pitch,
    student_k_batch,
    student_k_head,
    student_k_pitch,
    teacher_q_batch,
    teacher_q_head,
    teacher_q_pitch,
    teacher_k_batch,
    teacher_k_head,
    teacher_k_pitch,
    MASK: tl.constexpr,
    STUDENT_Q_ALIGNED: tl.constexpr,
    STUDENT_K_ALIGNED: tl.constexpr,
    TEACHER_Q_ALIGNED: tl.constexpr,
    TEACHER_K_ALIGNED: tl.constexpr,
    DS: tl.constexpr,
    DT: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,  # DS, or more
    TEACHER_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,  # of a tile
    KEYS: tl.constexpr,
    STUDENT_DOT: tl.constexpr,
    TEACHER_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    tile, sequence, head = locate(tl.cdiv(L, QUERIES), heads)
    first_query = tile * QUERIES
    row = first_query + tl.arange(0, QUERIES)
    if MASK != NO_MASK:
        query_flags += sequence * L
        key_flags += sequence * L
    student_keys = student_k + sequence * student_k_batch + head * student_k_head
    teacher_keys = teacher_k + sequence * teacher_k_batch + head * teacher_k_head

    query = counted(query_flags, first_query, L, QUERIES, MASK)
    # A tile of queries of which none counts walks over no keys.
    end = end_of_counted(key_flags, L, MASK) * tl.max(query.to(tl.int32), 0)
    q_s = read_tile(
        student_q + sequence * student_q_batch + head * student_q_head,
        first_query, 0, student_q_pitch, query, DS, STUDENT_WIDTH, STUDENT_Q_ALIGNED,
    )  # fmt: skip
    q_t = read_tile(
        teacher_q + sequence * teacher_q_batch + head * teacher_q_head,
        first_query, 0, teacher_q_pitch, query, DT, TEACHER_WIDTH, TEACHER_Q_ALIGNED,
    )  # fmt: skip
    scale_s = tl.full([], student_scale, ACC) * LOG2E
    scale_t = tl.full([], teacher_scale, ACC) * LOG2E

    origin_s = tl.full([QUERIES], LOWEST, ACC)
    origin_t = tl.full([QUERIES], LOWEST, ACC)
    sum_s = tl.full([QUERIES], 0.0, ACC)
    sum_t = tl.full([QUERIES], 0.0, ACC)
    difference = tl.full([QUERIES], 0.0, ACC)  # of the exponents, weighted by the teacher's exponentials
    for first_key in range(0, end, KEYS):
        key = counted(key_flags, first_key, L, KEYS, MASK)
        k_s = read_tile(
            student_keys, first_key, 0, student_k_pitch, key, DS, STUDENT_WIDTH, STUDENT_K_ALIGNED
        )
        k_t = read_tile(
            teacher_keys, first_key, 0, teacher_k_pitch, key, DT, TEACHER_WIDTH, TEACHER_K_ALIGNED
        )
        bias = tl.where(key, tl.full([], 0.0, ACC), LOWEST)[None, :]
        x_s = product(q_s, tl.trans(k_s), STUDENT_DOT, ACC) * scale_s + bias
        x_t = product(q_t, tl.trans(k_t), TEACHER_DOT, ACC) * scale_t + bias
        if MASK == PAIRS:
            column = first_key + tl.arange(0, KEYS)
            pair = tl.load(
                pair_flags + (sequence * L + row[:, None]) * L + column[None, :],
                mask=query[:, None] & key[None, :],
                other=0,
            )
            x_s, x_t = tl.where(pair != 0, x_s, LOWEST), tl.where(pair != 0, x_t, LOWEST)
        moved_s, keep_s = _move_origin(origin_s, x_s)
        moved_t, keep_t = _move_origin(origin_t, x_t)
        u_s, u_t = x_s - moved_s[:, None], x_t - moved_t[:, None]
        e_s, e_t = tl.exp2(u_s), tl.exp2(u_t)
        # Exponents are counted from the origins, which keeps a common offset of scores out of the sum.
        difference += sum_t * ((moved_s - origin_s) - (moved_t - origin_t))
        difference = difference * keep_t + tl.sum(e_t * (u_t - u_s), 1)
        sum_s = sum_s * keep_s + tl.sum(e_s, 1)
        sum_t = sum_t * keep_t + tl.sum(e_t, 1)
        origin_s, origin_t = moved_s, moved_t

    # A row that walked over no keys has no sum.
    sum_s, sum_t = tl.where(query, sum_s, 1.0), tl.where(query, sum_t, 1.0)
    log_s, log_t = tl.log2(sum_s), tl.log2(sum_t)
    out = (sequence * heads + head) * L + row
    within = row < L
    tl.store(kl + out, tl.where(query, (difference / sum_t + (log_s - log_t)) * LN2, 0.0), mask=within)
    tl.store(student_softmax + out, tl.where(query, origin_s, 0.0), mask=within)
    tl.store(teacher_softmax + out, tl.where(query, origin_t, 0.0), mask=within)
    tl.store(student_softmax + rows + out, sum_s, mask=within)
    tl.store(teacher_softmax + rows + out, sum_t, mask=within)


@triton.jit(do_not_specialize=["rows", "heads"])
def attention_kl_bwd_kernel(
    weight,  # (B, H, L)
    student_own,  # (B, H, L, DS), the queries or the keys: those whose gradient this is
    student_other,  # (B, H, L, DS), the keys or the queries
    teacher_own,  # (B, H, L, DT)
    teacher_other,  # (B, H, L, DT)
    own_flags,  # (B, L)
    other_flags,  # (B, L)
    pair_flags,  # (B, L, L)
    student_softmax,  # (2, B, H, L), from the forward
    teacher_softmax,  # (2, B, H, L)
    student_factor,  # (B, H, L): weight / sum, left by the queries' launch for the keys'
    teacher_factor,  # (B, H, L)
    grad,  # (B, H, L, DS), out
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    rows,  # B * H * L
    heads,  # H
    L,
    student_own_batch,  # strides
    student_own_head,
    student_own_pitch,
    student_other_batch,
    student_other_head,
    student_other_pitch,
    teacher_own_batch,
    teacher_own_head,
    teacher_own_pitch,
    teacher_other_batch,
    teacher_other_head,
    teacher_other_pitch,
    grad_batch,
    grad_head,
    grad_pitch,
    OWN_ARE_KEYS: tl.constexpr,
    MASK: tl.constexpr,
    STUDENT_OWN_ALIGNED: tl.constexpr,
    STUDENT_OTHER_ALIGNED: tl.constexpr,
    TEACHER_OWN_ALIGNED: tl.constexpr,
    TEACHER_OTHER_ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    DS: tl.constexpr,
    DT: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    OWN: tl.constexpr,  # rows of a tile
    OTHER: tl.constexpr,
    STUDENT_DOT: tl.constexpr,
    TEACHER_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    tile, sequence, head = locate(tl.cdiv(L, OWN), heads)
    first_own = tile * OWN
    row = first_own + tl.arange(0, OWN)
    if MASK != NO_MASK:
        own_flags += sequence * L
        other_flags += sequence * L
    student_others = student_other + sequence * student_other_batch + head * student_other_head
    teacher_others = teacher_other + sequence * teacher_other_batch + head * teacher_other_head
    line = (sequence * heads + head) * L
    weight += line
    student_softmax += line
    teacher_softmax += line
    student_factor += line
    teacher_factor += line

    own = counted(own_flags, first_own, L, OWN, MASK)
    end = end_of_counted(other_flags, L, MASK) * tl.max(own.to(tl.int32), 0)
    own_s = read_tile(
        student_own + sequence * student_own_batch + head * student_own_head,
        first_own, 0, student_own_pitch, own, DS, STUDENT_WIDTH, STUDENT_OWN_ALIGNED,
    )  # fmt: skip
    own_t = read_tile(
        teacher_own + sequence * teacher_own_batch + head * teacher_own_head,
        first_own, 0, teacher_own_pitch, own, DT, TEACHER_WIDTH, TEACHER_OWN_ALIGNED,
    )  # fmt: skip
    scale = tl.full([], student_scale, ACC)
    scale_s = scale * LOG2E
    scale_t = tl.full([], teacher_scale, ACC) * LOG2E
    if not OWN_ARE_KEYS:
        origin_s = tl.load(student_softmax + row, mask=row < L, other=0.0)
        origin_t = tl.load(teacher_softmax + row, mask=row < L, other=0.0)
        factor_s = 1 / tl.load(student_softmax + rows + row, mask=row < L, other=1.0)
        factor_t = 1 / tl.load(teacher_softmax + rows + row, mask=row < L, other=1.0)
        row_weight = tl.load(weight + row, mask=row < L, other=0.0)
        tl.store(student_factor + row, row_weight * factor_s, mask=row < L)
        tl.store(teacher_factor + row, row_weight * factor_t, mask=row < L)
        origin_s, origin_t = origin_s[:, None], origin_t[:, None]
        factor_s, factor_t = factor_s[:, None], factor_t[:, None]
        # After the sum: 16 bits hold a difference of probabilities, but not its product with a small weight.
        scale *= row_weight[:, None]

    total = tl.zeros([OWN, STUDENT_WIDTH], ACC)
    for first in range(0, end, OTHER):
        other = counted(other_flags, first, L, OTHER, MASK)
        other_s = read_tile(
            student_others, first, 0, student_other_pitch, other, DS, STUDENT_WIDTH, STUDENT_OTHER_ALIGNED
        )
        other_t = read_tile(
            teacher_others, first, 0, teacher_other_pitch, other, DT, TEACHER_WIDTH, TEACHER_OTHER_ALIGNED
        )
        column = first + tl.arange(0, OTHER)
        if OWN_ARE_KEYS:
            # Not masked by the flags, so that neighbours load together.
            within = column < L
            origin_s = tl.load(student_softmax + column, mask=within, other=0.0)[None, :]
            origin_t = tl.load(teacher_softmax + column, mask=within, other=0.0)[None, :]
            factor_s = tl.load(student_factor + column, mask=within, other=0.0)[None, :]
            factor_t = tl.load(teacher_factor + column, mask=within, other=0.0)[None, :]
        p_s = tl.exp2(product(own_s, tl.trans(other_s), STUDENT_DOT, ACC) * scale_s - origin_s) * factor_s
        p_t = tl.exp2(product(own_t, tl.trans(other_t), TEACHER_DOT, ACC) * scale_t - origin_t) * factor_t
        counts = other[None, :]
        if MASK == PAIRS:
            query, key = (column[None, :], row[:, None]) if OWN_ARE_KEYS else (row[:, None], column[None, :])
            pair = pair_flags + (sequence * L + query) * L + key
            counts = tl.load(pair, mask=own[:, None] & other[None, :], other=0) != 0
        g = tl.where(counts, p_s - p_t, 0.0).to(other_s.dtype)
        total += product(g, other_s, STUDENT_DOT, ACC)
    total = tl.where(own[:, None], total * scale, 0.0)
    write_tile(
        grad + sequence * grad_batch + head * grad_head,
        first_own, grad_pitch, total, row < L, DS, STUDENT_WIDTH, GRAD_ALIGNED,
    )  # fmt: skip


# --- launchers ----------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    own: int  # rows that a program keeps
    other: int  # rows of a step of its walk
    other_of_keys: int  # the same in the gradient of the keys, whose steps hold four numbers a row beside
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most; None: the compiler chooses


# By the bytes of an operand and, at most, the width of the wider tile. The ahead-of-time test proves those of
# heads up to 64 free of spills.
NVIDIA_TILES = {
    2: {64: Tiles(64, 64, 32, 4, 2), 128: Tiles(64, 32, 32, 8, 2), 256: Tiles(32, 16, 16, 4, 2)},
    4: {64: Tiles(32, 32, 32, 8, 2, registers=128), 128: Tiles(32, 32, 32, 8, 2)},
    8: {64: Tiles(32, 16, 16, 4, 1)},
}
NVIDIA_WIDEST = Tiles(16, 16, 16, 8, 1)
AMD_TILES = {
    2: {128: Tiles(64, 32, 32, 4, 1), 256: Tiles(32, 16, 16, 4, 1)},
    4: {128: Tiles(32, 16, 16, 4, 2)},
    8: {64: Tiles(32, 16, 16, 4, 1)},
}
AMD_WIDEST = Tiles(16, 16, 16, 4, 1)


def tile_shape(
    student_dot: tl.dtype,
    teacher_dot: tl.dtype,
    width: int,  # of the wider tile
    own_are_keys: bool,
    hip: bool,
) -> tuple[int, int, dict[str, int | bool]]:
    """Rows that a program keeps, rows of a step of its walk, and how to compile it."""
    size = max(student_dot.primitive_bitwidth, teacher_dot.primitive_bitwidth) // 8
    table, widest = (AMD_TILES, AMD_WIDEST) if hip else (NVIDIA_TILES, NVIDIA_WIDEST)
    tiles = next((tiles for limit, tiles in table[size].items() if width <= limit), widest)
    # Fusion is stated because its default differs between versions of Triton.
    options: dict[str, int | bool] = {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,
    }
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    return tiles.own, tiles.other_of_keys if own_are_keys else tiles.other, options


def attention_kl_fwd(
    student_q: Tensor,  # (B, H, L, ds), as the others: dense in d, any other strides
    student_k: Tensor,  # (B, H, L, ds)
    teacher_q: Tensor,  # (B, H, L, dt)
    teacher_k: Tensor,  # (B, H, L, dt)
    mask: Tensor | None,  # (B, L) or (B, L, L)
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, _ = student_q.shape
    accumulator = torch.float64 if student_q.dtype is torch.float64 else torch.float32
    kl = torch.empty(batch, heads, length, dtype=accumulator, device=student_q.device)
    student_softmax, teacher_softmax = kl.new_empty(2, *kl.shape), kl.new_empty(2, *kl.shape)
    if kl.numel() == 0:
        return kl, student_softmax, teacher_softmax
    kind, query_flags, key_flags, pair_flags = mask_flags(mask)
    queries, keys, settings = _settings(student_q, student_k, teacher_q, teacher_k, own_are_keys=False)
    with torch.cuda.device(student_q.device) if student_q.is_cuda else contextlib.nullcontext():
        attention_kl_fwd_kernel[(triton.cdiv(length, queries) * batch * heads,)](
            student_q,
            student_k,
            teacher_q,
            teacher_k,
            query_flags,
            key_flags,
            pair_flags,
            kl,
            student_softmax,
            teacher_softmax,
            student_scale,
            teacher_scale,
            kl.numel(),
            heads,
            length,
            *student_q.stride()[:3],
            *student_k.stride()[:3],
            *teacher_q.stride()[:3],
            *teacher_k.stride()[:3],
            MASK=kind,
            STUDENT_Q_ALIGNED=rows_aligned(student_q),
            STUDENT_K_ALIGNED=rows_aligned(student_k),
            TEACHER_Q_ALIGNED=rows_aligned(teacher_q),
            TEACHER_K_ALIGNED=rows_aligned(teacher_k),
            QUERIES=queries,
            KEYS=keys,
            **settings,
        )
    return kl, student_softmax, teacher_softmax


def attention_kl_bwd(
    weight: Tensor,  # (B, H, L), the upstream gradient of kl
    student_q: Tensor,  # (B, H, L, ds)
    student_k: Tensor,  # (B, H, L, ds)
    teacher_q: Tensor,  # (B, H, L, dt)
    teacher_k: Tensor,  # (B, H, L, dt)
    mask: Tensor | None,  # (B, L) or (B, L, L)
    student_softmax: Tensor,  # (2, B, H, L)
    teacher_softmax: Tensor,  # (2, B, H, L)
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor]:
    grad_q, grad_k = torch.empty_like(student_q), torch.empty_like(student_k)
    if grad_q.numel() == 0:
        return grad_q, grad_k
    kind, query_flags, key_flags, pair_flags = mask_flags(mask)
    rows = (student_softmax, teacher_softmax, torch.empty_like(weight), torch.empty_like(weight))
    scales = (student_scale, teacher_scale)
    queries = (student_q, student_k, teacher_q, teacher_k)
    keys = (student_k, student_q, teacher_k, teacher_q)
    with torch.cuda.device(student_q.device) if student_q.is_cuda else contextlib.nullcontext():
        _launch_bwd(grad_q, weight, queries, (query_flags, key_flags, pair_flags), rows, scales, kind, False)
        _launch_bwd(grad_k, weight, keys, (key_flags, query_flags, pair_flags), rows, scales, kind, True)
    return grad_q, grad_k


def _launch_bwd(
    grad: Tensor,
    weight: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],  # student's own and other, teacher's own and other
    flags: tuple[Tensor | None, Tensor | None, Tensor | None],  # own, other, pairs
    rows: tuple[Tensor, Tensor, Tensor, Tensor],  # softmax numbers of both models, factors of both models
    scales: tuple[float, float],
    kind: int,
    own_are_keys: bool,
) -> None:
    student_own, student_other, teacher_own, teacher_other = tensors
    batch, heads, length, _ = student_own.shape
    own, other, settings = _settings(*tensors, own_are_keys=own_are_keys)
    attention_kl_bwd_kernel[(triton.cdiv(length, own) * batch * heads,)](
        weight,
        *tensors,
        *flags,
        *rows,
        grad,
        *scales,
        weight.numel(),
        heads,
        length,
        *student_own.stride()[:3],
        *student_other.stride()[:3],
        *teacher_own.stride()[:3],
        *teacher_other.stride()[:3],
        *grad.stride()[:3],
        OWN_ARE_KEYS=own_are_keys,
        MASK=kind,
        STUDENT_OWN_ALIGNED=rows_aligned(student_own),
        STUDENT_OTHER_ALIGNED=rows_aligned(student_other),
        TEACHER_OWN_ALIGNED=rows_aligned(teacher_own),
        TEACHER_OTHER_ALIGNED=rows_aligned(teacher_other),
        GRAD_ALIGNED=rows_aligned(grad),
        OWN=own,
        OTHER=other,
        **settings,
    )


def _settings(
    student_own: Tensor,
    student_other: Tensor,
    teacher_own: Tensor,
    teacher_other: Tensor,
    *,
    own_are_keys: bool,
) -> tuple[int, int, dict[str, Any]]:
    """Rows that a program keeps, rows of a step, and what both kernels are compiled with."""
    sizes = {"DS": student_own.shape[3], "DT": teacher_own.shape[3]}
    widths = {"STUDENT_WIDTH": tile_width(sizes["DS"]), "TEACHER_WIDTH": tile_width(sizes["DT"])}
    hip = torch.version.hip is not None
    if student_own.dtype is torch.float64:
        accumulator, dots = tl.float64, (tl.float64, tl.float64)
    else:
        accumulator = tl.float32
        dots = (operand_dtype(student_own, student_other), operand_dtype(teacher_own, teacher_other))
    own, other, options = tile_shape(*dots, max(widths.values()), own_are_keys, hip)
    constants = {"STUDENT_DOT": dots[0], "TEACHER_DOT": dots[1], "ACC": accumulator}
    return own, other, {**sizes, **widths, **constants, **options}
