"""The matrices of an encoder's layers that structured pruning cuts, wherever a family keeps them.

By name, not by the dependency graph of torch-pruning: tracing finds the matrices of the same heads and
neurons, but weighing these, and writing their numbers into the config, takes the names all the same; and
version 1.6.1 cuts the heads of ModernBERT, whose query, key and value are one matrix, so that the model no
longer runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.compress.encoded import DONE, kind_of
from fastdistil.compress.replacements import replacements, set_replacements
from fastdistil.errors import UserError
from fastdistil.models.stack import STACKS


@dataclass(frozen=True)
class Names:
    """Of one layer's parts, below the layer."""

    attention: str
    projections: tuple[str, ...]  # query, key, value, or the one that holds all three
    attention_output: str
    ffn_input: str
    ffn_output: str
    gated: bool = False  # whether ffn_input has the neurons' gates as its second half


_BERT = Names(
    "attention.self",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_NAMES = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "distilbert": Names(
        "attention",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
    ),
    "modernbert": Names("attn", ("attn.Wqkv",), "attn.Wo", "mlp.Wi", "mlp.Wo", gated=True),
}
SUPPORTED = tuple(sorted(_NAMES))


class Block:
    """One layer of a model. A cut narrows its matrices, which the caller then `record_sizes`."""

    def __init__(self, model: Any, layer: int) -> None:
        names = _NAMES[model.config.model_type]
        self.layer = layer
        self.names = names
        self.prefix = f"{stack_path(model)}.{layer}."
        self.module: Any = model.get_submodule(self.prefix.removesuffix("."))

    def part(self, name: str) -> Any:
        return self.module.get_submodule(name)

    @property
    def head_size(self) -> int:
        attention = self.part(self.names.attention)
        size: int = attention.head_dim if self.names.gated else attention.attention_head_size
        return size

    @property
    def num_heads(self) -> int:
        width: int = self.part(self.names.attention_output).in_features
        return width // self.head_size

    @property
    def num_neurons(self) -> int:
        width: int = self.part(self.names.ffn_output).in_features
        return width

    def head_rows(self, heads: Tensor) -> tuple[Tensor, Tensor]:  # heads (K,)
        """The rows of each projection, and the columns of the output matrix, that belong to the heads."""
        columns = (heads[:, None] * self.head_size + torch.arange(self.head_size)).flatten()
        if len(self.names.projections) > 1:
            return columns, columns
        thirds = torch.arange(3)[:, None] * self.num_heads * self.head_size
        return (thirds + columns).flatten(), columns

    def neuron_rows(self, neurons: Tensor) -> Tensor:
        """The rows of the FFN's input matrix that belong to the neurons, and to their gates."""
        return torch.cat([neurons, neurons + self.num_neurons]) if self.names.gated else neurons

    def keep_heads(self, heads: Tensor) -> None:
        rows, columns = self.head_rows(heads)
        for name in self.names.projections:
            cut_linear(self.part(name), rows=rows)
        cut_linear(self.part(self.names.attention_output), columns=columns)
        attention = self.part(self.names.attention)
        if hasattr(attention, "n_heads"):
            attention.n_heads = len(heads)
        elif not self.names.gated:  # ModernBERT counts its heads by the width of its matrices
            attention.num_attention_heads, attention.all_head_size = len(heads), len(columns)

    def keep_neurons(self, neurons: Tensor) -> None:
        cut_linear(self.part(self.names.ffn_input), rows=self.neuron_rows(neurons))
        cut_linear(self.part(self.names.ffn_output), columns=neurons)


def find_blocks(model: Any, *parts: str) -> list[Block]:
    """The layers of a model, whose `parts`, fields of `Names`, are to be cut.

    Raises `UserError` for another family, and where a matrix is no longer a plain one, or layers share it.
    """
    family = model.config.model_type
    if family not in _NAMES:
        raise UserError(
            f"{type(model).__name__} (model type {family!r}) cannot be pruned by structure; "
            f"supported: {', '.join(SUPPORTED)}"
        )
    blocks = [Block(model, layer) for layer in range(len(model.get_submodule(stack_path(model))))]
    weights = [parameter for block in blocks for parameter in block.module.parameters()]
    if len({id(weight) for weight in weights}) < len(weights):
        raise UserError("layers that share their weights cannot be pruned: prune before sharing")
    for block in blocks:
        for part in parts:
            named = getattr(block.names, part)
            for name in (named,) if isinstance(named, str) else named:
                require_plain(block.part(name), block.prefix + name)
    return blocks


