"""Squared error of raw attention scores and its gradient, in time linear in L, without a map of either model.

Three kernels: products over the positions (Gram matrices, d x d) of the queries and of the keys; the value,
and the matrices that the gradient needs, from these; the gradient, rows times matrices. README.md derives
the identity and says where it needs float64.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.head_tiles import (
    NO_MASK,
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

# Columns of a Gram matrix that a program computes at most, in each direction.
GRAM_COLUMNS = 64
# Columns that a step of the gradient reads.
GRAD_COLUMNS = 32
# Where there are few heads, programs share the positions of one until there are this many, or until each has
# no more than so many positions.
PROGRAMS = 512
SPLIT_ROWS = 128
# Elements of a Gram matrix that a program of the second kernel takes.
BLOCK = 1024


@triton.jit
def _gram(
    a,  # (L, DA), a head
    b,  # (L, DB)
    tile,  # of the product
    pitch_a,
    pitch_b,
    flags,
    weight,  # (L,)
    first,
    end,
    L,
    out,  # (WIDTH_A, WIDTH_B)
    SAME: tl.constexpr,  # the one tile of both
    MASK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGNED_A: tl.constexpr,
    ALIGNED_B: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    WIDTH_A: tl.constexpr,
    WIDTH_B: tl.constexpr,
    COLUMNS_A: tl.constexpr,
    COLUMNS_B: tl.constexpr,
    ROWS: tl.constexpr,
    DOT: tl.constexpr,
    GRAM: tl.constexpr,
):
    """A tile of aᵀ W b over some of the positions."""
    first_a = tile // (WIDTH_B // COLUMNS_B) * COLUMNS_A
    first_b = tile % (WIDTH_B // COLUMNS_B) * COLUMNS_B
    total = tl.zeros([COLUMNS_A, COLUMNS_B], GRAM)
    for row in range(first, end, ROWS):
        rows = counted(flags, row, L, ROWS, MASK)
        tile_b = read_tile(b, row, first_b, pitch_b, rows, DB, COLUMNS_B, ALIGNED_B).to(DOT)
        tile_a = tile_b
        if not SAME:
            tile_a = read_tile(a, row, first_a, pitch_a, rows, DA, COLUMNS_A, ALIGNED_A).to(DOT)
        if WEIGHTED:
            tile_a *= tl.load(weight + row + tl.arange(0, ROWS), mask=rows, other=0.0).to(DOT)[:, None]
        total += product(tl.trans(tile_a), tile_b, DOT, GRAM)
    row_a = first_a + tl.arange(0, COLUMNS_A)
    tl.store(out + row_a[:, None] * WIDTH_B + first_b + tl.arange(0, COLUMNS_B)[None, :], total)


@triton.jit(do_not_specialize=["heads"])
def attention_mse_gram_kernel(
    student,  # (B, H, L, DS), queries or keys
    teacher,  # (B, H, L, DT)
    flags,  # (B, L)
    weight,  # (B, H, L)
    parts,  # (splits, B, H, GRAM_SIZE), out
    heads,  # H
    L,
    splits,
    split_rows,  # positions of a split
    stride,  # elements from a split to the next
    student_batch,  # strides
    student_head,
    student_pitch,
    teacher_batch,
    teacher_head,
    teacher_pitch,
    MASK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STUDENT_ALIGNED: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    DS: tl.constexpr,
    DT: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,  # DS, or more
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,  # of a tile
    TEACHER_COLUMNS: tl.constexpr,
    GRAM_SIZE: tl.constexpr,  # elements of the three products of a head
    ROWS: tl.constexpr,
    DOT: tl.constexpr,
    GRAM: tl.constexpr,
):
    STUDENT_TILES: tl.constexpr = STUDENT_WIDTH // STUDENT_COLUMNS
    TEACHER_TILES: tl.constexpr = TEACHER_WIDTH // TEACHER_COLUMNS
    SS: tl.constexpr = STUDENT_TILES * STUDENT_TILES
    ST: tl.constexpr = STUDENT_TILES * TEACHER_TILES
    TILES: tl.constexpr = SS + ST + TEACHER_TILES * TEACHER_TILES
    part, sequence, head = locate(TILES * splits, heads)
    tile, split = part % TILES, part // TILES
    line = sequence * heads + head
    student += sequence * student_batch + head * student_head
    teacher += sequence * teacher_batch + head * teacher_head
    if MASK != NO_MASK:
        flags += sequence * L
    if WEIGHTED:
        weight += line * L
    first = split * split_rows
    end = tl.minimum(first + split_rows, end_of_counted(flags, L, MASK))
    out = parts + tl.cast(split, tl.int64) * stride + line * GRAM_SIZE
    if tile < SS:
        _gram(
            student, student, tile, student_pitch, student_pitch, flags, weight, first, end, L, out,
            STUDENT_TILES == 1, MASK, WEIGHTED, STUDENT_ALIGNED, STUDENT_ALIGNED, DS, DS,
            STUDENT_WIDTH, STUDENT_WIDTH, STUDENT_COLUMNS, STUDENT_COLUMNS, ROWS, DOT, GRAM,
        )  # fmt: skip
    elif tile < SS + ST:
        _gram(
            student, teacher, tile - SS, student_pitch, teacher_pitch, flags, weight, first, end, L,
            out + STUDENT_WIDTH * STUDENT_WIDTH,
            False, MASK, WEIGHTED, STUDENT_ALIGNED, TEACHER_ALIGNED, DS, DT,
            STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_COLUMNS, TEACHER_COLUMNS, ROWS, DOT, GRAM,
        )  # fmt: skip
    else:
        _gram(
            teacher, teacher, tile - (SS + ST), teacher_pitch, teacher_pitch, flags, weight, first, end, L,
            out + STUDENT_WIDTH * (STUDENT_WIDTH + TEACHER_WIDTH),
            TEACHER_TILES == 1, MASK, WEIGHTED, TEACHER_ALIGNED, TEACHER_ALIGNED, DT, DT,
            TEACHER_WIDTH, TEACHER_WIDTH, TEACHER_COLUMNS, TEACHER_COLUMNS, ROWS, DOT, GRAM,
        )  # fmt: skip


@triton.jit
def _sum_of_splits(
    parts,
    position,
    inside,
    splits,
    stride,  # elements from a split to the next
):
    total = tl.zeros([position.shape[0]], tl.float64)
    for split in range(splits):
        part = tl.load(parts + tl.cast(split, tl.int64) * stride + position, mask=inside, other=0.0)
        total += part.to(tl.float64)
    return total


@triton.jit(do_not_specialize=["splits"])
def attention_mse_value_kernel(
    query_parts,  # (splits, B, H, GRAM_SIZE)
    key_parts,  # (splits, B, H, GRAM_SIZE)
    weight,  # ()
    value,  # (B, H, blocks), out
    query_factor,  # (B, H, FACTOR_SIZE), out: what the gradient multiplies rows of queries with
    key_factor,  # (B, H, FACTOR_SIZE), out
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    splits,
    stride,
    WEIGHTED: tl.constexpr,  # the weights are in the products of the queries
    WITH_GRAD: tl.constexpr,
    OWN_SIZE: tl.constexpr,  # elements of a student's product with itself
    FACTOR_SIZE: tl.constexpr,  # and of that with the teacher
    GRAM_SIZE: tl.constexpr,  # and of a teacher's with itself
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (GRAM_SIZE + BLOCK - 1) // BLOCK
    line = (tl.program_id(0) // BLOCKS).to(tl.int64)
    position = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = position < GRAM_SIZE
    queries = _sum_of_splits(query_parts + line * GRAM_SIZE, position, inside, splits, stride)
    keys = _sum_of_splits(key_parts + line * GRAM_SIZE, position, inside, splits, stride)
    scale_s, scale_t = tl.full([], student_scale, tl.float64), tl.full([], teacher_scale, tl.float64)
    factor = tl.where(
        position < OWN_SIZE,
        scale_s * scale_s,
        tl.where(position < FACTOR_SIZE, -2.0 * scale_s * scale_t, scale_t * scale_t),
    )
    if not WEIGHTED:
        factor *= tl.load(weight).to(tl.float64)
    tl.store(value + tl.program_id(0), tl.sum(factor * queries * keys, 0))
    if WITH_GRAD:
        factor *= tl.where(position < OWN_SIZE, 2.0, 1.0)
        out = line * FACTOR_SIZE + position
        kept = position < FACTOR_SIZE
        tl.store(query_factor + out, (factor * keys).to(query_factor.dtype.element_ty), mask=kept)
        tl.store(key_factor + out, (factor * queries).to(key_factor.dtype.element_ty), mask=kept)


@triton.jit
def _add_product(
    total,  # (ROWS, OUT_WIDTH)
    head,  # (L, D)
    first,
    pitch,
    rows,
    wanted,  # 1, or 0 where no row counts
    factor,  # (OUT_WIDTH, WIDTH)
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DOT: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """total + rows @ factorᵀ."""
    offsets = tl.arange(0, OUT_WIDTH)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :]
    for column in range(0, WIDTH * wanted, COLUMNS):
        x = read_tile(head, first, column, pitch, rows, D, COLUMNS, ALIGNED)
        y = tl.load(factor + column + offsets)
        if SPLIT:
            # The terms of student and teacher cancel: the factor needs its 24 bits, which are those of three
            # bfloat16 that the tensor cores multiply exactly.
            high = y.to(tl.bfloat16)
            y -= high.to(ACC)
            middle = y.to(tl.bfloat16)
            low = (y - middle.to(ACC)).to(tl.bfloat16)
            total += product(x, tl.trans(low), DOT, ACC)
            total += product(x, tl.trans(middle), DOT, ACC)
            total += product(x, tl.trans(high), DOT, ACC)
        else:
            total += product(x, tl.trans(y), ACC, ACC)
    return total


@triton.jit(do_not_specialize=["heads"])
def attention_mse_grad_kernel(
    student,  # (B, H, L, DS), queries or keys
    teacher,  # (B, H, L, DT)
    flags,  # (B, L)
    weight,  # (B, H, L)
    factor,  # (B, H, FACTOR_SIZE)
    grad,  # (B, H, L, DS), out
    heads,  # H
    L,
    student_batch,  # strides
    student_head,
    student_pitch,
    teacher_batch,
    teacher_head,
    teacher_pitch,
    grad_batch,
    grad_head,
    grad_pitch,
    MASK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STUDENT_ALIGNED: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    DS: tl.constexpr,
    DT: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,  # that a step reads
    TEACHER_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STUDENT_DOT: tl.constexpr,
    TEACHER_DOT: tl.constexpr,
    SPLIT_FOR_STUDENT: tl.constexpr,
    SPLIT_FOR_TEACHER: tl.constexpr,
    ACC: tl.constexpr,
):
    tile, sequence, head = locate(tl.cdiv(L, ROWS), heads)
    line = sequence * heads + head
    first = tile * ROWS
    row = first + tl.arange(0, ROWS)
    if MASK != NO_MASK:
        flags += sequence * L
    rows = counted(flags, first, L, ROWS, MASK)
    wanted = tl.max(rows.to(tl.int32), 0)
    factor += line * (STUDENT_WIDTH * (STUDENT_WIDTH + TEACHER_WIDTH))
    total = tl.zeros([ROWS, STUDENT_WIDTH], ACC)
    total = _add_product(
        total, student + sequence * student_batch + head * student_head,
        first, student_pitch, rows, wanted, factor, DS, STUDENT_WIDTH, STUDENT_WIDTH, STUDENT_COLUMNS,
        STUDENT_ALIGNED, STUDENT_DOT, SPLIT_FOR_STUDENT, ACC,
    )  # fmt: skip
    total = _add_product(
        total, teacher + sequence * teacher_batch + head * teacher_head,
        first, teacher_pitch, rows, wanted, factor + STUDENT_WIDTH * STUDENT_WIDTH,
        DT, TEACHER_WIDTH, STUDENT_WIDTH, TEACHER_COLUMNS, TEACHER_ALIGNED, TEACHER_DOT, SPLIT_FOR_TEACHER,
        ACC,
    )  # fmt: skip
    if WEIGHTED:
        total *= tl.load(weight + line * L + row, mask=rows, other=0.0)[:, None]
    write_tile(
        grad + sequence * grad_batch + head * grad_head,
        first, grad_pitch, total, row < L, DS, STUDENT_WIDTH, GRAD_ALIGNED,
    )  # fmt: skip


# --- launchers ----------------------------------------------------------------------------------------------


def gram_shape(gram: tl.dtype, hip: bool) -> tuple[int, dict[str, int | bool]]:
    """Positions of a step of the products over positions, and how to compile them."""
    # Fusion is stated because its default differs between versions of Triton.
    wide = gram is tl.float64
    options = {"num_warps": 4, "num_stages": 1 if wide or hip else 2, "enable_fp_fusion": True}
    return (32 if wide else 64), options


def value_options() -> dict[str, int | bool]:
    return {"num_warps": 4, "enable_fp_fusion": True}


def grad_shape(split: bool) -> tuple[int, dict[str, int | bool]]:
    """Positions of a program of the gradient, and how to compile it."""
    return (64 if split else 32), {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def product_sizes(student_width: int, teacher_width: int) -> dict[str, int]:
    """Elements of a head's products: the student's own; and the mixed one; and the teacher's own."""
    own = student_width**2
    factor = own + student_width * teacher_width
    return {"OWN_SIZE": own, "FACTOR_SIZE": factor, "GRAM_SIZE": factor + teacher_width**2}


