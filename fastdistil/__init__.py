"""Fused distillation losses for encoder models, and the recipes that use them.

Importing this package imports torch and nothing heavier.
"""

from typing import TYPE_CHECKING, Any

from fastdistil import functional, nn
from fastdistil.functional import (
    attention_kl,
    attention_mse,
    cosine_loss,
    hidden_mse,
    kd_loss,
    linear_kd_loss,
    relation_kl,
)
from fastdistil.nn import CosineLoss, KDLoss, LinearKDLoss

if TYPE_CHECKING:
    from fastdistil.compress.store import load

__version__ = "0.1.0"

__all__ = [
    "CosineLoss",
    "KDLoss",
    "LinearKDLoss",
    "__version__",
    "attention_kl",
    "attention_mse",
    "cosine_loss",
    "functional",
    "hidden_mse",
    "kd_loss",
    "linear_kd_loss",
    "load",
    "nn",
    "relation_kl",
]


def __getattr__(name: str) -> Any:
    # `load` reads models, for which it imports transformers' and our readers of them: when it is asked for.
    if name == "load":
        from fastdistil.compress.store import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
