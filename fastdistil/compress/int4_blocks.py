"""Four bits an entry, with a scale for each block of a row: the form of a word embedding table.

    x̂ = s q,   q from -8 to 7,   |s| = max(far / 8, near / 7)

with `far` and `near` how far the two sides of a block reach from 0. The sign of s puts the side that reaches
further on the -8; |s| is the smallest that needs no clipping, so that an entry is off by at most half of it
(and by the scale's own rounding to half precision).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistil.errors import UserError

# Entries that share a scale: 4.5 bits an entry. Blocks of 64 with scales in single precision take as many,
# and round an eighth more coarsely.
BLOCK = 32
_LOWEST, _HIGHEST = -8, 7


def choose_table(shapes: Mapping[str, Sequence[int]]) -> str:
    """The name of the largest of the tables, which is to have 4 bits.

    Args:
        shapes: name -> (V, D) of the embedding tables that are nothing else.

    Raises:
        UserError: there is none, or its rows cannot be packed, two entries a byte.
    """
    if not shapes:
        raise UserError("embedding_bits: 4 is for an embedding table of its own, and the model has none")
    name = max(shapes, key=lambda name: math.prod(shapes[name]))
    width = shapes[name][1]
    if width % 2:
        raise UserError(f"embedding_bits: 4 packs entries in pairs, and the rows have {width}: take 8")
    return name


def quantize_blocks(
    x: Tensor,  # (..., D) floating
) -> tuple[Tensor, Tensor]:
    """q, (..., D) float32, and scales, (..., D / block) float16; the last block of a row may be shorter."""
    width = x.shape[-1]
    blocks = F.pad(x.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    low, high = torch.aminmax(blocks, dim=-1)
    far, near = torch.maximum(-low, high), torch.minimum(-low, high)
    size = torch.maximum(far / -_LOWEST, near / _HIGHEST)
    scales = torch.where(-low >= high, size, -size).half()
    scales = torch.where(scales == 0, 1, scales)
    steps = (blocks / scales.float()[..., None]).round().clamp(_LOWEST, _HIGHEST)
    return steps.flatten(-2)[..., :width], scales


def dequantize_blocks(steps: Tensor, scales: Tensor) -> Tensor:
    """x̂, (..., D) float16: ONNX Runtime multiplies in the scales' precision."""
    return steps.half() * scales.repeat_interleave(BLOCK, -1)[..., : steps.shape[-1]]
