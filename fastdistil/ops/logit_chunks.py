"""The vocabulary losses from hidden states: chunk by chunk of logits, with the gradients of their sources."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistil.ops.huge_pages import empty_huge
from fastdistil.ops.matmul import add_mm, mm, precision
from fastdistil.ops.terms import accumulation_dtype, saved_grad_dtype

# What the two tiles of logits may take together. On a CPU a chunk must be long enough for the matrix products
# to run at their full rate and for the read and write of the whole weight gradient, once a chunk, not to be
# felt.
TILE_BYTES_CPU = 64 << 20
# On a GPU the weight gradient's accumulation is the larger cost: it moves 8 V D bytes a chunk.
TILE_BYTES_GPU = 256 << 20
# Below this a matrix product reads the vocabulary matrix for too little work, however wide the vocabulary.
_LEAST_ROWS = 64
# Rows of a tile start on such a boundary, so that kernels read it with aligned vectors whatever V is.
_PITCH_ELEMENTS = 16
_COLUMNS_A_SUM = 1024


def _rows_per_chunk(chunk_size: int, rows: int, row_bytes: int, device: torch.device) -> int:
    """`chunk_size` if it is given, else what the tiles' budget holds, cut so that the chunks have about equal
    lengths."""
    if chunk_size > 0:
        return min(chunk_size, rows)
    most = max(_LEAST_ROWS, (TILE_BYTES_CPU if device.type == "cpu" else TILE_BYTES_GPU) // row_bytes)
    even = math.ceil(rows / math.ceil(rows / most))
    return min(rows, _round_up(even, _PITCH_ELEMENTS))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def kd_loss_in_chunks(
    student_hidden: Tensor,  # (N, Ds) of active rows, as all rows below
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    kd_mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    settings: tuple[float, int, float, int, float],
    chunk_size: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """kd and ce of each row, and those gradients of the student's hidden states, weight and bias that are
    wanted; a sum over several chunks is in the accumulation dtype."""
    rows, vocabulary = student_hidden.shape[0], student_weight.shape[0]
    dtype = accumulation_dtype(student_hidden.dtype)
    kd, ce = student_hidden.new_empty(rows, dtype=dtype), student_hidden.new_empty(rows, dtype=dtype)
    grad_hidden, _, _ = empty_grads(student_hidden, student_weight, student_bias, wanted)
    want_hidden, want_weight, want_bias = wanted
    student, teacher = precision(student_hidden), precision(teacher_hidden)
    pitch = _round_up(vocabulary, _PITCH_ELEMENTS)
    row_bytes = pitch * (student.logits.itemsize + teacher.logits.itemsize)
    step = _rows_per_chunk(chunk_size, max(rows, 1), row_bytes, student_hidden.device)
    # Chunks add up in the accumulation dtype; one alone needs no sum.
    sum_dtype = dtype if rows > step else saved_grad_dtype(student_weight.dtype)
    weight_sum = empty_huge(student_weight, student_weight.shape if want_weight else (0,), sum_dtype)
    bias_sum = student_weight.new_zeros(vocabulary if want_bias else 0, dtype=dtype)
    if rows == 0:
        return kd, ce, grad_hidden, weight_sum.zero_(), bias_sum

    student_weight, teacher_weight = student_weight.to(student.product), teacher_weight.to(teacher.product)
    gain = None
    if student.product == torch.float16:
        # The gradient of the logits must pass through float16, where a mean over many rows would underflow.
        gain = _gain(kd_scale, ce_scale)
        kd_scale, ce_scale = kd_scale * gain, ce_scale * gain

    student_buffer = empty_huge(student_hidden, (step, pitch), student.logits)
    teacher_buffer = empty_huge(student_hidden, (step, pitch), teacher.logits)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        hidden = student_hidden[chunk].to(student.product)
        tile = student_buffer[: len(hidden), :vocabulary]
        teacher_tile = teacher_buffer[: len(hidden), :vocabulary]
        mm(hidden, student_weight.t(), tile)
        mm(teacher_hidden[chunk].to(teacher.product), teacher_weight.t(), teacher_tile)
        kd[chunk], ce[chunk] = torch.ops.fastdistil.kd_loss_fwd_(
            tile,
            teacher_tile,
            student_bias,
            teacher_bias,
            None if labels is None else labels[chunk],
            None if kd_mask is None else kd_mask[chunk],
            kd_scale if kd_scale.dim() == 0 else kd_scale[chunk],
            ce_scale if ce_scale.dim() == 0 else ce_scale[chunk],
            *settings,
            any(wanted),
        )
        if want_bias:
            _add_columns(bias_sum, tile)
        if student.product != student.logits and (want_hidden or want_weight):
            # The teacher's logits are spent: their tile takes the gradient in the precision of the products.
            low = teacher_buffer.view(student.product)[: len(hidden), :vocabulary]
            tile = low.copy_(tile)
        if want_hidden:
            mm(tile, student_weight, grad_hidden[chunk])
        if want_weight:
            add_mm(weight_sum, tile.t(), hidden, first=start == 0)
    if gain is not None:
        for grad in (grad_hidden, weight_sum, bias_sum):
            grad.div_(gain)
    return kd, ce, grad_hidden, weight_sum, bias_sum


def _add_columns(total: Tensor, tile: Tensor) -> None:
    """total (V,) += the sum of each column of `tile` (N, V)."""
    if tile.dtype == total.dtype or tile.device.type != "cpu":
        total += tile.sum(0, dtype=total.dtype)
        return
    # On a CPU torch first converts all that it sums into another dtype: a few columns at a time stay cached.
    for start in range(0, total.numel(), _COLUMNS_A_SUM):
        columns = slice(start, start + _COLUMNS_A_SUM)
        total[columns] += tile[:, columns].sum(0, dtype=total.dtype)


def _gain(kd_scale: Tensor, ce_scale: Tensor) -> Tensor:
    """1 / the largest scale, or 1 if all are 0."""
    largest = torch.maximum(kd_scale.abs().max(), ce_scale.abs().max())
    return torch.where(largest > 0, 1 / largest, 1.0)


def empty_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's hidden states, weight and bias; those that are not wanted are empty."""
    bias = weight[:, 0] if bias is None else bias

    def empty(like: Tensor, want: bool) -> Tensor:
        return like.new_empty(like.shape if want else (0,), dtype=saved_grad_dtype(like.dtype))

    return empty(hidden, wanted[0]), empty(weight, wanted[1]), empty(bias, wanted[2])
