"""The vector spaces that a model's matrices read and write: the residual stream, and one inside its head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.compress.blocks import Block, cut, require_plain
from fastdistil.compress.importance import Importance
from fastdistil.compress.method import Calibration
from fastdistil.errors import UserError

_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForQuestionAnswering", "ForMaskedLM")


@dataclass
class Space:
    """All that has one of its axes in a space of D dimensions."""

    readers: list[nn.Linear] = field(default_factory=list)  # by their columns
    writers: list[nn.Linear] = field(default_factory=list)  # by their rows and bias
    embeddings: list[nn.Embedding] = field(default_factory=list)
    norms: list[nn.LayerNorm] = field(default_factory=list)

    def axes(self) -> Iterator[tuple[nn.Module, str, int]]:
        """`(module, parameter, axis)` of every parameter that is there."""
        for reader in self.readers:
            yield reader, "weight", 1
        for writer in self.writers:
            yield writer, "weight", 0
            if writer.bias is not None:
                yield writer, "bias", 0
        for embedding in self.embeddings:
            yield embedding, "weight", 1
        for norm in self.norms:
            yield norm, "weight", 0
            if norm.bias is not None:
                yield norm, "bias", 0

    def keep(self, dims: Tensor) -> None:  # dims (K,)
        # By the old parameter: one may be tied to another, or both read and write the space.
        places = [(module, name, axis, getattr(module, name)) for module, name, axis in self.axes()]
        cuts = {id(old): old for _, _, _, old in places}
        for key, axis in {(id(old), axis) for _, _, axis, old in places}:
            cuts[key] = cut(cuts[key], axis, dims)
        for module, name, _, old in places:
            setattr(module, name, cuts[id(old)])
        for reader in self.readers:
            reader.in_features = len(dims)
        for writer in self.writers:
            writer.out_features = len(dims)
        for embedding in self.embeddings:
            embedding.embedding_dim = len(dims)
        for norm in self.norms:
            norm.normalized_shape = (len(dims),)


def find_spaces(model: Any, blocks: list[Block]) -> list[Space]:
    """The residual stream first, then the space between pooler or dense layer and output layer, if there is
    one.

    Raises `UserError` for a head whose layers are not known, and where a matrix is no longer a plain one.
    """
    name = type(model).__name__
    if model.base_model is not model and not name.endswith(_HEADS):
        raise UserError(f"prune-width: the head of {name} is not supported; supported: {', '.join(_HEADS)}")
    hidden = model.config.hidden_size
    stream = Space()
    base = model.base_model
    before = [base.embeddings, getattr(base, "embeddings_project", None), getattr(base, "final_norm", None)]
    for part in before:
        for path, module in part.named_modules() if part is not None else ():
            if isinstance(module, nn.Embedding) and module.embedding_dim == hidden:
                stream.embeddings.append(module)
            elif isinstance(module, nn.LayerNorm) and module.normalized_shape == (hidden,):
                stream.norms.append(module)
            elif part is not base.embeddings and isinstance(module, nn.Linear):
                stream.writers.append(module)
            elif next(module.children(), None) is None and module.state_dict():
                _require_narrower(module, path, hidden)
    for block in blocks:
        names = block.names
        stream.readers += [block.part(part) for part in (*names.projections, names.ffn_input)]
        stream.writers += [block.part(part) for part in (names.attention_output, names.ffn_output)]
        stream.norms += [module for module in block.module.modules() if isinstance(module, nn.LayerNorm)]
    return [stream, *_head_space(model, stream)]


def _require_narrower(module: nn.Module, path: str, hidden: int) -> None:
    """Embeddings that are projected to the residual stream afterwards are not of it."""
    narrow = isinstance(module, nn.Embedding | nn.LayerNorm)
    if not narrow:
        raise UserError(
            f"prune-width: the embeddings' {path} is a {type(module).__name__}, which cannot be cut to fewer "
            f"than {hidden} dimensions: prune before factorising or quantising"
        )


def _head_space(model: Any, stream: Space) -> list[Space]:
    """Adds what reads the residual stream last, and returns the space that it writes to, if it is another."""
    hidden, base = model.config.hidden_size, model.base_model
    parts = list(base.pooler.named_modules()) if getattr(base, "pooler", None) is not None else []
    inside = set(base.modules())
    if base is not model:
        parts += [(path, module) for path, module in model.named_modules() if module not in inside]
    layers = [
        (path, module)
        for path, module in parts
        if next(module.parameters(recurse=False), None) is not None and not _only_bias(module)
    ]
    # A vocabulary head ends in the space of the word embeddings, to which it is tied.
    own = stream if type(model).__name__.endswith("ForMaskedLM") else Space()
    here = stream
    for place, (path, module) in enumerate(layers):
        if isinstance(module, nn.LayerNorm):
            here.norms += [module] if module.normalized_shape == (hidden,) else []
            continue
        require_plain(module, path)
        assert isinstance(module, nn.Linear)
        last = base is not model and place == len(layers) - 1
        if module.in_features == hidden:
            here.readers.append(module)
        if module.out_features == hidden and not last:
            here = own
            here.writers.append(module)
    return [own] if own is not stream and own.writers else []


def _only_bias(module: nn.Module) -> bool:
    """Of a vocabulary head, whose output bias is a parameter beside the decoder's."""
    return not hasattr(module, "weight")


