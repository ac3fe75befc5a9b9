"""Refit an output matrix after some of its inputs are gone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.compress.blocks import Block
from fastdistil.compress.method import Calibration

_RIDGE = 0.01  # of the mean variance of an input, as in SparseGPT (Frantar and Alistarh 2023, section 4)


@dataclass
class Moments:
    """Of what a matrix with F inputs reads, over the tokens."""

    mean: Tensor  # (F,)
    covariance: Tensor  # (F, F)


def output_moments(model: Any, blocks: Sequence[Block], calibration: Calibration) -> list[Moments]:
    """The moments of each layer's neurons over the tokens of the examples, padding left out.

    Memory: F^2 floats a layer.
    """
    sums = [torch.zeros(block.num_neurons, dtype=torch.float64) for block in blocks]
    products = [torch.zeros(block.num_neurons, block.num_neurons) for block in blocks]
    shifts: dict[int, Tensor] = {}
    mask = torch.empty(0)

    def hook(index: int) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
            states = inputs[0][mask].float()  # (tokens, F)
            # Near their mean, so that float32 does not cancel where it is large beside the deviation.
            states = states - shifts.setdefault(index, states.mean(0))
            sums[index] += states.double().sum(0).cpu()
            products[index] += (states.T @ states).cpu()

        return add

    handles = [
        block.part(block.names.ffn_output).register_forward_pre_hook(hook(index))
        for index, block in enumerate(blocks)
    ]
    tokens = 0
    try:
        with torch.no_grad():
            for batch in calibration.batches:
                # The options of a choice (B, C, L) are sequences like others.
                mask = batch.attention_mask.bool().flatten(0, -2)
                calibration.loss(model, batch)
                tokens += int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    means = [total / tokens for total in sums]
    return [
        Moments(mean + shifts[index].double().cpu(), product / tokens - torch.outer(mean, mean).float())
        for index, (mean, product) in enumerate(zip(means, products, strict=True))
    ]


def refit(linear: nn.Linear, kept: Tensor, moments: Moments) -> None:
    """Change the columns `kept` (K,), and the bias, so that they stand in for the others R as well.

    With the covariance C of the inputs and their mean m, the columns become W_K + W_R A, where
    A = C_RK (C_KK + r I)^-1 predicts the inputs that go from those that stay, and the bias takes what is left
    of the mean, W_R (m_R - A m_K). Without a bias C is the second moment instead. It is the ridge regression
    of what the whole matrix gives, in float64; r is 1 % of the mean of the diagonal of C_KK.
    """
    gone = torch.ones(linear.in_features, dtype=torch.bool)
    gone[kept] = False
    mean, covariance = moments.mean, moments.covariance
    among = covariance[kept][:, kept].double()
    across = covariance[gone][:, kept].double()
    bias: Tensor | None = linear.bias
    if bias is None:
        among = among + torch.outer(mean[kept], mean[kept])
        across = across + torch.outer(mean[gone], mean[kept])
    among.diagonal().add_(_RIDGE * among.diagonal().mean().clamp(min=1e-12))
    predict = torch.linalg.solve(among, across.T).T  # (R, K)
    weight = linear.weight.detach()
    lost = weight[:, gone.to(weight.device)].double().cpu()
    with torch.no_grad():
        linear.weight[:, kept] += (lost @ predict).to(weight)
        if bias is not None:
            bias += (lost @ (mean[gone] - predict @ mean[kept])).to(weight)
