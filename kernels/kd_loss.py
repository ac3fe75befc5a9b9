"""Vocabulary distillation and cross-entropy: value and gradient, one read of each logit from memory.

One program a row. A first pass finds the normalisers by online softmax, a last pass writes the gradient, and
in between the row stays in cache. README.md derives the formulas and counts what each pass moves.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels.online_softmax import (
    ALIGNMENT,
    LOG2E,
    by_thread,
    fetch,
    in_step,
    phase,
    read_rest,
    rest_of_row,
    row_shape,
    row_start,
    softmax_sums,
    threads_per_row,
    to_logits,
    untempered,
)

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)

LN2 = tl.constexpr(math.log(2.0))
# Probabilities below TINY add nothing to a mixture's divergence; above it, 1 / mixture is finite in float32.
TINY = tl.constexpr(1e-30)
SMALLEST_MIXTURE = tl.constexpr(1e-37)


@triton.jit
def _terms(
    x_s,
    x_t,
    normalisers,
    weights,
    expected,  # of the student's log ratio, in base 2; only the gradients of reverse KL and JSD need it
    beta,
    scale,
    unit,
    DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """A block's gradient, but for the label, and its parts of the expectations under student and teacher."""
    origin_s, origin_t, origin_1, inverse_s, inverse_t, lift = normalisers
    weight_s, weight_t, weight_1, flat = weights
    u_s, u_t = tl.fma(x_s, scale, -origin_s), tl.fma(x_t, scale, -origin_t)
    e_s, e_t = tl.exp2(u_s), tl.exp2(u_t)
    part_s, part_t = tl.zeros_like(e_s), tl.zeros_like(e_t)
    # The selects keep -inf - (-inf) out, where neither side has a probability.
    if DIVERGENCE == FORWARD_KL:
        part_t = tl.where(e_t > 0, e_t * ((u_t - u_s) + lift), 0.0)
        grad = weight_s * e_s - weight_t * e_t
    elif DIVERGENCE == REVERSE_KL:
        log_ratio = tl.where(e_s > 0, (u_s - u_t) - lift, 0.0)
        part_s = e_s * log_ratio
        grad = weight_s * e_s * (log_ratio - expected)
    else:
        p_s, p_t = e_s * inverse_s, e_t * inverse_t
        inverse = 1.0 / tl.maximum(beta * p_t + (1.0 - beta) * p_s, SMALLEST_MIXTURE)
        log_ratio = tl.log2(tl.maximum(p_s, TINY) * inverse)
        part_s = p_s * log_ratio
        part_t = p_t * tl.log2(tl.maximum(p_t, TINY) * inverse)
        grad = weight_s * e_s * (log_ratio - expected)
    if HAS_LABELS:
        if POWER >= 0:
            grad += weight_1 * untempered(e_s, POWER)
        else:
            grad += weight_1 * tl.exp2(tl.fma(x_s, unit, -origin_1))
        if SMOOTH:
            grad -= flat
    return grad, part_s, part_t


