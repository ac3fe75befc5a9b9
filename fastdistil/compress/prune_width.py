"""Remove dimensions of the hidden states: an axis of every matrix, embedding and norm of the model."""

from typing import Any

from pydantic import Field

from fastdistil.compress.blocks import find_blocks, record_sizes
from fastdistil.compress.importance import Importance, choose_importance, importances, top
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.spaces import dim_importance, find_spaces
from fastdistil.errors import UserError
from fastdistil.schema import Section


class PruneWidthOptions(Section):
    ratio: float = Field(
        default=0.5, ge=0, lt=1, description="part of hidden_size to remove, rounded to the size of a head"
    )
    importance: Importance | None = Field(
        default=None,
        description="what a dimension is worth: the norm of its weights ('magnitude'), the change of the "
        "loss without it ('taylor'), its mean absolute value ('activation'); default 'taylor' where there "
        "are examples to measure it on",
    )


def prune_width(model: Any, options: PruneWidthOptions, calibration: Calibration | None) -> Any:
    """The model with narrower hidden states.

    All layers keep the same dimensions, since their outputs are added up. The number of heads shrinks in
    proportion, so that hidden_size = heads * head size holds, the config says it all, and `AutoModel` loads
    the model; a layer that has fewer heads already keeps them. The feed-forward networks keep their neurons.
    The norms are of fewer values afterwards, so that, unlike with heads and neurons, the model is not the
    one with these dimensions set to 0: train it after this.

    Raises:
        UserError: a ratio that, rounded, removes nothing; an importance that needs examples without any; a
            family or head that is not supported; a model that is factorised, quantised or masked.
    """
    importance = choose_importance(options.importance, calibration, "prune-width")
    blocks = find_blocks(model, "projections", "attention_output", "ffn_input", "ffn_output")
    spaces = find_spaces(model, blocks)
    config = model.config
    head_size, hidden = blocks[0].head_size, config.hidden_size
    width = max(1, round((1 - options.ratio) * hidden / head_size)) * head_size
    if width == hidden and options.ratio:
        raise UserError(
            f"prune-width: ratio {options.ratio} of {hidden} dimensions removes nothing, as whole heads of "
            f"{head_size} go and one stays"
        )
    projected = hasattr(model.base_model, "embeddings_project")
    if projected and width == config.embedding_size:
        raise UserError(
            f"prune-width: {width} dimensions are as many as the embeddings have, and then an ELECTRA has no "
            "projection between them: choose another ratio"
        )
    heads = importances(model, blocks, "heads", importance, calibration)
    dims = [top(dim_importance(space, importance, model, calibration), width) for space in spaces]
    for block, scores in zip(blocks, heads, strict=True):
        block.keep_heads(top(scores, width // head_size))
    for space, kept in zip(spaces, dims, strict=True):
        space.keep(kept)
    # Together: a config refuses a hidden_size that is not a multiple of the number of heads.
    config.update({"hidden_size": width, "num_attention_heads": width // head_size})
    if hasattr(config, "embedding_size") and not projected:
        config.embedding_size = width
    record_sizes(model)
    return model


METHODS = (
    Method(
        name="prune-width",
        kind="pruning",
        description="remove the least important dimensions of the hidden states",
        paper="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning",
        options=PruneWidthOptions,
        main="ratio",
        apply=prune_width,
    ),
)
