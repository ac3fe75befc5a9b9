"""Distillation losses as functions, as `torch.nn.functional` is to torch.

Each function lives in `fastdistil/ops/<op>.py`, beside its schema, its reference and its gradient.
"""

from fastdistil.ops.attention_kl import attention_kl
from fastdistil.ops.attention_mse import attention_mse
from fastdistil.ops.cosine_loss import cosine_loss
from fastdistil.ops.hidden_mse import hidden_mse
from fastdistil.ops.kd_loss import kd_loss
from fastdistil.ops.linear_kd_loss import linear_kd_loss
from fastdistil.ops.relation_kl import relation_kl

__all__ = [
    "attention_kl",
    "attention_mse",
    "cosine_loss",
    "hidden_mse",
    "kd_loss",
    "linear_kd_loss",
    "relation_kl",
]