@triton.jit
def _walk(
    student_row,
    teacher_row,
    grad_row,
    student_bias,
    teacher_bias,
    has_kd,
    label_position,  # -1: no cross-entropy
    hot,  # what the gradient loses at the label
    normalisers,
    weights,
    expected,
    beta,
    shift,
    scale,
    unit,
    DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,  # write it
    BACKWARDS: tl.constexpr,  # begin with what the pass before read last
    POLICY: tl.constexpr,
    V: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    REST: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
):
    """One more pass over the row: the expectations under the student and the teacher, and the gradient."""
    sum_s, sum_t = tl.full([], 0.0, ACC), tl.full([], 0.0, ACC)
    if BLOCKS > 0:
        block_s, block_t = tl.full([BLOCK // EACH], 0.0, ACC), tl.full([BLOCK // EACH], 0.0, ACC)
        next_s = fetch(student_row, 0, 1, HEAD, BLOCKS, BLOCK, BACKWARDS, POLICY)
        next_t = fetch(teacher_row, 0, has_kd, HEAD, BLOCKS, BLOCK, BACKWARDS, POLICY)
        for step in range(BLOCKS):
            fetched_s, fetched_t = next_s, next_t
            next_s = fetch(student_row, step + 1, 1, HEAD, BLOCKS, BLOCK, BACKWARDS, POLICY)
            next_t = fetch(teacher_row, step + 1, has_kd, HEAD, BLOCKS, BLOCK, BACKWARDS, POLICY)
            start = HEAD + (BLOCKS - 1 - step if BACKWARDS else step) * BLOCK
            position = start + tl.arange(0, BLOCK)
            x_s = to_logits(fetched_s, student_bias, position, shift, STUDENT_BIAS, ACC)
            x_t = to_logits(fetched_t, teacher_bias, position, shift, TEACHER_BIAS, ACC)
            grad, part_s, part_t = _terms(
                x_s, x_t, normalisers, weights, expected, beta, scale, unit,
                DIVERGENCE, POWER, HAS_LABELS, SMOOTH,
            )  # fmt: skip
            block_s += by_thread(part_s, EACH)
            block_t += by_thread(part_t, EACH)
            if GRADIENT:
                if HAS_LABELS:  # noqa: SIM102 - known when compiled, the other when run
                    # One block of the row holds the label: the others do not compare their positions with it.
                    if (label_position >= start) & (label_position < start + BLOCK):
                        grad = tl.where(position == label_position, grad - hot, grad)
                tl.store(grad_row + position, grad.to(grad_row.dtype.element_ty))
        sum_s += tl.sum(block_s, 0)
        sum_t += tl.sum(block_t, 0)

    for index in range((REST + RAGGED - 1) // RAGGED):
        position, valid = rest_of_row(index, shift, HEAD, BLOCKS * BLOCK, V, RAGGED)
        x_s = read_rest(student_row, student_bias, position, valid, 1, shift, STUDENT_BIAS, V, ACC)
        x_t = read_rest(teacher_row, teacher_bias, position, valid, has_kd, shift, TEACHER_BIAS, V, ACC)
        grad, part_s, part_t = _terms(
            x_s, x_t, normalisers, weights, expected, beta, scale, unit,
            DIVERGENCE, POWER, HAS_LABELS, SMOOTH,
        )  # fmt: skip
        sum_s += tl.sum(part_s, 0)
        sum_t += tl.sum(part_t, 0)
        if GRADIENT:
            if HAS_LABELS:
                grad = tl.where(position == label_position, grad - hot, grad)
            tl.store(grad_row + position, grad.to(grad_row.dtype.element_ty), mask=valid)
    return sum_s, sum_t


@triton.jit
def _write_zeros(
    grad_row,
    shift,
    V: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    REST: tl.constexpr,
    RAGGED: tl.constexpr,
):
    for step in range(BLOCKS):
        position = HEAD + step * BLOCK + tl.arange(0, BLOCK)
        tl.store(grad_row + position, tl.zeros([BLOCK], grad_row.dtype.element_ty))
    for index in range((REST + RAGGED - 1) // RAGGED):
        position, valid = rest_of_row(index, shift, HEAD, BLOCKS * BLOCK, V, RAGGED)
        tl.store(grad_row + position, tl.zeros([RAGGED], grad_row.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["ignore_index", "base_shift"])
def kd_loss_kernel(
    student,  # (N, V)
    teacher,  # (N, V)
    student_bias,  # (V,)
    teacher_bias,  # (V,)
    labels,  # (N,)
    kd_mask,  # (N,)
    kd_scale,  # () or (N,)
    ce_scale,  # () or (N,)
    kd,  # (N,), out
    ce,  # (N,), out
    grad,  # (N, V), out; may be the student
    temperature: tl.float64,  # as a float32, it would cost a float64 loss its precision
    jsd_beta: tl.float64,
    label_smoothing: tl.float64,
    ignore_index,
    base_shift,  # elements from an aligned address to the student's first
    student_pitch,
    teacher_pitch,
    grad_pitch,
    kd_scale_stride,
    ce_scale_stride,
    DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr,  # T = 2 ** POWER, or -1
    HAS_LABELS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SMOOTH: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,  # the teacher's rows are shifted as the student's are
    GRAD_ALIGNED: tl.constexpr,
    V: tl.constexpr,
    HEAD: tl.constexpr,  # elements before the first whole block; 0: every row starts at an aligned address
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    REST: tl.constexpr,  # elements that the whole blocks leave, counting the shift
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    shift = 0
    if HEAD > 0:
        shift = ((base_shift + row * student_pitch) % HEAD).to(tl.int32)
    student_row = row_start(student, row, student_pitch, shift, True)
    teacher_row = row_start(teacher, row, teacher_pitch, shift, TEACHER_ALIGNED)
    grad_row = row_start(grad, row, grad_pitch, shift, GRAD_ALIGNED)

    has_kd = tl.full([], 1, tl.int32)
    if HAS_MASK:
        has_kd = tl.load(kd_mask + row).to(tl.int32)
    has_ce = tl.full([], 0, tl.int32) > 0
    label = tl.full([], -1, tl.int64)
    if HAS_LABELS:
        label = tl.load(labels + row)
        has_ce = label != ignore_index

    if (has_kd != 0) | has_ce:
        zero = tl.full([], 0.0, ACC)
        unit = tl.full([], LOG2E, ACC)
        t = tl.full([], temperature, ACC)
        beta = tl.full([], jsd_beta, ACC)
        smoothing = tl.full([], label_smoothing, ACC)
        scale = unit / t
        origin_s, origin_t, origin_1, sum_s, sum_t, sum_1, sum_x = softmax_sums(
            student_row, teacher_row, student_bias, teacher_bias, has_kd, shift, scale, unit,
            POWER, HAS_LABELS, SMOOTH, STUDENT_BIAS, TEACHER_BIAS,
            V, HEAD, BLOCKS, BLOCK, EACH, REST, RAGGED, ACC,
        )  # fmt: skip

        ce_row, weight_1, hot, label_position = zero, zero, zero, tl.full([], -1, tl.int32)
        if HAS_LABELS:
            # A label outside [0, V) reads NaN, which reaches the loss, rather than a neighbour's logit.
            known = has_ce & (label >= 0) & (label < V)
            at_label = tl.load(student_row + shift + label, mask=known, other=float("nan")).to(ACC)
            if STUDENT_BIAS:
                at_label += tl.load(student_bias + label, mask=known, other=0.0).to(ACC)
            log_sum_1 = tl.log2(sum_1)
            ce_row = (tl.fma(at_label, -unit, origin_1) + log_sum_1) * LN2
            if SMOOTH:
                ce_mean = (tl.fma(sum_x / V, -unit, origin_1) + log_sum_1) * LN2
                ce_row = (1.0 - smoothing) * ce_row + smoothing * ce_mean
            ce_row = tl.where(has_ce, ce_row, 0.0)
            ce_weight = tl.where(has_ce, tl.load(ce_scale + row * ce_scale_stride).to(ACC), 0.0)
            weight_1, hot = ce_weight / sum_1, ce_weight * (1.0 - smoothing)
            label_position = tl.where(known, label + shift, -1).to(tl.int32)

        inverse_s, inverse_t = 1.0 / sum_s, 1.0 / sum_t
        lift = tl.log2(sum_s) - tl.log2(sum_t)
        normalisers = (origin_s, origin_t, origin_1, inverse_s, inverse_t, lift)
        kd_weight = tl.where(has_kd != 0, tl.load(kd_scale + row * kd_scale_stride).to(ACC) * t, 0.0)
        weight_s, weight_t = kd_weight * inverse_s, kd_weight * inverse_t
        if DIVERGENCE == REVERSE_KL:
            weight_s *= LN2
        elif DIVERGENCE != FORWARD_KL:
            weight_s *= LN2 * (1.0 - beta)
        weights = (weight_s, weight_t, weight_1, ce_weight * smoothing / V if SMOOTH else zero)

        expected = zero
        if DIVERGENCE != FORWARD_KL:
            # Their gradients need an expectation that the normalisers must be known for.
            sum_s, sum_t = _walk(
                student_row, teacher_row, grad_row, student_bias, teacher_bias, has_kd, label_position, hot,
                normalisers, weights, expected, beta, shift, scale, unit,
                DIVERGENCE, POWER, False, False, STUDENT_BIAS, TEACHER_BIAS, False, True, "evict_last",
                V, HEAD, BLOCKS, BLOCK, EACH, REST, RAGGED, ACC,
            )  # fmt: skip
            expected = sum_s * inverse_s if DIVERGENCE == REVERSE_KL else sum_s
        if WITH_GRAD or DIVERGENCE == FORWARD_KL:
            _, last_t = _walk(
                student_row, teacher_row, grad_row, student_bias, teacher_bias, has_kd, label_position, hot,
                normalisers, weights, expected, beta, shift, scale, unit,
                DIVERGENCE, POWER, HAS_LABELS, SMOOTH, STUDENT_BIAS, TEACHER_BIAS,
                WITH_GRAD, DIVERGENCE == FORWARD_KL, "evict_first",
                V, HEAD, BLOCKS, BLOCK, EACH, REST, RAGGED, ACC,
            )  # fmt: skip
        if DIVERGENCE == FORWARD_KL:
            divergence = last_t * inverse_t
        elif DIVERGENCE == REVERSE_KL:
            divergence = expected
        else:
            divergence = beta * sum_t + (1.0 - beta) * sum_s
        tl.store(kd + row, tl.where(has_kd != 0, divergence * LN2 * t * t, 0.0))
        tl.store(ce + row, ce_row)
    else:
        tl.store(kd + row, 0.0)
        tl.store(ce + row, 0.0)
        if WITH_GRAD:
            _write_zeros(grad_row, shift, V, HEAD, BLOCKS, BLOCK, EACH, REST, RAGGED)


# --- launchers ----------------------------------------------------------------------------------------------


def compile_options(vocabulary: int, divergence: int, biased: bool, hip: bool) -> dict[str, int | bool]:
    """Warps and limits, by what the ahead-of-time test proves free of spills."""
    # Fusion is stated because its default differs between versions of Triton.
    options: dict[str, int | bool] = {
        "num_warps": threads_per_row(vocabulary) // (64 if hip else 32),
        "enable_fp_fusion": True,
    }
    if not hip:
        # At 64 registers a thread, a multiprocessor works on two rows of a large vocabulary at a time; the
        # forms that would spill there get what they need, and one row at a time.
        options["maxnreg"] = 128 if biased else 64 if divergence == FORWARD_KL.value else 96
    return options


def _launch(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    kd_mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    grad: Tensor | None,
    temperature: float,
    divergence: int,
    jsd_beta: float,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    rows, vocabulary = student.shape
    accumulator = torch.float64 if student.dtype is torch.float64 else torch.float32
    kd = torch.empty(rows, dtype=accumulator, device=student.device)
    ce = torch.empty_like(kd)
    if rows == 0:
        return kd, ce
    shifted = phase(student) != 0 or student.stride(0) % ALIGNMENT != 0
    biased = student_bias is not None or teacher_bias is not None
    with torch.cuda.device(student.device) if student.is_cuda else contextlib.nullcontext():
        kd_loss_kernel[(rows,)](
            student,
            teacher,
            student_bias,
            teacher_bias,
            None if labels is None else labels.contiguous(),
            None if kd_mask is None else kd_mask.contiguous().view(torch.uint8),
            kd_scale,
            ce_scale,
            kd,
            ce,
            student if grad is None else grad,
            temperature,
            jsd_beta,
            label_smoothing,
            ignore_index,
            phase(student),
            student.stride(0),
            teacher.stride(0),
            student.stride(0) if grad is None else grad.stride(0),
            kd_scale.stride(0) if kd_scale.dim() else 0,
            ce_scale.stride(0) if ce_scale.dim() else 0,
            DIVERGENCE=divergence,
            POWER={1.0: 0, 2.0: 1, 4.0: 2}.get(temperature, -1),
            HAS_LABELS=labels is not None,
            HAS_MASK=kd_mask is not None,
            SMOOTH=labels is not None and label_smoothing > 0,
            STUDENT_BIAS=student_bias is not None,
            TEACHER_BIAS=teacher_bias is not None,
            WITH_GRAD=grad is not None,
            TEACHER_ALIGNED=in_step(student, teacher),
            GRAD_ALIGNED=grad is not None and in_step(student, grad),
            ACC=tl.float64 if accumulator is torch.float64 else tl.float32,
            **row_shape(vocabulary, student.element_size(), shifted),
            **compile_options(vocabulary, divergence, biased, torch.version.hip is not None),
        )
    return kd, ce


def kd_loss_fwd(
    student: Tensor,  # (N, V), as the teacher: dense in V, any row pitch
    teacher: Tensor,  # (N, V)
    labels: Tensor | None,  # (N,)
    kd_mask: Tensor | None,  # (N,)
    kd_scale: Tensor,  # () or (N,)
    ce_scale: Tensor,  # () or (N,)
    temperature: float,
    divergence: int,
    jsd_beta: float,
    ignore_index: int,
    label_smoothing: float,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Before a loss scaler acts, a float16 gradient divided by the number of rows would underflow.
    grad_dtype = torch.float32 if student.dtype is torch.float16 else student.dtype
    grad = torch.empty(student.shape if with_grad else (0,), dtype=grad_dtype, device=student.device)
    kd, ce = _launch(
        student,
        teacher,
        None,
        None,
        labels,
        kd_mask,
        kd_scale,
        ce_scale,
        grad if with_grad else None,
        temperature,
        divergence,
        jsd_beta,
        ignore_index,
        label_smoothing,
    )
    loss = kd_scale * kd + ce_scale * ce
    return (loss.sum(dtype=torch.float64).to(loss.dtype) if reduce else loss), kd, ce, grad


def kd_loss_fwd_(
    student: Tensor,  # (N, V), overwritten by the gradient
    teacher: Tensor,  # (N, V)
    student_bias: Tensor | None,  # (V,)
    teacher_bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (N,)
    kd_mask: Tensor | None,  # (N,)
    kd_scale: Tensor,  # () or (N,)
    ce_scale: Tensor,  # () or (N,)
    temperature: float,
    divergence: int,
    jsd_beta: float,
    ignore_index: int,
    label_smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return _launch(
        student,
        teacher,
        None if student_bias is None else student_bias.contiguous(),
        None if teacher_bias is None else teacher_bias.contiguous(),
        labels,
        kd_mask,
        kd_scale,
        ce_scale,
        student if with_grad else None,
        temperature,
        divergence,
        jsd_beta,
        ignore_index,
        label_smoothing,
    )