def dim_importance(
    space: Space, importance: Importance, model: Any, calibration: Calibration | None
) -> Tensor:
    """(D,) float64 on the CPU: the worth of each dimension, as `importance` has it of heads and neurons.

    A gate, and an activation, is here that of a dimension wherever it is read.
    """
    if importance == "magnitude":
        seen: dict[tuple[int, int], Tensor] = {}
        for module, name, axis in space.axes():
            parameter = getattr(module, name).detach().double()
            others = [dim for dim in range(parameter.ndim) if dim != axis]
            squares = parameter.square()
            seen[id(getattr(module, name)), axis] = (squares.sum(others) if others else squares).cpu()
        return torch.stack(list(seen.values())).sum(0).sqrt()
    assert calibration is not None
    return (_taylor if importance == "taylor" else _activation)(space, model, calibration)


def _taylor(space: Space, model: Any, calibration: Calibration) -> Tensor:
    gate = torch.empty(0)

    def multiply(states: Tensor) -> Tensor:  # (B, L, D) or (B, D)
        return states * (gate if states.ndim == 2 else gate[:, None])

    width, device = space.readers[0].in_features, space.readers[0].weight.device
    total, examples = torch.zeros(width, dtype=torch.float64), 0
    with _reading(space, multiply), torch.enable_grad():
        for batch in calibration.batches:
            rows = len(batch.input_ids)
            # The options of a choice (B, C, L) are sequences like others.
            sequences = batch.input_ids.shape[:-1].numel()
            gate = torch.ones(sequences, width, device=device, dtype=model.dtype, requires_grad=True)
            (gradient,) = torch.autograd.grad(calibration.loss(model, batch), gate)
            total += (rows * gradient.double().abs()).sum(0).cpu()
            examples += rows
    return total / examples


def _activation(space: Space, model: Any, calibration: Calibration) -> Tensor:
    total = torch.zeros(space.readers[0].in_features, dtype=torch.float64)
    mask = torch.empty(0)

    def add(states: Tensor) -> Tensor:  # (B, L, D) or (B, D)
        tokens = states.detach()[mask] if states.ndim == 3 else states.detach()
        total.add_(tokens.double().abs().mean(0).cpu())
        return states

    with _reading(space, add), torch.no_grad():
        for batch in calibration.batches:
            mask = batch.attention_mask.bool().flatten(0, -2)
            calibration.loss(model, batch)
    return total / len(calibration.batches)


@contextmanager
def _reading(space: Space, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handles = [
        reader.register_forward_pre_hook(lambda module, inputs: (change(inputs[0]),))
        for reader in space.readers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
