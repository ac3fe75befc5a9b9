"""Remove attention heads: rows of the query, key and value matrices, columns of the output matrix."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdistil.compress.blocks import Block, find_blocks, record_sizes
from fastdistil.compress.importance import Importance, choose_importance, comparable, importances, top
from fastdistil.compress.method import Calibration, Method
from fastdistil.errors import UserError
from fastdistil.schema import Section


class PruneHeadsOptions(Section):
    ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="part of all heads to remove; default 0.5, or what `heads` names",
    )
    importance: Importance | None = Field(
        default=None,
        description="what a head is worth: the norm of its weights ('magnitude'), the change of the loss "
        "without it ('taylor'), its mean absolute output ('activation'); default 'taylor' where there are "
        "examples to measure it on",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="'layer' keeps the same number of heads in each layer, 'global' the most important of "
        "all, and at least one in each layer",
    )
    heads: dict[int, list[int]] | None = Field(
        default=None, description="the heads to remove, 0-based, of each 0-based layer, instead of a ratio"
    )


def prune_heads(model: Any, options: PruneHeadsOptions, calibration: Calibration | None) -> Any:
    """The model with fewer heads, whose outputs are those of the model with these heads' outputs set to 0.

    Their width stays, so that no config can describe a BERT with fewer heads: the sizes are in the list of
    replacements.

    Raises:
        UserError: all heads of a layer are to go, a layer or head that is not there, a ratio beside a list,
            an importance that needs examples without any, a family that is not supported.
    """
    blocks = find_blocks(model, "projections", "attention_output")
    if options.heads is not None:
        if options.ratio is not None:
            raise UserError("prune-heads: give either ratio or heads, not both")
        kept = _without(blocks, options.heads)
    else:
        importance = choose_importance(options.importance, calibration, "prune-heads")
        scores = importances(model, blocks, "heads", importance, calibration)
        kept = kept_heads(scores, 0.5 if options.ratio is None else options.ratio, options.scope, importance)
    for block, heads in zip(blocks, kept, strict=True):
        block.keep_heads(heads)
    record_sizes(model)
    return model


def kept_heads(
    scores: Sequence[Tensor],  # of each layer, (H,)
    ratio: float,
    scope: Literal["layer", "global"],
    importance: Importance,
) -> list[Tensor]:
    """The heads that each layer keeps, ascending; at least one."""
    if scope == "layer":
        return [top(score, max(1, len(score) - round(ratio * len(score)))) for score in scores]
    scores = [score.clone() for score in comparable(scores, importance)]
    for score in scores:
        score[score.argmax()] = torch.inf
    pooled = torch.cat(scores)
    keep = max(len(scores), len(pooled) - round(ratio * len(pooled)))
    chosen = torch.zeros(len(pooled), dtype=torch.bool)
    chosen[top(pooled, keep)] = True
    return [part.nonzero().flatten() for part in chosen.split([len(score) for score in scores])]


def _without(blocks: Sequence[Block], heads: dict[int, list[int]]) -> list[Tensor]:
    for layer, gone in heads.items():
        if not 0 <= layer < len(blocks):
            raise UserError(f"prune-heads: no layer {layer}, the layers are 0 to {len(blocks) - 1}")
        count = blocks[layer].num_heads
        for head in gone:
            if not 0 <= head < count:
                raise UserError(
                    f"prune-heads: layer {layer} has no head {head}, its heads are 0 to {count - 1}"
                )
        if len(set(gone)) == count:
            raise UserError(
                f"prune-heads: all {count} heads of layer {layer} are to go, but one must stay; "
                "prune-layers removes whole layers"
            )
    return [
        torch.tensor([head for head in range(block.num_heads) if head not in heads.get(block.layer, [])])
        for block in blocks
    ]


METHODS = (
    Method(
        name="prune-heads",
        kind="pruning",
        description="remove the least important attention heads",
        paper="Michel et al. 2019, Are Sixteen Heads Really Better than One?",
        options=PruneHeadsOptions,
        main="ratio",
        apply=prune_heads,
    ),
)
