"""Checks of what a user passes in. Each raises a ValueError that names the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

REDUCTIONS = ("mean", "sum", "none")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# A number that is derived from a traced shape is a symbol.
_INTEGRAL = (Integral, torch.SymInt)
_REAL = (Real, torch.SymInt, torch.SymFloat)
# The tensor that is meant, by the last word of an argument's name, where the whole of an output of a model or
# of a linear layer is given.
_PARTS = {
    "logits": "logits",
    "hidden": "last_hidden_state",
    "states": "last_hidden_state",
    "weight": "weight",
    "projection": "weight",
    "bias": "bias",
}


def check_tensors(needed: Mapping[str, object], optional: Mapping[str, object]) -> None:
    """All are tensors, the optional ones may be None. Comes first: any other check asks a tensor."""
    for name, value in needed.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {_kind(value)}{_part(name, value)}")
    for name, value in optional.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor or None, got {_kind(value)}{_part(name, value)}")


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _part(name: str, value: object) -> str:
    part = _PARTS.get(name.rpartition("_")[2])
    if part is None:
        return ""
    if isinstance(getattr(value, part, None), Tensor):
        return f": give its .{part}"
    return f": give its [{part!r}]" if isinstance(value, Mapping) and part in value else ""


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise if a tensor carries a tangent, or is one of torch.func.grad: the ops have neither rule, and torch
    would take the tangent as 0."""
    if torch.compiler.is_compiling():
        return
    if any(tensor is not None and _in_forward_mode(tensor) for tensor in tensors):
        raise RuntimeError(
            f"{op} has a gradient for backward() and torch.autograd.grad() alone: forward-mode "
            "differentiation, torch.func.grad and torch.func.jvp are not supported"
        )


def _in_forward_mode(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)  # of vmap
    return forward_ad.unpack_dual(tensor).tangent is not None


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value in choices:
        return
    import difflib

    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def check_number(name: str, value: object, what: str = "a float") -> None:
    """Python's or numpy's, and no bool."""
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise ValueError(f"{name} must be {what}, got {_kind(value)}")


def check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, _INTEGRAL):
        raise ValueError(f"{name} must be an integer, got {_kind(value)}")


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:  # and not isfinite(), which torch.compile cannot trace of a symbol
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")


def check_open_unit(name: str, value: float) -> None:
    check_number(name, value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be inside (0, 1), got {value}")


def check_label_smoothing(value: float) -> None:
    check_number("label_smoothing", value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {value}")


def check_weight(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a float or a 0-dim tensor, got shape {tuple(value.shape)}")
        return
    check_number(name, value, "a float or a 0-dim tensor")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def check_chunk_size(value: int | None) -> None:
    if value is None:
        return
    check_integer("chunk_size", value)
    if value < 1:
        raise ValueError(f"chunk_size must be > 0, got {value}")


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the student is, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} ({why}), got {tuple(tensor.shape)}")


def check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype is not torch.bool and mask.dtype not in _INTEGERS:
        raise ValueError(f"{name} must be bool or integer 0/1, got {mask.dtype}")


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The mask, true where a row counts, as a bool vector (N,). Accepts bool or integers 0/1."""
    check_mask_dtype(name, mask)
    check_shape(name, mask, shape, "one value a row")
    check_device(name, mask, device)
    return mask.reshape(-1).bool()


def check_labels(
    labels: Tensor, shape: tuple[int, ...], device: torch.device, vocabulary: int, ignore_index: int
) -> Tensor:
    """The labels as int64 (N,), each `ignore_index` or in [0, V).

    On a CPU a wrong value raises here. Elsewhere, and in compiled or traced code, it trips a device
    assertion, which needs no synchronisation.
    """
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"labels must be integers (int64), got {labels.dtype}")
    check_shape("labels", labels, shape, "one label a row")
    check_device("labels", labels, device)
    labels = labels.reshape(-1).long()
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or type(wrong) is not Tensor:
        # A constant text: in compiled code the vocabulary may be a symbol.
        torch._assert_async(~wrong.any(), "labels must be in [0, V) or equal to ignore_index")
    elif bool(wrong.any()):
        value = int(labels[wrong][0])
        raise ValueError(
            f"labels must be in [0, {vocabulary}) or equal to ignore_index {ignore_index}, got {value}"
        )
    return labels
