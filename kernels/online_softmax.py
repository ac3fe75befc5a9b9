"""Reading a row of logits as fast as its alignment allows, and the online softmax of two of them.

A row is walked in whole blocks, each thread loading 16 bytes without a mask, from an address that is aligned
down to a multiple of 16 bytes. What the blocks leave at both ends is read with masks, as one run of elements.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))

# Rows are shifted from aligned addresses by less than this many elements: 16 bytes of bfloat16.
ALIGNMENT = 8

# From which V, how many threads work on a row.
THREADS = ((8192, 512), (1024, 128), (0, 64))


@triton.jit
def row_start(
    tensor,
    row,
    pitch,
    shift,
    ALIGNED: tl.constexpr,
):
    start = tensor + row * pitch - shift
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def rest_of_row(
    index,  # which RAGGED elements of the rest
    shift,
    HEAD: tl.constexpr,
    BODY: tl.constexpr,
    V: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Positions of what the whole blocks leave, before the first and after the last one, as one run."""
    lane = index * RAGGED + tl.arange(0, RAGGED)
    position = tl.where(lane < HEAD, lane, lane + BODY)
    return position, (position >= shift) & (position < shift + V)


@triton.jit
def read_rest(
    row_start,
    bias,
    position,
    valid,
    wanted,  # 1, or 0 for a row that is not read at all
    shift,
    HAS_BIAS: tl.constexpr,
    V: tl.constexpr,
    ACC: tl.constexpr,
):
    x = tl.load(row_start + position, mask=valid & (position < (shift + V) * wanted), other=0.0).to(ACC)
    if HAS_BIAS:
        x += tl.load(bias + position - shift, mask=valid, other=0.0).to(ACC)
    return tl.where(valid, x, float("-inf"))


@triton.jit
def fetch(
    row_start,
    step,  # of the walk over the whole blocks
    wanted,
    HEAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKWARDS: tl.constexpr,
    POLICY: tl.constexpr,
):
    """A whole block, unconverted: each step asks for the next one before it works on its own."""
    block = BLOCKS - 1 - step if BACKWARDS else step
    mask = tl.full([BLOCK], 0, tl.int32) + step < BLOCKS * wanted
    return tl.load(
        row_start + (HEAD + block * BLOCK + tl.arange(0, BLOCK)), mask=mask, other=0.0, eviction_policy=POLICY
    )


