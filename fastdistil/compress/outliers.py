"""The few inputs of a linear layer that are far larger than all others, and would cost them their bits.

One such channel sets the scale for all. There are two ways out, for at most two channels a layer, which are
fixed, from calibration examples. As in LLM.int8 (Dettmers et al. 2022, section 3.2) the product is split in
two, of which only the first is rounded:

    y = W' (m ⊙ x) + Σ_j w_j x_j,   W' = W with the columns j zeroed, m zero at j and one elsewhere.

As in SmoothQuant (Xiao et al. 2023, section 4) the channels are made smaller, and their weights larger:

    y = (W diag(s)) (x / s),   s_j = max|x_j|^α / c^α, one elsewhere, c what the channels that stay reach.

The first is exact but costs two passes over the outputs for each channel, the second one over the inputs. So
a layer with more outputs than inputs, such as the first of a feed-forward network, takes the second.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.compress.inputs import watch_inputs
from fastdistil.compress.replacements import replace, replacement
from fastdistil.data.batches import Batch

_MOST = 2
# To the largest of the channels that stay: what makes it worth the while, and what is then taken out.
_NEEDED, _TAKEN = 3.0, 2.0
_MIGRATION = 0.75  # α: how much of a channel's size goes to its weights


class OutlierLinear(nn.Module):
    """`nn.Linear` whose columns `channels` are a product of their own; `linear` has the others and bias."""

    keep: Tensor

    def __init__(self, linear: nn.Linear, channels: Sequence[int]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.channels = tuple(channels)
        weight = linear.weight.detach()
        self.columns = nn.Parameter(weight[:, list(channels)].t().contiguous())  # (k, N)
        keep = torch.ones(self.in_features, dtype=weight.dtype, device=weight.device)
        keep[list(channels)] = 0
        self.register_buffer("keep", keep)
        self.linear = nn.Linear(
            self.in_features,
            self.out_features,
            linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            self.linear.weight.copy_(weight * keep)
            if linear.bias is not None:
                self.linear.bias.copy_(linear.bias)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        y: Tensor = self.linear(x * self.keep)
        # Outer products, not a matrix product of k rows: a quantiser of ONNX graphs would round that one.
        for column, channel in zip(self.columns, self.channels, strict=True):
            y = y + x[..., channel : channel + 1] * column
        return y


class ScaledLinear(nn.Module):
    """`nn.Linear` of inputs that are divided by `scale`, with weights that are multiplied by it."""

    scale: Tensor

    def __init__(self, linear: nn.Linear, scale: Tensor) -> None:  # (K,)
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("scale", scale.to(weight))
        self.linear = copy.deepcopy(linear)
        with torch.no_grad():
            self.linear.weight.copy_(weight * self.scale)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        y: Tensor = self.linear(x * (1 / self.scale))
        return y


@replacement("outlier_linear")
def _build(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    assert isinstance(module, nn.Linear)
    return OutlierLinear(module, spec["channels"])


@replacement("scaled_linear")
def _build_scaled(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    assert isinstance(module, nn.Linear)
    return ScaledLinear(module, torch.ones(module.in_features))


def separate_outliers(model: Any, paths: Sequence[str], batches: Sequence[Batch]) -> Any:
    """`model`, which computes the same, with the outliers of each linear layer that has some out of the way.

    Where the largest channel over all batches is more than three times the third largest, it is taken, and so
    is the second if it is more than twice the third. The layer becomes a `ScaledLinear` if it has more
    outputs than inputs, else an `OutlierLinear`. The scales are powers of two, which round nothing.
    """
    largest: dict[str, Tensor] = {}

    def see(path: str, x: Tensor) -> None:
        value = x.abs().flatten(0, -2).amax(0)
        largest[path] = torch.maximum(largest.get(path, value), value)

    watch_inputs(model, paths, batches, see)
    for path, sizes in largest.items():
        if len(sizes) <= _MOST:
            continue
        values, channels = sizes.topk(_MOST + 1)
        if values[0] <= _NEEDED * values[-1]:
            continue
        chosen = channels[values > _TAKEN * values[-1]]
        module: Any = model.get_submodule(path)
        if module.out_features > module.in_features:
            scale = torch.ones_like(sizes)
            scale[chosen] = torch.exp2((_MIGRATION * (sizes[chosen] / values[-1]).log2()).round())
            replace(model, path, ScaledLinear(module, scale), {"kind": "scaled_linear"})
        else:
            places = sorted(chosen.tolist())
            spec = {"kind": "outlier_linear", "channels": places}
            replace(model, path, OutlierLinear(module, places), spec)
    return model
