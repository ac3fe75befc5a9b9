"""int8 in the PyTorch model, as torchao quantises it: dynamic or static activations, int8 embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.compress.inputs import watch_inputs
from fastdistil.compress.int8_modules import LEVELS, Int8Embedding, Int8Linear, quantize
from fastdistil.compress.replacements import replace
from fastdistil.data.batches import Batch

# What the largest activation is multiplied by to get a scale that is tried.
_CLIPS = tuple(step / 16 for step in range(16, 3, -1))


def quantize_layers(model: Any, paths: Sequence[str], input_scales: dict[str, Tensor] | None = None) -> Any:
    """`model` with int8 layers in place of the linear layers and embeddings at `paths`, in eval mode.

    Args:
        input_scales: path of each linear layer -> () float32 scale of its input, as from `calibrate`; None:
            the scales are taken from each token as it comes.
    """
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            replace(model, path, Int8Embedding.from_embedding(module), {"kind": "int8_embedding"})
            continue
        scale = None if input_scales is None else input_scales[path]
        spec = {"kind": "int8_linear", "static": scale is not None}
        replace(model, path, Int8Linear.from_linear(module, scale), spec)
    return model.eval()


def calibrate(model: Any, paths: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """For the input x of each linear layer at `paths`, the scale s that minimises |s round(x / s) - x|²
    over all batches.

    Tried are c · max|x| / 127 for 13 values of c from 1 down to 1/4: a few outliers otherwise cost all
    other values their resolution (Nagel et al. 2021, "A White Paper on Neural Network Quantization",
    section 3.1).

    Returns:
        path -> () float32. A layer that no batch reaches is left out.
    """
    largest: dict[str, Tensor] = {}

    def see_largest(path: str, x: Tensor) -> None:
        value = x.abs().amax().float()
        largest[path] = torch.maximum(largest.get(path, value), value)

    watch_inputs(model, paths, batches, see_largest)
    clips = torch.tensor(_CLIPS)
    scales = {
        path: (value * clips.to(value.device) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        for path, value in largest.items()
    }
    errors = {path: torch.zeros_like(scale) for path, scale in scales.items()}

    def see_error(path: str, x: Tensor) -> None:
        for i, scale in enumerate(scales[path]):
            errors[path][i] += (quantize(x, scale) * scale - x).float().square().sum()

    watch_inputs(model, paths, batches, see_error)
    return {path: scales[path][error.argmin()] for path, error in errors.items()}
