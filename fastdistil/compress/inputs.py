"""What goes into the linear layers of a model when it reads examples."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.data.batches import Batch
from fastdistil.models.taps import accepted_inputs


def watch_inputs(
    model: Any, paths: Sequence[str], batches: Sequence[Batch], see: Callable[[str, Tensor], None]
) -> None:
    """Run `model` on `batches`, and call `see(path, x)` with each input of each linear layer at `paths`."""

    def hook(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(path, inputs[0])

    handles = [
        module.register_forward_pre_hook(partial(hook, path))
        for path in paths
        if isinstance(module := model.get_submodule(path), nn.Linear)
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**accepted_inputs(model, batch.inputs))
    finally:
        for handle in handles:
            handle.remove()