def require_family(model: Any, method: str) -> None:
    """Raises `UserError` for a family whose layers are not known."""
    family = model.config.model_type
    if family not in SUPPORTED:
        raise UserError(
            f"{method}: {type(model).__name__} (model type {family!r}) is not supported; supported: "
            f"{', '.join(SUPPORTED)}"
        )


def require_plain(module: nn.Module, path: str) -> None:
    """Raises `UserError` for what is no plain linear layer, with the name that a user has for it."""
    if type(module) is not nn.Linear:
        kind = kind_of(module)
        found = f"is {DONE[kind]} already" if kind else f"is a {type(module).__name__}"
        raise UserError(
            f"{path} {found}, so that its rows and columns cannot be cut: prune heads, neurons and "
            "dimensions before other weights, and before quantising or factorising"
        )


def stack_path(model: Any) -> str:
    """The dotted name, in the whole model, of the list of layers."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return prefix + STACKS[model.config.model_type]


def cut_linear(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep only these outputs and inputs of a linear map, in this order."""
    if rows is not None:
        linear.weight = cut(linear.weight, 0, rows)
        if linear.bias is not None:
            linear.bias = cut(linear.bias, 0, rows)
        linear.out_features = len(rows)
    if columns is not None:
        linear.weight = cut(linear.weight, 1, columns)
        linear.in_features = len(columns)


def cut(parameter: Tensor, dim: int, kept: Tensor) -> nn.Parameter:
    part = parameter.detach().index_select(dim, kept.to(parameter.device))
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def ffn_size_name(config: Any) -> str:
    return "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"


def record_sizes(model: Any) -> None:
    """Say in the config what sizes the layers' matrices have: in its own fields where all layers are alike
    and the fields can say it, else in the list of replacements.
    """
    config = model.config
    blocks = find_blocks(model)
    neurons = {block.num_neurons for block in blocks if _is_plain(block, block.names.ffn_output)}
    if len(neurons) == 1 and all(_is_plain(block, block.names.ffn_output) for block in blocks):
        setattr(config, ffn_size_name(config), neurons.pop())
    kept = [(path, spec) for path, spec in replacements(model) if not _is_replaced(path, spec, blocks)]
    sizes = [entry for block in blocks for entry in _sizes(config, block)]
    # They come first: other kinds on the same matrices, and on what holds them, are built on top.
    set_replacements(model, sizes + kept)


def _is_plain(block: Block, name: str) -> bool:
    return type(block.part(name)) is nn.Linear


def _is_replaced(path: str, spec: dict[str, Any], blocks: Sequence[Block]) -> bool:
    """Whether `_sizes` says it anew."""
    for block in blocks:
        if path.startswith(block.prefix):
            name = path.removeprefix(block.prefix)
            return spec["kind"] == "heads" or (spec["kind"] == "linear" and _is_plain(block, name))
    return False


def _sizes(config: Any, block: Block) -> list[tuple[str, dict[str, Any]]]:
    """The entries of one layer, for what differs from the config."""
    names, hidden = block.names, config.hidden_size
    neurons = getattr(config, ffn_size_name(config))
    thirds = 3 if len(names.projections) == 1 else 1
    described = {
        **dict.fromkeys(names.projections, (hidden, thirds * hidden)),
        names.attention_output: (hidden, hidden),
        names.ffn_input: (hidden, (2 if names.gated else 1) * neurons),
        names.ffn_output: (neurons, hidden),
    }
    entries: list[tuple[str, dict[str, Any]]] = []
    for name, (inputs, outputs) in described.items():
        linear = block.part(name)
        if _is_plain(block, name) and (linear.in_features, linear.out_features) != (inputs, outputs):
            spec = {"kind": "linear", "in_features": linear.in_features, "out_features": linear.out_features}
            entries.append((block.prefix + name, spec))
    heads = config.num_attention_heads
    if (block.num_heads, block.head_size) != (heads, hidden // heads):
        spec = {"kind": "heads", "heads": block.num_heads, "head_size": block.head_size}
        entries.append((block.prefix + names.attention, spec))
    return entries
