"""The launchers run on CPU tensors in Triton's interpreter where there is no GPU."""

import os

import torch

# Read when a kernel is defined, so before its module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
