"""Remove whole layers."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from fastdistil.compress.blocks import find_blocks, stack_path
from fastdistil.compress.importance import Importance, layer_importances, top
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.replacements import replacements, set_replacements
from fastdistil.errors import UserError
from fastdistil.models.student import spread_layers
from fastdistil.schema import Section

By = Literal["spread", "top", "bottom", "importance", "magnitude", "taylor", "activation"]


class PruneLayersOptions(Section):
    num_layers: int | None = Field(default=None, ge=1, description="layers to keep; default half of them")
    ratio: float | None = Field(
        default=None, ge=0, lt=1, description="part of the layers to remove, instead of num_layers"
    )
    by: By = Field(
        default="spread",
        description="which layers go: those between evenly spread ones ('spread'), the last ('top'), the "
        "first ('bottom'), one after another the one without which the loss is lowest ('importance', many "
        "passes over the examples), or the least by the norm of their weights ('magnitude'), by the change "
        "of the loss to first order ('taylor') or by how little they turn the states ('activation')",
    )


def prune_layers(model: Any, options: PruneLayersOptions, calibration: Calibration | None) -> Any:
    """The model with fewer layers, in the order in which they were; its config says how many.

    "importance" takes one pass over the examples for each layer that is left, for each layer that goes;
    "magnitude", "taylor" and "activation" are those of `importance.layer_importances`. The other choices are
    those of Sajjad et al. 2023, "On the Effect of Dropping Layers of Pre-trained Transformer Models",
    section 3.

    Raises:
        UserError: more layers than there are, `num_layers` beside `ratio`, a choice by examples without any,
            a family that is not supported, layers that share weights.
    """
    depth = len(find_blocks(model))
    count = _count(options, depth)
    # ModernBERT's first layer alone has no norm before its attention, so that no other can take its place.
    first_stays = model.config.model_type == "modernbert"
    match options.by:
        case "spread":
            kept = spread_layers(depth, count)
        case "top":
            kept = list(range(count))
        case "bottom":
            kept = list(range(depth - count, depth))
            if first_stays:
                kept[0] = 0
        case "importance":
            kept = _greedy(model, count, _needed(calibration, options.by), first_stays)
        case "magnitude":
            kept = _most_important(model, count, options.by, None, first_stays)
        case "taylor" | "activation":
            kept = _most_important(model, count, options.by, _needed(calibration, options.by), first_stays)
    keep_layers(model, kept)
    return model


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Keep these layers, ascending and 0-based, and say so in the config."""
    path, config = stack_path(model), model.config
    entries = replacements(model)
    if any(where == path for where, _ in entries):
        raise UserError("the layers are stored together: prune them before that")
    stack = model.get_submodule(path)
    _put_layers(model, [stack[layer] for layer in kept])
    for place, layer in enumerate(_layers(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[layer] for layer in kept]
    renamed = []
    places = {layer: place for place, layer in enumerate(kept)}
    for where, spec in entries:
        if where.startswith(f"{path}."):
            layer, _, rest = where.removeprefix(f"{path}.").partition(".")
            if int(layer) not in places:
                continue
            where = f"{path}.{places[int(layer)]}" + (f".{rest}" if rest else "")
        renamed.append((where, spec))
    set_replacements(model, renamed)


def _count(options: PruneLayersOptions, depth: int) -> int:
    if options.num_layers is not None and options.ratio is not None:
        raise UserError("prune-layers: give either num_layers or ratio, not both")
    if options.num_layers is None:
        ratio = 0.5 if options.ratio is None else options.ratio
        return max(1, depth - round(ratio * depth))
    if options.num_layers > depth:
        raise UserError(f"prune-layers: num_layers is {options.num_layers}, but the model has only {depth}")
    return options.num_layers


def _layers(model: Any) -> list[Any]:
    return list(model.get_submodule(stack_path(model)))


def _put_layers(model: Any, layers: Sequence[Any]) -> None:
    parent_path, _, name = stack_path(model).rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, torch.nn.ModuleList(layers))
    if hasattr(parent, "n_layers"):
        parent.n_layers = len(layers)


def _greedy(model: Any, count: int, calibration: Calibration, first_stays: bool) -> list[int]:
    """The layers that are left when, one after another, the one goes without which the loss is lowest."""
    layers = _layers(model)
    left = list(range(len(layers)))
    while len(left) > count:
        losses = {}
        for layer in left[1 if first_stays else 0 :]:
            _put_layers(model, [layers[i] for i in left if i != layer])
            losses[layer] = _loss(model, calibration)
        left.remove(min(losses, key=losses.__getitem__))
    _put_layers(model, layers)
    return left


def _most_important(
    model: Any, count: int, importance: Importance, calibration: Calibration | None, first_stays: bool
) -> list[int]:
    scores = layer_importances(model, _layers(model), importance, calibration)
    if first_stays:
        scores[0] = torch.inf
    return [int(layer) for layer in top(scores, count)]


def _needed(calibration: Calibration | None, by: By) -> Calibration:
    if calibration is None:
        raise UserError(
            f"prune-layers: {by} is measured on training examples: name a task, or set by to 'spread'"
        )
    return calibration


@torch.no_grad()
def _loss(model: Any, calibration: Calibration) -> float:
    total = sum(
        calibration.loss(model, batch).double() * len(batch.input_ids) for batch in calibration.batches
    )
    return float(total)


METHODS = (
    Method(
        name="prune-layers",
        kind="pruning",
        description="remove whole layers",
        paper="Sajjad et al. 2023, On the Effect of Dropping Layers of Pre-trained Transformer Models",
        options=PruneLayersOptions,
        main="num_layers",
        apply=prune_layers,
    ),
)