def product_dtypes(tensors: tuple[Tensor, ...], weighted: bool) -> tuple[tl.dtype, tl.dtype]:
    """Of the operands and of the sums of the products over positions.

    Near convergence the products cancel to a value that is many orders smaller, so they are float64; float32
    is enough where the rounding of bfloat16 scores would be larger still. Weights of rows are not bfloat16.
    """
    if weighted or any(tensor.dtype is not torch.bfloat16 for tensor in tensors):
        return tl.float64, tl.float64
    return operand_dtype(*tensors[:2]), tl.float32


def _products(
    student: Tensor,  # (B, H, L, ds), queries or keys
    teacher: Tensor,  # (B, H, L, dt)
    flags: Tensor | None,  # (B, L)
    weight: Tensor | None,  # (B, H, L)
    splits: int,
    kind: int,
    dot: tl.dtype,
    gram: tl.dtype,
    widths: dict[str, int],
) -> Tensor:
    """The products over positions, (splits, B * H, GRAM_SIZE)."""
    batch, heads, length, student_size = student.shape
    sizes = product_sizes(*widths.values())
    dtype = torch.float64 if gram is tl.float64 else torch.float32
    parts = torch.empty(splits, batch * heads, sizes["GRAM_SIZE"], dtype=dtype, device=student.device)
    columns = [min(width, GRAM_COLUMNS) for width in widths.values()]
    rows, options = gram_shape(gram, torch.version.hip is not None)
    attention_mse_gram_kernel[(count_tiles(*widths.values()) * splits * batch * heads,)](
        student,
        teacher,
        flags,
        weight,
        parts,
        heads,
        length,
        splits,
        triton.cdiv(triton.cdiv(length, splits), rows) * rows,
        parts.stride(0),
        *student.stride()[:3],
        *teacher.stride()[:3],
        MASK=kind,
        WEIGHTED=weight is not None,
        STUDENT_ALIGNED=rows_aligned(student),
        TEACHER_ALIGNED=rows_aligned(teacher),
        DS=student_size,
        DT=teacher.shape[3],
        **widths,
        STUDENT_COLUMNS=columns[0],
        TEACHER_COLUMNS=columns[1],
        GRAM_SIZE=sizes["GRAM_SIZE"],
        ROWS=rows,
        DOT=dot,
        GRAM=gram,
        **options,
    )
    return parts


