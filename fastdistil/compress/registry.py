"""All methods by name."""

import difflib
from functools import cache
from importlib import import_module

from fastdistil.compress.method import Method
from fastdistil.errors import UserError

_MODULES = (
    "prune_magnitude",
    "prune_movement",
    "prune_2of4",
    "prune_heads",
    "prune_ffn",
    "prune_layers",
    "prune_width",
    "low_rank",
    "factorize_embeddings",
    "share_layers",
    "cluster",
    "quantize",
)


@cache
def methods() -> dict[str, Method]:
    """Name -> method, in the order in which lists show them."""
    modules = [import_module(f"fastdistil.compress.{name}") for name in _MODULES]
    return {method.name: method for module in modules for method in module.METHODS}


def find_method(name: str) -> Method:
    """The method called `name`; `UserError` with the nearest name if there is none."""
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"unknown method {name!r}: {hint}")
    return known[name]
