"""The operators: one file an op, with its schema, eager reference, fake, gradient and public function."""

from fastdistil.ops import (
    attention_kl,
    attention_mse,
    cosine_loss,
    hidden_mse,
    huge_pages,
    kd_loss,
    linear_kd_loss,
    relation_kl,
    scale_grad,
)
from fastdistil.ops.registry import Implementation, implementations, load_extension

# After the schemas: the extension registers kernels for ops that must exist.
load_extension()

__all__ = [
    "Implementation",
    "attention_kl",
    "attention_mse",
    "cosine_loss",
    "hidden_mse",
    "huge_pages",
    "implementations",
    "kd_loss",
    "linear_kd_loss",
    "relation_kl",
    "scale_grad",
]