def _gradient(
    student: Tensor,  # (B, H, L, ds), queries or keys
    teacher: Tensor,  # (B, H, L, dt)
    flags: Tensor | None,  # (B, L)
    weight: Tensor | None,  # (B, H, L)
    factor: Tensor,  # (B * H, FACTOR_SIZE)
    grad: Tensor,  # (B, H, L, ds), written
    kind: int,
    widths: dict[str, int],
) -> None:
    batch, heads, length, student_size = student.shape
    columns = [min(width, GRAD_COLUMNS) for width in widths.values()]
    split_s = student.dtype is torch.bfloat16
    split_t = teacher.dtype is torch.bfloat16 and factor.dtype is torch.float32
    rows, options = grad_shape(split_s and split_t)
    attention_mse_grad_kernel[(triton.cdiv(length, rows) * batch * heads,)](
        student,
        teacher,
        flags,
        weight,
        factor,
        grad,
        heads,
        length,
        *student.stride()[:3],
        *teacher.stride()[:3],
        *grad.stride()[:3],
        MASK=kind,
        WEIGHTED=weight is not None,
        STUDENT_ALIGNED=rows_aligned(student),
        TEACHER_ALIGNED=rows_aligned(teacher),
        GRAD_ALIGNED=rows_aligned(grad),
        DS=student_size,
        DT=teacher.shape[3],
        **widths,
        STUDENT_COLUMNS=columns[0],
        TEACHER_COLUMNS=columns[1],
        ROWS=rows,
        STUDENT_DOT=operand_dtype(student, student),
        TEACHER_DOT=operand_dtype(teacher, teacher),
        SPLIT_FOR_STUDENT=split_s,
        SPLIT_FOR_TEACHER=split_t,
        ACC=tl.float64 if factor.dtype is torch.float64 else tl.float32,
        **options,
    )


