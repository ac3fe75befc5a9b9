"""The two terms of the vocabulary losses: the rows that each uses, its factor, its precision."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistil.ops import checks

# The numbers stand in the ops' schemas and in every kernel.
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def saved_grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient between forward and backward.

    A loss scaler acts in the backward: before it, a float16 gradient divided by the number of rows would
    underflow.
    """
    return torch.float32 if dtype is torch.float16 else dtype


def wide_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """float64 where the device has it, for sums whose parts cancel; else the accumulation dtype."""
    return torch.float64 if device.type in ("cpu", "cuda") else accumulation_dtype(dtype)


def sum_rows(rows: Tensor) -> Tensor:
    """The sum of per-row values; they are few, so it is exact to float64 where there is one."""
    return rows.sum(dtype=wide_dtype(rows.device, rows.dtype)).to(rows.dtype)


def at_least_one(count: Tensor | int) -> Tensor | int:
    """What a mean divides by: where nothing counts, the sum is 0 and so is the mean."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def combine_rows(kd: Tensor, ce: Tensor, kd_scale: Tensor, ce_scale: Tensor, reduce: bool) -> Tensor:
    """kd_scale * kd + ce_scale * ce, per row or summed."""
    loss = kd_scale * kd + ce_scale * ce
    return sum_rows(loss) if reduce else loss


class Terms(NamedTuple):
    """Which rows each term uses and what it is multiplied by, in the form that the ops take."""

    labels: Tensor | None  # (N,) int64; None: no cross-entropy is computed
    kd_mask: Tensor | None  # (N,) bool; None: all rows
    kd_scale: Tensor  # ()
    ce_scale: Tensor  # ()
    kd_rows: Tensor | int  # what "mean" divides by
    ce_rows: Tensor | int

    def outputs(
        self, reduction: str, shape: tuple[int, ...], loss: Tensor, kd: Tensor, ce: Tensor, return_terms: bool
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """What the public functions return, from what the ops return."""
        if reduction == "none":
            loss, kd, ce = loss.view(shape), kd.view(shape), ce.view(shape)
        elif return_terms:
            kd, ce = kd.sum(), ce.sum()
            if reduction == "mean":
                kd, ce = kd / self.kd_rows, ce / self.ce_rows
        return (loss, kd.detach(), ce.detach()) if return_terms else loss


def prepare_terms(
    labels: Tensor | None,
    kd_mask: Tensor | None,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int,
    *,
    kd_weight: float | Tensor,
    ce_weight: float | Tensor,
    ignore_index: int,
    reduction: str,
    return_terms: bool,
) -> Terms:
    """Check masks, labels and weights, and find what each term is multiplied by. Nothing here waits for a
    device."""
    checks.check_weight("kd_weight", kd_weight)
    checks.check_weight("ce_weight", ce_weight)
    checks.check_integer("ignore_index", ignore_index)
    if labels is None and not isinstance(ce_weight, Tensor) and ce_weight != 0:
        raise ValueError(f"ce_weight is {ce_weight}, but there are no labels")
    rows = math.prod(shape)
    if kd_mask is not None:
        kd_mask = checks.check_mask("kd_mask", kd_mask, shape, device)
    kd_rows: Tensor | int = at_least_one(rows if kd_mask is None else kd_mask.sum())
    ce_rows: Tensor | int = 1
    if labels is not None:
        labels = checks.check_labels(labels, shape, device, vocabulary, ignore_index)
        labelled = labels != ignore_index
        ce_rows = at_least_one(labelled.sum())
        if kd_mask is None:
            kd_mask, kd_rows = labelled, ce_rows

    # A term that is multiplied by a constant 0 and that nobody looks at is not worth an exponential a logit.
    if not return_terms and isinstance(ce_weight, float | int) and ce_weight == 0:
        labels = None
    if not return_terms and isinstance(kd_weight, float | int) and kd_weight == 0:
        kd_mask = torch.zeros(rows, dtype=torch.bool, device=device)

    mean = reduction == "mean"
    return Terms(
        labels,
        kd_mask,
        _scale(kd_weight, kd_rows if mean else 1, device, dtype),
        _scale(ce_weight, ce_rows if mean else 1, device, dtype),
        kd_rows,
        ce_rows,
    )


def _scale(weight: float | Tensor, rows: Tensor | int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        weight = weight.detach().to(device, dtype)
    else:
        weight = float(weight)  # numpy's numbers and fractions divide by rules of their own
    if isinstance(rows, Tensor):
        return weight / rows.to(dtype)
    if isinstance(weight, Tensor):
        return weight / rows
    return torch.full((), weight / rows, device=device, dtype=dtype)


def check_settings(
    temperature: float, divergence: str, jsd_beta: float, label_smoothing: float, reduction: str
) -> None:
    checks.check_temperature(temperature)
    checks.check_choice("divergence", divergence, DIVERGENCES)
    checks.check_open_unit("jsd_beta", jsd_beta)
    checks.check_label_smoothing(label_smoothing)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)


def autocast(hidden: Tensor) -> Tensor:
    """The hidden states as a linear layer would take them under autocast."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return hidden
    return hidden.to(torch.get_autocast_dtype(kind))


def as_constant(tensor: Tensor) -> Tensor:
    """Without a gradient, and fit to be kept for backward, which a tensor of inference mode is not."""
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        return tensor.clone()
    return tensor.detach()


def as_rows(tensor: Tensor) -> Tensor:
    """(..., V) as (N, V) with a dense last dimension and any row pitch, without a copy where strides allow
    it."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    dense = rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]
    return rows if dense else rows.contiguous()
