"""Consecutive layers with the same weights (ALBERT, Lan et al. 2020, section 3.1)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from fastdistil.compress.blocks import require_family, stack_path
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.replacements import replace, replacement
from fastdistil.errors import UserError
from fastdistil.schema import Section

# Of a layer, what is one module in several layers: in most families the layer itself.
_WHOLE = ("",)
# ModernBERT's layers differ in what they attend to, and its first has no attention norm.
_MODERNBERT = ("attn_norm", "attn.Wqkv", "attn.Wo", "mlp_norm", "mlp")


@replacement("shared")
def _build(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    assert isinstance(module, nn.ModuleList)
    _share(module, spec["layers"], spec["parts"])
    return module


class ShareLayersOptions(Section):
    groups: int | None = Field(
        default=None, ge=1, description="layers that stay distinct; null: half of them, ALBERT has 1"
    )
    init: Literal["first", "mean", "best"] | None = Field(
        default=None,
        description="what a group starts from: its first layer, the mean of its layers, or the one with "
        "which the calibration examples cost least; null: best where there are examples, else first",
    )


def share_layers(model: Any, options: ShareLayersOptions, calibration: Calibration | None) -> Any:
    """The model with `groups` layers' weights, each used by about depth / groups layers in a row.

    It computes as much as before, and its folder holds the weights of a group once. "best" takes a pass over
    the examples for each layer.

    Raises:
        UserError: as many groups as layers, or more; "best" without examples; "mean" of layers that differ
            in size or are stored in a code; layers that share weights already; a family that is not
            supported.
    """
    path, stack, parts = _stack(model)
    depth = len(stack)
    groups = max(1, depth // 2) if options.groups is None else options.groups
    if groups >= depth:
        raise UserError(f"share-layers: groups must be below the {depth} layers of the model, got {groups}")
    init = options.init or ("first" if calibration is None else "best")
    bounds = [group * depth // groups for group in range(groups + 1)]
    members = [range(first, end) for first, end in pairwise(bounds)]
    if init == "best":
        if calibration is None:
            raise UserError("share-layers: init 'best' needs examples of a task, and there is none")
        owners = [_best(model, stack, group, parts, calibration) for group in members]
    else:
        owners = [group[0] for group in members]
    if init == "mean":
        for group in members:
            _average(stack, group, parts)
    layers = [owner for owner, group in zip(owners, members, strict=True) for _ in group]
    _share(stack, layers, parts)
    replace(model, path, stack, {"kind": "shared", "layers": layers, "parts": list(parts)})
    return model


def _share(stack: nn.ModuleList, layers: Sequence[int], parts: Sequence[str]) -> None:
    """Layer i takes the `parts` of layer `layers[i]`, by the same module.

    A part without weights, as is the attention norm of ModernBERT's first layer, is neither given nor taken:
    it stays, and the others of its group share that of their first.
    """
    for part in parts:
        there = [stack[i].get_submodule(part) for i in range(len(stack))]
        weighty = [any(True for _ in module.parameters()) for module in there]
        for i, owner in enumerate(layers):
            if not weighty[owner]:
                owner = next((j for j, k in enumerate(layers) if k == owner and weighty[j]), owner)
            if weighty[i]:
                _put(stack, i, part, there[owner])


def _put(stack: nn.ModuleList, layer: int, part: str, module: nn.Module) -> None:
    if part:
        stack[layer].set_submodule(part, module)
    else:
        stack[layer] = module


def _best(
    model: Any, stack: nn.ModuleList, group: range, parts: Sequence[str], calibration: Calibration
) -> int:
    """The layer of the group which, in the place of all of them, makes the model cost least."""
    there = {(i, part): stack[i].get_submodule(part) for i in group for part in parts}
    costs = {}
    for candidate in group:
        layers = [candidate if i in group else i for i in range(len(stack))]
        _share(stack, layers, parts)
        with torch.no_grad():
            costs[candidate] = sum(float(calibration.loss(model, batch)) for batch in calibration.batches)
        for (i, part), module in there.items():
            _put(stack, i, part, module)
    return min(group, key=costs.__getitem__)


def _average(stack: nn.ModuleList, group: range, parts: Sequence[str]) -> None:
    """Puts the mean of the group's weights into the first layer of the group that has the part."""
    for part in parts:
        modules = [stack[i].get_submodule(part) for i in group]
        modules = [module for module in modules if any(True for _ in module.parameters())]
        named = [dict(module.named_parameters()) for module in modules]
        shapes = [{name: weight.shape for name, weight in weights.items()} for weights in named]
        # What weights are decoded from has no mean, and is kept in buffers.
        coded = any(True for module in modules for _ in module.buffers())
        if coded or any(shape != shapes[0] for shape in shapes):
            raise UserError(
                f"share-layers: layers {group[0]} to {group[-1]} differ in size or are stored in a code, so "
                "that they have no mean: set init to 'first' or 'best'"
            )
        with torch.no_grad():
            for name, weight in named[0].items() if named else ():
                weight.copy_(torch.stack([weights[name] for weights in named]).mean(0))


def _stack(model: Any) -> tuple[str, nn.ModuleList, Sequence[str]]:
    """The path of the model's layers, they, and the parts of one that can be shared."""
    require_family(model, "share-layers")
    path = stack_path(model)
    stack = model.get_submodule(path)
    weights = [parameter for layer in stack for parameter in layer.parameters()]
    if len({id(weight) for weight in weights}) < len(weights):
        raise UserError("share-layers: the layers share weights already")
    return path, stack, _MODERNBERT if model.config.model_type == "modernbert" else _WHOLE


METHODS = (
    Method(
        name="share-layers",
        kind="sharing",
        description="let groups of consecutive layers share their weights, as in ALBERT",
        paper="Lan et al. 2020, ALBERT: A Lite BERT for Self-supervised Learning of Language Representations",
        options=ShareLayersOptions,
        main="groups",
        apply=share_layers,
    ),
)