def attention_mse_fwd(
    student_q: Tensor,  # (B, H, L, ds), as the others: dense in d, any other strides
    student_k: Tensor,  # (B, H, L, ds)
    teacher_q: Tensor,  # (B, H, L, dt)
    teacher_k: Tensor,  # (B, H, L, dt)
    mask: Tensor | None,  # (B, L)
    weight: Tensor,  # () or (B, H, L)
    student_scale: float,
    teacher_scale: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, student_size = student_q.shape
    device = student_q.device
    accumulator = torch.float64 if student_q.dtype is torch.float64 else torch.float32
    grad_q, grad_k = _empty_grad(student_q, with_grad), _empty_grad(student_k, with_grad)
    if student_q.numel() == 0:
        return torch.zeros((), dtype=accumulator, device=device), grad_q, grad_k

    kind, flags, _, _ = mask_flags(mask)
    row_weight = weight if weight.dim() > 0 else None
    dot, gram = product_dtypes((student_q, student_k, teacher_q, teacher_k), row_weight is not None)
    widths = {"STUDENT_WIDTH": tile_width(student_size), "TEACHER_WIDTH": tile_width(teacher_q.shape[3])}
    sizes = product_sizes(*widths.values())
    lines = batch * heads
    splits = max(1, min(PROGRAMS // (count_tiles(*widths.values()) * lines), length // SPLIT_ROWS))
    settings = (splits, kind, dot, gram, widths)
    with torch.cuda.device(device) if student_q.is_cuda else contextlib.nullcontext():
        query_parts = _products(student_q, teacher_q, flags, row_weight, *settings)
        key_parts = _products(student_k, teacher_k, flags, None, *settings)
        blocks = triton.cdiv(sizes["GRAM_SIZE"], BLOCK)
        value = torch.empty(lines * blocks, dtype=torch.float64, device=device)
        factor_size = sizes["FACTOR_SIZE"] if with_grad else 0
        factors = torch.empty(2, lines, factor_size, dtype=accumulator, device=device)
        attention_mse_value_kernel[(lines * blocks,)](
            query_parts,
            key_parts,
            weight,
            value,
            factors[0],
            factors[1],
            student_scale,
            teacher_scale,
            len(query_parts),
            query_parts.stride(0),
            WEIGHTED=row_weight is not None,
            WITH_GRAD=with_grad,
            **sizes,
            BLOCK=BLOCK,
            **value_options(),
        )
        if with_grad:
            _gradient(student_q, teacher_q, flags, row_weight, factors[0], grad_q, kind, widths)
            _gradient(student_k, teacher_k, flags, None, factors[1], grad_k, kind, widths)
    return value.sum().to(accumulator), grad_q, grad_k


def _empty_grad(tensor: Tensor, with_grad: bool) -> Tensor:
    # Before a loss scaler acts, a float16 gradient divided by the number of pairs would underflow.
    dtype = torch.float32 if tensor.dtype is torch.float16 else tensor.dtype
    if not with_grad:
        return torch.empty(0, dtype=dtype, device=tensor.device)
    return torch.empty_like(tensor, dtype=dtype)


def count_tiles(student_width: int, teacher_width: int) -> int:
    """Programs that the products of a head take."""
    student, teacher = (triton.cdiv(width, GRAM_COLUMNS) for width in (student_width, teacher_width))
    return student * student + student * teacher + teacher * teacher
