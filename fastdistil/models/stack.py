"""The parameters of one layer of an encoder, wherever its family keeps them."""

from typing import Any

from torch import nn

from fastdistil.errors import UserError
from fastdistil.models.layers import check_layer

# Of the encoder (a model's `base_model`), by `config.model_type`.
STACKS = {
    "bert": "encoder.layer",
    "roberta": "encoder.layer",
    "distilbert": "transformer.layer",
    "electra": "encoder.layer",
    "modernbert": "layers",
    "mobilebert": "encoder.layer",
}


def layer_parameters(model: Any, layer: int) -> list[nn.Parameter]:
    """The parameters of the 0-based `layer`, its norms included.

    Families: those of `STACKS`. Raises `UserError` for another family, or a layer that is not there.
    """
    stack: Any = model.base_model.get_submodule(STACKS[_family(model)])
    check_layer(layer, len(stack), type(model).__name__, "layer parameters")
    return list(stack[layer].parameters())


def embedding_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters of what comes before the first layer: all embeddings, their norm and projection."""
    _family(model)
    base = model.base_model
    # ELECTRA projects embeddings that are narrower than its layers in a module of its own.
    modules = [base.embeddings, getattr(base, "embeddings_project", None)]
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def _family(model: Any) -> str:
    family: str = model.config.model_type
    if family not in STACKS:
        raise UserError(
            f"{type(model).__name__} (model type {family!r}) cannot be trained layer by layer; "
            f"supported: {', '.join(sorted(STACKS))}"
        )
    return family