@triton.jit
def to_logits(
    fetched,
    bias,
    position,
    shift,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    x = fetched.to(ACC)
    if HAS_BIAS:
        x += tl.load(bias + position - shift).to(ACC)
    return x


@triton.jit
def by_thread(x, EACH: tl.constexpr):
    """Sums of the EACH neighbours that one thread loads together."""
    return tl.sum(tl.reshape(x, (x.shape[0] // EACH, EACH)), 1)


@triton.jit
def _origin(origin, x, scale):
    """The origin of exponents that a block needs: a whole number, so that sums rescale without rounding."""
    origin = tl.maximum(origin, tl.ceil(tl.max(x, 0) * scale))
    return origin, tl.where(origin == float("-inf"), 0.0, origin)


@triton.jit
def untempered(e, POWER: tl.constexpr):
    """exp(x) from exp(x / T) at T = 2 ** POWER: squaring is cheaper than another exponential."""
    for _ in tl.static_range(POWER):
        e = e * e
    return e


@triton.jit
def _online(
    x_s,
    x_t,
    origin_s,
    origin_t,
    origin_1,
    scale,  # log2(e) / T
    unit,  # log2(e)
    POWER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
):
    """The origins moved to hold a block, the factors that bring earlier sums to them, the exponentials."""
    origin_s_new, centre_s = _origin(origin_s, x_s, scale)
    origin_t_new, centre_t = _origin(origin_t, x_t, scale)
    keep_s, e_s = tl.exp2(origin_s - centre_s), tl.exp2(tl.fma(x_s, scale, -centre_s))
    keep_t, e_t = tl.exp2(origin_t - centre_t), tl.exp2(tl.fma(x_t, scale, -centre_t))
    origin_1_new, keep_1, e_1 = origin_1, keep_s, e_s
    if HAS_LABELS:
        if POWER >= 0:
            keep_1, e_1 = untempered(keep_s, POWER), untempered(e_s, POWER)
        else:
            origin_1_new, centre_1 = _origin(origin_1, x_s, unit)
            keep_1, e_1 = tl.exp2(origin_1 - centre_1), tl.exp2(tl.fma(x_s, unit, -centre_1))
    return origin_s_new, origin_t_new, origin_1_new, keep_s, keep_t, keep_1, e_s, e_t, e_1


@triton.jit
def softmax_sums(
    student_row,
    teacher_row,
    student_bias,
    teacher_bias,
    has_kd,
    shift,
    scale,
    unit,
    POWER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    V: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    REST: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
):
    """Origins and sums of exponentials: the student's at T, the teacher's at T, the student's at 1.

    The last result is the sum of the student's logits. exp(x / T) is written 2 ** (x * scale - origin).
    """
    zero = tl.full([], 0.0, ACC)
    origin_s = tl.full([], float("-inf"), ACC)
    origin_t = tl.full([], float("-inf"), ACC)
    origin_1 = tl.full([], float("-inf"), ACC)
    # Blocks add up thread by thread, and across threads once at the end; the rest of the row adds to scalars.
    block_s = tl.full([BLOCK // EACH], 0.0, ACC)
    block_t = tl.full([BLOCK // EACH], 0.0, ACC)
    block_1 = tl.full([BLOCK // EACH], 0.0, ACC)
    block_x = tl.full([BLOCK // EACH], 0.0, ACC)
    sum_s, sum_t, sum_1, sum_x = zero, zero, zero, zero

    for index in range((REST + RAGGED - 1) // RAGGED):
        position, valid = rest_of_row(index, shift, HEAD, BLOCKS * BLOCK, V, RAGGED)
        x_s = read_rest(student_row, student_bias, position, valid, 1, shift, STUDENT_BIAS, V, ACC)
        x_t = read_rest(teacher_row, teacher_bias, position, valid, has_kd, shift, TEACHER_BIAS, V, ACC)
        origin_s, origin_t, origin_1, keep_s, keep_t, keep_1, e_s, e_t, e_1 = _online(
            x_s, x_t, origin_s, origin_t, origin_1, scale, unit, POWER, HAS_LABELS
        )
        sum_s = sum_s * keep_s + tl.sum(e_s, 0)
        sum_t = sum_t * keep_t + tl.sum(e_t, 0)
        if HAS_LABELS:
            sum_1 = sum_1 * keep_1 + tl.sum(e_1, 0)
        if SMOOTH:
            sum_x += tl.sum(tl.where(valid, x_s, 0.0), 0)

    if BLOCKS > 0:
        next_s = fetch(student_row, 0, 1, HEAD, BLOCKS, BLOCK, False, "evict_last")
        next_t = fetch(teacher_row, 0, has_kd, HEAD, BLOCKS, BLOCK, False, "evict_last")
        for step in range(BLOCKS):
            fetched_s, fetched_t = next_s, next_t
            next_s = fetch(student_row, step + 1, 1, HEAD, BLOCKS, BLOCK, False, "evict_last")
            next_t = fetch(teacher_row, step + 1, has_kd, HEAD, BLOCKS, BLOCK, False, "evict_last")
            position = HEAD + step * BLOCK + tl.arange(0, BLOCK)
            x_s = to_logits(fetched_s, student_bias, position, shift, STUDENT_BIAS, ACC)
            x_t = to_logits(fetched_t, teacher_bias, position, shift, TEACHER_BIAS, ACC)
            origin_s, origin_t, origin_1, keep_s, keep_t, keep_1, e_s, e_t, e_1 = _online(
                x_s, x_t, origin_s, origin_t, origin_1, scale, unit, POWER, HAS_LABELS
            )
            sum_s, block_s = sum_s * keep_s, block_s * keep_s + by_thread(e_s, EACH)
            sum_t, block_t = sum_t * keep_t, block_t * keep_t + by_thread(e_t, EACH)
            if HAS_LABELS:
                sum_1, block_1 = sum_1 * keep_1, block_1 * keep_1 + by_thread(e_1, EACH)
            if SMOOTH:
                block_x += by_thread(x_s, EACH)
        sum_s += tl.sum(block_s, 0)
        sum_t += tl.sum(block_t, 0)
        if HAS_LABELS:
            sum_1 += tl.sum(block_1, 0)
        if SMOOTH:
            sum_x += tl.sum(block_x, 0)
    if POWER >= 0:
        origin_1 = origin_s * (1 << POWER)
    return origin_s, origin_t, origin_1, sum_s, sum_t, sum_1, sum_x


# --- on the host --------------------------------------------------------------------------------------------


def row_shape(
    vocabulary: int,
    element_size: int,  # of a student's logit, in bytes
    shifted: bool,  # whether rows start away from aligned addresses
) -> dict[str, int]:
    """How a row is cut: whole blocks of 16 bytes a thread, and what they leave at both ends."""
    each = 16 // element_size
    block = threads_per_row(vocabulary) * each
    head = ALIGNMENT if shifted else 0
    blocks = max(0, vocabulary - head) // block
    rest = vocabulary - blocks * block + (ALIGNMENT - 1 if shifted else 0)
    return {
        "V": vocabulary,
        "HEAD": head,
        "BLOCKS": blocks,
        "BLOCK": block,
        "EACH": each,
        "REST": rest,
        "RAGGED": min(block, triton.next_power_of_2(max(rest, 16))),
    }


def threads_per_row(vocabulary: int) -> int:
    return next(threads for start, threads in THREADS if vocabulary >= start)


def phase(tensor: Tensor) -> int:
    """Elements from an aligned address to the tensor's first."""
    return tensor.data_ptr() // tensor.element_size() % ALIGNMENT


def in_step(a: Tensor, b: Tensor) -> bool:
    """Whether the rows of both are shifted alike from aligned addresses."""
    return phase(a) == phase(b) and (a.stride(0) - b.stride(0)) % ALIGNMENT == 0
