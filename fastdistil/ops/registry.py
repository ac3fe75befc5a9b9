"""The operator library `fastdistil::*` and how implementations plug into it.

PyTorch's dispatcher chooses the implementation. The eager reference of an op is the fallback for every device
(CompositeExplicitAutograd), the C++ extension registers the CPU key when `fastdistil._C` is imported, and a
Triton kernel is registered under CUDA. Triton is imported by the first CUDA call and not before: it is slow
to import.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

NAMESPACE = "fastdistil"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
HAS_TRITON = find_spec("triton") is not None

# Op -> what it is composed of; None: it has kernels of its own.
_defined: dict[str, str | None] = {}
_extension_error: str | None = None


class Implementation(NamedTuple):
    """Which code serves an op on a device of this machine, and why not a faster one ("" if it is the
    fastest)."""

    op: str
    device: str
    implementation: str
    reason: str


def define(
    schema: str,
    *,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: str | None = None,
    composed: str | None = None,
    reads_back: bool = False,
) -> None:
    """Define an op with its eager reference and its fake (shapes only) implementation.

    `kernel` names the module of `fastdistil.kernels` that has a Triton launcher with the name and signature
    of the op. `composed` says what an op is made of that needs no kernel of its own; "{op}" in it stands for
    the implementation of that op. An op that `reads_back` waits for the device, which no CUDA graph may.
    """
    name = schema.partition("(")[0]
    tags = [torch.Tag.pt2_compliant_tag, *([torch.Tag.cudagraph_unsafe] if reads_back else [])]
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, without_autocast(eager), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if kernel is not None and HAS_TRITON:
        LIBRARY.impl(name, _lazy_launcher(name, kernel), "CUDA")
    _defined[name] = composed


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its products in the dtypes that it was given: autocast acts on what is passed to an op,
    and not inside it."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return call


def _lazy_launcher(name: str, kernel: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        module = importlib.import_module(f"fastdistil.kernels.{kernel}")
        return getattr(module, name)(*args)

    return launch


def load_extension() -> None:
    """Import the C++ extension, whose static initialisers register the CPU kernels, if it was built."""
    global _extension_error
    try:
        importlib.import_module("fastdistil._C")
    except ImportError as error:
        _extension_error = str(error)


def implementations() -> list[Implementation]:
    """For each op, on the CPU and on a GPU: the implementation that serves it on this machine and why not a
    faster one."""
    return [row for name in _defined for row in (_on_cpu(name), _on_cuda(name))]


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def _on_cpu(name: str) -> Implementation:
    if (composed := _defined[name]) is not None:
        return _composed(name, composed, "cpu", _on_cpu)
    if _has_kernel(name, "CPU"):
        extension = importlib.import_module("fastdistil._C")
        return Implementation(name, "cpu", f"C++ ({extension.cpu_capability()})", "")
    reason = "the C++ extension has no kernel for this op"
    if _extension_error is not None:
        reason = f"the C++ extension is not usable: {_extension_error}"
    return Implementation(name, "cpu", "eager PyTorch", reason)


def _on_cuda(name: str) -> Implementation:
    if not torch.cuda.is_available():
        built = torch.backends.cuda.is_built()
        reason = "no CUDA device is visible" if built else "this torch build has no CUDA"
        return Implementation(name, "cuda", "none", reason)
    if (composed := _defined[name]) is not None:
        return _composed(name, composed, "cuda", _on_cuda)
    if _has_kernel(name, "CUDA"):
        return Implementation(name, "cuda", "Triton", "")
    reason = "Triton has no kernel for this op" if HAS_TRITON else "Triton is not installed"
    return Implementation(name, "cuda", "eager PyTorch", reason)


def _composed(
    name: str, description: str, device: str, serves: Callable[[str], Implementation]
) -> Implementation:
    part = re.search(r"{(\w+)}", description)
    if part is None:
        return Implementation(name, device, description, "")
    inner = serves(part[1])
    return inner._replace(op=name, implementation=description.replace(part[0], inner.implementation))
