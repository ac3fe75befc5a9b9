"""Remove neurons of the feed-forward networks: rows of the first matrix and columns of the second."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdistil.compress.blocks import find_blocks, record_sizes
from fastdistil.compress.importance import Importance, choose_importance, comparable, importances, top
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.reconstruct import Moments, output_moments, refit
from fastdistil.errors import UserError
from fastdistil.schema import Section


class PruneFFNOptions(Section):
    ratio: float = Field(default=0.5, ge=0, lt=1, description="part of all neurons to remove")
    importance: Importance | None = Field(
        default=None,
        description="what a neuron is worth: the norm of its weights ('magnitude'), the change of the loss "
        "without it ('taylor'), its mean absolute activation ('activation'); default 'taylor' where there "
        "are examples to measure it on",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="'layer' keeps the same number of neurons in each layer, 'global' the most important "
        "of all",
    )
    round_to: int = Field(default=8, ge=1, description="widths are multiples of it, for the vector units")
    reconstruct: bool | None = Field(
        default=None,
        description="refit the second matrix by ridge regression, so that on the examples it gives what it "
        "gave with all neurons, as nearly as it can; default where there are examples",
    )


def prune_ffn(model: Any, options: PruneFFNOptions, calibration: Calibration | None) -> Any:
    """The model with fewer neurons, whose outputs are those of the model with these neurons set to 0, unless
    the second matrix is refitted.

    With one width for all layers the config says it, and `AutoModel` loads the model.

    Raises:
        UserError: `reconstruct`, or an importance that needs examples, without any; a family that is not
            supported.
    """
    blocks = find_blocks(model, "ffn_input", "ffn_output")
    importance = choose_importance(options.importance, calibration, "prune-ffn")
    if options.reconstruct and calibration is None:
        raise UserError("prune-ffn: reconstruct fits the matrices on training examples: name a task")
    scores = importances(model, blocks, "neurons", importance, calibration)
    kept = kept_neurons(scores, options.ratio, options.scope, importance, options.round_to)
    moments: Sequence[Moments | None] = [None] * len(blocks)
    if options.reconstruct is not False and calibration is not None:
        moments = output_moments(model, blocks, calibration)
    for block, neurons, moment in zip(blocks, kept, moments, strict=True):
        if moment is not None:
            refit(block.part(block.names.ffn_output), neurons, moment)
        block.keep_neurons(neurons)
    record_sizes(model)
    return model


def kept_neurons(
    scores: Sequence[Tensor],  # of each layer, (F,)
    ratio: float,
    scope: Literal["layer", "global"],
    importance: Importance,
    round_to: int,
) -> list[Tensor]:
    """The neurons that each layer keeps, ascending: a multiple of `round_to`, or all."""
    if scope == "layer":
        return [top(score, _rounded((1 - ratio) * len(score), round_to, len(score))) for score in scores]
    # Whole packs of `round_to` neurons go, those of a layer from the least important one on.
    packs = [
        torch.stack([pack.sum() for pack in score.sort(descending=True).values.split(round_to)])
        for score in comparable(scores, importance)
    ]
    for pack in packs:
        pack[0] = torch.inf  # stays: a layer must have some
    pooled = torch.cat(packs)
    chosen = torch.zeros(len(pooled), dtype=torch.bool)
    chosen[top(pooled, max(len(packs), len(pooled) - round(ratio * len(pooled))))] = True
    counts = [int(part.sum()) for part in chosen.split([len(pack) for pack in packs])]
    return [
        top(score, min(count * round_to, len(score))) for score, count in zip(scores, counts, strict=True)
    ]


def _rounded(wanted: float, multiple: int, most: int) -> int:
    return min(max(multiple, round(wanted / multiple) * multiple), most)


METHODS = (
    Method(
        name="prune-ffn",
        kind="pruning",
        description="remove the least important neurons of the feed-forward networks",
        paper="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning",
        options=PruneFFNOptions,
        main="ratio",
        apply=prune_ffn,
    ),
)
