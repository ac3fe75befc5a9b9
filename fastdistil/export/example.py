"""What is traced: a model with plain weights, on an example some of whose axes are left open."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from fastdistil.compress.encoded import densify, kind_of

AXES = ("batch", "choices", "length")
SHORTEST = 3  # tokens of a text: two special ones and its own
_CODED = ("sparse", "clustered")
_LENGTH = 16
_CHOICES = 2


def with_plain_weights(model: Any) -> Any:
    """`model`, or, if some of its weights are stored in a code, a copy without."""
    if all(kind_of(module) not in _CODED for module in model.modules()):
        return model
    return densify(copy.deepcopy(model))


def example_inputs(model: Any, batch_size: int = 2, length: int = _LENGTH) -> dict[str, Tensor]:
    """int64 ids, mask and, where the model embeds several, types; (B, L), or (B, 2, L) for a choice."""
    shape = (batch_size, _CHOICES, length) if is_choice(model) else (batch_size, length)
    ids = torch.ones(shape, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    takes = inspect.signature(model.base_model.forward).parameters
    if "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def labels(rank: int) -> tuple[str, ...]:
    """The names of the axes of an input."""
    return AXES if rank == len(AXES) else ("batch", "length")


def open_axes(inputs: dict[str, Tensor], **longest: int | None) -> dict[str, dict[int, Any]]:
    """`dynamic_shapes` of `torch.export`: all axes, up to the `longest`, by name."""
    from torch.export import Dim

    shortest = {"length": SHORTEST}
    dims = {name: Dim(name, min=shortest.get(name, 1), max=longest.get(name)) for name in AXES}
    return {
        name: {axis: dims[label] for axis, label in enumerate(labels(value.ndim))}
        for name, value in inputs.items()
    }


def is_choice(model: Any) -> bool:
    """Whether the model, in PyTorch or exported, takes several texts an example."""
    names = [type(model).__name__, *(model.config.architectures or ())]
    return any(name.endswith("ForMultipleChoice") for name in names)
