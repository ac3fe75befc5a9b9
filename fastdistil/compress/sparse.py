"""The kind "sparse": a weight stored as a bitmap and its kept values.

n weights of which k are kept take n bits and k numbers. The values are the parameter, so training moves them
and the pattern stays. For the 2:4 pattern the bitmap has 4 bits for 4 weights, as many as the two 2-bit
indices of NVIDIA's format (Mishra et al. 2021, section 3).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.compress.encoded import (
    EncodedWeight,
    code_of,
    coded_weights,
    densify,
    parameter_of,
    parametrize_weight,
)
from fastdistil.compress.replacements import replace, replacement


class SparseWeight(EncodedWeight):
    """Kept values in the order of the weight, row by row, zero elsewhere.

    Attributes:
        bitmap: (ceil(n / 8),) uint8; the bit i % 8 of byte i // 8 says whether weight i is kept.
    """

    kind = "sparse"
    bitmap: Tensor

    def __init__(self, shape: torch.Size, kept: int, device: torch.device) -> None:
        super().__init__(shape)
        self.kept = kept
        size = (shape.numel() + 7) // 8
        self.register_buffer("bitmap", torch.zeros(size, dtype=torch.uint8, device=device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.new_zeros(self.kept)

    def decode(self, parameter: Tensor) -> Tensor:  # (kept,)
        weight = parameter.new_zeros(self.shape)
        return weight.masked_scatter(unpack_bits(self.bitmap, self.shape), parameter)


def pack_bits(bits: Tensor) -> Tensor:
    """bool of any shape -> uint8, 8 in a byte, the first in the lowest bit, padded with zeros."""
    flat = bits.flatten().to(torch.uint8)
    flat = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack_bits`."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).flatten()[: shape.numel()].view(shape).bool()


def sparsify(model: Any, path: str, keep: Tensor, pattern: str | None = None) -> None:
    """Stores the weight at `path` sparse: its values where `keep` is true, which is somewhere."""
    module: Any = model.get_submodule(path)
    with torch.no_grad():
        values = module.weight[keep]
        spec: dict[str, Any] = {"kind": "sparse", "kept": len(values)}
        if pattern:
            spec["pattern"] = pattern
        built = _build(module, spec)
        parameter_of(built).copy_(values)
        code_of(built).bitmap.copy_(pack_bits(keep))
    replace(model, path, built, spec)


def to_semi_structured(model: Any) -> Any:
    """Turns weights pruned to 2:4 into torch's semi-structured tensors, for sparse tensor cores, in place.

    For inference on a CUDA device of compute capability 8.0 or later, in half precision; the shapes must fit
    `torch.sparse.to_sparse_semi_structured`. The model cannot be saved afterwards.
    """
    paths = [path for path, spec in coded_weights(model, "sparse") if spec.get("pattern") == "2:4"]
    densify(model)
    for path in paths:
        linear: Any = model.get_submodule(path)
        weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return model


@replacement("sparse")
def _build(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    weight: Any = module.weight
    return parametrize_weight(module, SparseWeight(weight.shape, spec["kept"], weight.device))
