"""The operators: one file an op, with its schema, eager reference, fake, gradient and public function."""

from fastdistil.ops import cosine_loss, kd_loss, linear_kd_loss, scale_grad
from fastdistil.ops.registry import Implementation, implementations, load_extension

# After the schemas: the extension registers kernels for ops that must exist.
load_extension()

__all__ = [
    "Implementation",
    "cosine_loss",
    "implementations",
    "kd_loss",
    "linear_kd_loss",
    "scale_grad",
]
