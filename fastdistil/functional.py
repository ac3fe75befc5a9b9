"""Distillation losses as functions, as `torch.nn.functional` is to torch.

Each function lives in `fastdistil/ops/<op>.py`, beside its schema, its reference and its gradient.
"""

from fastdistil.ops.cosine_loss import cosine_loss
from fastdistil.ops.kd_loss import kd_loss
from fastdistil.ops.linear_kd_loss import linear_kd_loss

__all__ = ["cosine_loss", "kd_loss", "linear_kd_loss"]
