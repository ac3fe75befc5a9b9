"""Large pages for large buffers on a CPU, before their first touch.

The kernel of the system hands out memory page by page when it is first written to. For a gradient of the
vocabulary matrix that takes as long as a matrix product, unless the pages are large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.ops.registry import define

SCHEMA = "advise_huge_pages_(Tensor(a!) buffer) -> ()"


def advise_huge_pages_ref_(buffer: Tensor) -> None:
    return None


define(
    SCHEMA,
    eager=advise_huge_pages_ref_,
    fake=advise_huge_pages_ref_,
    composed="a hint to the operating system",
)


def empty_huge(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`, in large pages where the system has them."""
    buffer = like.new_empty(shape, dtype=dtype)
    torch.ops.fastdistil.advise_huge_pages_(buffer)
    return buffer
