"""The kind "masked": weights that are pruned while they are trained.

The mask is a parametrisation of torch: the weight is the trained parameter where the mask is true and zero
elsewhere. It is a buffer, and so are the optimiser steps that the schedule has seen: a resumed training goes
on with both.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdistil.compress.encoded import code_of, coded_weights, parameter_of, parametrize_weight, plain
from fastdistil.compress.replacements import drop, replace, replacement
from fastdistil.compress.sparse import sparsify


def cubic_sparsity(step: int, steps: int, final: float, warmup: float, cooldown: float) -> float:
    """Sparsity after `step` of `steps`: 0, a cubic rise, then `final`.

        s_t = s_f - s_f (1 - (t - t_0) / (n Δt))³      (Zhu and Gupta 2017, eq. 1, from s_i = 0)

    It is 0 for the first `warmup` share of the steps and `final` for the last `cooldown` share, as in Sanh et
    al. 2020, section 5.
    """
    rise = (step - warmup * steps) / max(1e-9, (1 - warmup - cooldown) * steps)
    return final - final * (1 - min(1.0, max(0.0, rise))) ** 3


def count_zeros(size: int, sparsity: float) -> int:
    """Weights of `size` to prune: the nearest whole number, but one is always kept."""
    return min(round(sparsity * size), size - 1)


def largest(values: Tensor, kept: int) -> Tensor:
    """bool mask of exactly `kept` largest values; of equal ones the first."""
    flat = values.detach().flatten().float()
    dropped = flat.numel() - kept
    if dropped == 0:
        return torch.ones_like(values, dtype=torch.bool)
    if flat.device.type == "cpu":
        # 20 times as fast as kthvalue: it sees one value at a time, numpy's partition a vector.
        threshold = torch.tensor(np.partition(flat.numpy(), dropped)[dropped])
    else:
        threshold = flat.kthvalue(dropped + 1).values
    above, equal = flat > threshold, flat == threshold
    mask = above | (equal & (equal.cumsum(0) <= kept - above.sum()))
    return mask.view(values.shape)


class Mask(nn.Module):
    """Keeps the weights of largest magnitude, in training with a sparsity that rises.

    A mask that has reached its sparsity does not change any more. `steps` 0: it has from the start.

    An optimiser step begins with the forward pass in training mode that finds no gradient of its parameter,
    as `optimizer.zero_grad()` leaves it: micro-batches that add to one gradient are one step.

    Attributes:
        mask: bool, as the weight.
        steps_begun: () int64, optimiser steps.
    """

    kind = "masked"
    mask: Tensor
    steps_begun: Tensor

    def __init__(self, weight: Tensor, spec: dict[str, Any]) -> None:
        super().__init__()
        self.zeros: int = spec["zeros"]
        self.steps: int = spec["steps"]
        self.warmup: float = spec["warmup"]
        self.cooldown: float = spec["cooldown"]
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        self.register_buffer("steps_begun", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.awaits_backward = False  # a module that is called more than once in a pass begins one step
        self._masked: int | None = None  # zeros of `mask`, when known
        self._trained: tuple[Tensor] | None = None  # the parameter of the step that was begun last

    def forward(self, weight: Tensor) -> Tensor:
        self._begin_step(weight, weight)
        masked: Tensor = _Masked.apply(weight, None, self.mask, self)
        return masked

    def finish(self, weight: Tensor) -> None:
        """The mask of the full sparsity, whether or not the schedule has got there."""
        self._update(weight, self.zeros)

    def _begin_step(self, trained: Tensor, weight: Tensor) -> None:
        """Updates the mask if this pass is the first of an optimiser step, which `trained` tells."""
        training = self.training and torch.is_grad_enabled() and trained.requires_grad
        if training and trained.grad is None and not self.awaits_backward:
            self._update(weight, self._zeros_wanted())
            self.steps_begun += 1
            self.awaits_backward = True
            self._trained = (trained,)

    def _zeros_wanted(self) -> int:
        """By the schedule, after the steps that are done."""
        if not self.steps:
            return self.zeros
        size = self.mask.numel()
        final = self.zeros / size
        share = cubic_sparsity(int(self.steps_begun), self.steps, final, self.warmup, self.cooldown)
        return min(self.zeros, round(share * size))

    def _update(self, weight: Tensor, zeros: int) -> None:
        if self._masked is None:
            self._masked = int((~self.mask).sum())
        if zeros > self._masked:
            self.mask = largest(weight.abs(), weight.numel() - zeros)
            self._masked = zeros

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._trained and self._trained[0].grad is not None:
            # In the middle of a step, whose gradient a state dict does not hold: it will begin again.
            destination[f"{prefix}steps_begun"] = self.steps_begun - 1

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._masked = self._trained = None


class MovementMask(Mask):
    """Keeps the weights of largest score; scores are learned with the weights.

    Attributes:
        scores: (n,) float32, one for each weight, from 0 or its magnitude. One dimension: weight decay leaves
            them alone.
    """

    def __init__(self, weight: Tensor, spec: dict[str, Any]) -> None:
        super().__init__(weight, spec)
        start = weight.detach().abs() if spec.get("start") == "magnitude" else torch.zeros_like(weight)
        self.scores = nn.Parameter(start.flatten().float())

    def forward(self, weight: Tensor) -> Tensor:
        self._begin_step(self.scores, weight)
        masked: Tensor = _Masked.apply(weight, self.scores, self.mask, self)
        return masked

    def _update(self, weight: Tensor, zeros: int) -> None:
        self.mask = largest(self.scores, weight.numel() - zeros).view(weight.shape)


class _Masked(torch.autograd.Function):
    """The weight where the mask is true, else 0. For its gradient, the mask is the identity of the scores."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor | None, mask: Tensor, module: Mask) -> Tensor:
        ctx.save_for_backward(mask, None if scores is None else weight)
        ctx.module = module
        return torch.where(mask, weight, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        ctx.module.awaits_backward = False
        mask, weight = ctx.saved_tensors
        scores = None if weight is None else (grad * weight).flatten().float()
        return grad * mask, scores, None, None


def add_mask(model: Any, path: str, spec: dict[str, Any]) -> Any:
    """Puts the weight at `path` under a mask; returns its parametrisation."""
    spec = {"kind": "masked", "steps": 0, "warmup": 0.0, "cooldown": 0.0, **spec}
    module = _build(model.get_submodule(path), spec)
    replace(model, path, module, spec)
    return code_of(module)


def bake(model: Any) -> Any:
    """Takes the masks off and stores the weights that are left sparse."""
    for path, spec in coded_weights(model, "masked"):
        module = model.get_submodule(path)
        code = code_of(module)
        code.finish(parameter_of(module))
        drop(model, path, "masked", plain(module.eval()))
        sparsify(model, path, code.mask, spec.get("pattern"))
    return model


@replacement("masked")
def _build(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    weight: Any = module.weight
    mask = MovementMask(weight, spec) if spec["rule"] == "movement" else Mask(weight, spec)
    return parametrize_weight(module, mask)
