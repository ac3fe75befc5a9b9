"""2:4 pruning: of each 4 consecutive inputs of a unit, the 2 weights of largest magnitude stay.

Mishra et al. 2021, the pattern that NVIDIA's sparse tensor cores multiply twice as fast; `to_semi_structured`
turns the result into torch's tensors for them.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fastdistil.compress.encoded import weights_to_compress
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.weight_masks import add_mask, bake
from fastdistil.errors import UserError
from fastdistil.schema import Section

NAME = "prune-2of4"


class Prune2of4Options(Section):
    embeddings: bool = Field(default=False, description="prune the embeddings, too")


def two_of_four(weight: Tensor) -> Tensor:  # (N, K) -> (N, K) bool
    """Which weights stay; of equal ones, the first."""
    groups = weight.detach().abs().reshape(-1, 4)
    order = groups.sort(dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, order[:, :2], True).view(weight.shape)


def prune_2of4(model: Any, options: Prune2of4Options, calibration: Calibration | None) -> Any:
    """The model with a fixed mask on each linear layer of the encoder, the pooler included.

    `finish` stores the other half sparse: 4 bits and 2 values for 4 weights.

    Raises:
        UserError: a layer's inputs are no multiple of 4; a weight is pruned, clustered or quantised already,
            there is none, or `embeddings` of a language model, whose output matrix they are.
    """
    found = weights_to_compress(model, NAME, embeddings=options.embeddings)
    for path, module in found:
        inputs = module.weight.shape[1]
        if inputs % 4:
            raise UserError(f"{NAME}: {path} has {inputs} inputs, which is not a multiple of 4")
    for path, module in found:
        keep = two_of_four(module.weight)
        zeros = keep.numel() // 2
        add_mask(model, path, {"rule": "fixed", "zeros": zeros, "pattern": "2:4"}).mask.copy_(keep)
    return model


METHODS = (
    Method(
        name=NAME,
        kind="pruning",
        description="zero 2 of every 4 consecutive weights, for sparse tensor cores; stored sparse",
        paper="Mishra et al. 2021, Accelerating Sparse Deep Neural Networks",
        options=Prune2of4Options,
        main=None,
        apply=prune_2of4,
        finish=lambda model, options: bake(model),
    ),
)
