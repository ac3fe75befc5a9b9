"""Fused distillation losses for encoder models, and the recipes that use them.

Importing this package imports torch and nothing heavier.
"""

from fastdistil import functional, nn
from fastdistil.functional import cosine_loss, kd_loss, linear_kd_loss
from fastdistil.nn import CosineLoss, KDLoss, LinearKDLoss

__version__ = "0.1.0"

__all__ = [
    "CosineLoss",
    "KDLoss",
    "LinearKDLoss",
    "__version__",
    "cosine_loss",
    "functional",
    "kd_loss",
    "linear_kd_loss",
    "nn",
]
