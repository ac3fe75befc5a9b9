"""Unstructured pruning: the weights of smallest magnitude go (Han et al. 2015; Zhu and Gupta 2017)."""

from typing import Any, Literal

import torch
from pydantic import Field

from fastdistil.compress.encoded import parameter_of, weights_to_compress
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.weight_masks import add_mask, bake, count_zeros, largest
from fastdistil.schema import Section

NAME = "prune-magnitude"


class PruneMagnitudeOptions(Section):
    sparsity: float = Field(default=0.5, ge=0, lt=1, description="share of the weights that become zero")
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="layer: that share of each matrix; global: the smallest weights of all matrices together",
    )
    embeddings: bool = Field(default=False, description="prune the embeddings, too")
    gradual: bool = Field(default=True, description="let the sparsity rise in the recovery, not all at once")
    steps: int | None = Field(
        default=None, ge=1, description="optimiser steps of the recovery; null: there is none"
    )
    cooldown: float = Field(
        default=0.3, ge=0, lt=1, description="share of the steps at the end with the full sparsity"
    )


def prune_magnitude(model: Any, options: PruneMagnitudeOptions, calibration: Calibration | None) -> Any:
    """The model with a mask on each linear layer of the encoder, the pooler included; the head has none.

    In training the sparsity rises as `cubic_sparsity` has it, over `steps` optimiser steps; without steps the
    masks have the full sparsity at once. With `scope` global, the magnitudes at the start decide the share of
    each matrix. `finish` stores what is left sparse.

    Raises:
        UserError: a weight is pruned, clustered or quantised already, there is none, or `embeddings` of a
            language model, whose output matrix they are.
    """
    found = weights_to_compress(model, NAME, embeddings=options.embeddings)
    if options.scope == "global":
        zeros = _global_zeros([module.weight.detach() for _, module in found], options.sparsity)
    else:
        zeros = [count_zeros(module.weight.numel(), options.sparsity) for _, module in found]
    steps = (options.steps or 0) if options.gradual else 0
    for (path, module), count in zip(found, zeros, strict=True):
        rule = {"rule": "magnitude", "zeros": count, "steps": steps, "cooldown": options.cooldown}
        mask = add_mask(model, path, rule)
        if not steps:
            mask.finish(parameter_of(module))
    return model


def _global_zeros(weights: list[torch.Tensor], sparsity: float) -> list[int]:
    """Of each matrix, how many of its weights are among the smallest of all. At least one of each is kept."""
    magnitudes = torch.cat([weight.abs().float().flatten() for weight in weights])
    kept = largest(magnitudes, len(magnitudes) - count_zeros(len(magnitudes), sparsity))
    parts = kept.split([weight.numel() for weight in weights])
    return [min(int((~part).sum()), len(part) - 1) for part in parts]


METHODS = (
    Method(
        name=NAME,
        kind="pruning",
        description="zero the smallest weights; stored sparse, no faster by itself",
        paper="Zhu and Gupta 2017, To Prune, or Not to Prune",
        options=PruneMagnitudeOptions,
        main="sparsity",
        apply=prune_magnitude,
        finish=lambda model, options: bake(model),
        uses_steps=True,
    ),
)
