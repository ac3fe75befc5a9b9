"""The few input channels of a linear layer that are far larger than all others, kept out of its int8 product.

One such channel sets the scale for all, and costs the others their resolution. As in LLM.int8 (Dettmers et
al. 2022, section 3.2) the product is split in two,

    y = W' (m ⊙ x) + Σ_j w_j x_j,   W' = W with the columns j zeroed, m zero at j and one elsewhere,

of which only the first is rounded. The channels are fixed, from calibration examples: at most two a layer.
"""

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


@replacement("outlier_linear")
def _build(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    assert isinstance(module, nn.Linear)
    return OutlierLinear(module, spec["channels"])


def separate_outliers(model: Any, paths: Sequence[str], batches: Sequence[Batch]) -> Any:
    """`model`, which computes the same, with an `OutlierLinear` in place of each linear layer that needs one.

    Where the largest channel over all batches is more than three times the third largest, it is taken out,
    and so is the second if it is more than twice the third.
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
        if values[0] > _NEEDED * values[-1]:
            chosen = sorted(channels[values > _TAKEN * values[-1]].tolist())
            module: Any = model.get_submodule(path)
            spec = {"kind": "outlier_linear", "channels": chosen}
            replace(model, path, OutlierLinear(module, chosen), spec)
    return model
