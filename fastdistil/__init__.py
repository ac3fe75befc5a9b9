"""Fused distillation losses for encoder models, and the recipes that use them.

Importing this package imports torch and nothing heavier.
"""

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
    "nn",
    "relation_kl",
]
