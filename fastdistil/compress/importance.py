"""How much layers, the heads of a layer, or its FFN neurons matter: what is least important is pruned.

- "magnitude": the L2 norm of the group's weights, over all matrices that hold some of them.
- "taylor": how much the loss would change, to first order, without the group. With a gate g = 1 on its
  output, the mean over examples of |dL/dg| (Michel et al. 2019, "Are Sixteen Heads Really Better than One?",
  equation 2; for neurons Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning",
  section 3).
- "activation": the mean of |activation| over the tokens, padding left out.

A layer changes the states x that it is given to f(x), and without it they stay x. So its gate is that of its
change, x + g (f(x) - x), and its activation is how far it turns them: the mean of 1 - cos(x, f(x)) over the
tokens (Men et al. 2024, "ShortGPT", section 2.2, block influence).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastdistil.compress.blocks import Block
from fastdistil.compress.method import Calibration
from fastdistil.errors import UserError

Importance = Literal["magnitude", "taylor", "activation"]
Group = Literal["heads", "neurons"]


def choose_importance(
    importance: Importance | None, calibration: Calibration | None, method: str
) -> Importance:
    """What was asked for, or by default what prunes best without training afterwards.

    Raises `UserError` for one that is measured on examples, where there are none.
    """
    if importance is None:
        return "magnitude" if calibration is None else "taylor"
    if importance != "magnitude" and calibration is None:
        raise UserError(
            f"{method}: importance {importance!r} is measured on training examples: name a task, "
            "or set importance to 'magnitude'"
        )
    return importance


def importances(
    model: Any,
    blocks: Sequence[Block],
    group: Group,
    importance: Importance,
    calibration: Calibration | None,
) -> list[Tensor]:
    """For each block the importance of its heads (H,) or neurons (F,), float64 on the CPU."""
    if importance == "magnitude":
        return [_magnitude(block, group) for block in blocks]
    assert calibration is not None
    if importance == "taylor":
        return _taylor(model, blocks, group, calibration)
    return _activation(model, blocks, group, calibration)


def layer_importances(
    model: Any, layers: Sequence[nn.Module], importance: Importance, calibration: Calibration | None
) -> Tensor:
    """The importance of each layer (N,), float64 on the CPU."""
    if importance == "magnitude":
        norms = [
            torch.stack([p.detach().double().norm() for p in layer.parameters()]).norm() for layer in layers
        ]
        return torch.stack(norms).cpu()
    assert calibration is not None
    if importance == "taylor":
        return _layer_taylor(model, layers, calibration)
    return _layer_turns(model, layers, calibration)


def comparable(scores: Sequence[Tensor], importance: Importance) -> list[Tensor]:
    """The scores, so that those of different layers may be compared.

    Changes of the loss may be as they are. Norms of weights and activations are divided by the norm of their
    layer's, as layers have them of different scale.
    """
    if importance == "taylor":
        return list(scores)
    return [score / score.norm().clamp(min=1e-30) for score in scores]


def top(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` highest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _magnitude(block: Block, group: Group) -> Tensor:
    names = block.names
    if group == "heads":
        inputs, output = names.projections, names.attention_output
    else:
        inputs, output = (names.ffn_input,), names.ffn_output
    columns = block.part(output).weight.detach().double().square().sum(0).cpu()
    for name in inputs:
        linear = block.part(name)
        rows = linear.weight.detach().double().square().sum(1)
        if linear.bias is not None:
            rows = rows + linear.bias.detach().double().square()
        # Each output column belongs to one row, or three of a fused projection, or two of a gated neuron.
        columns = columns + rows.cpu().unflatten(0, (-1, len(columns))).sum(0)
    return columns.unflatten(0, (_count(block, group), -1)).sum(1).sqrt()


def _taylor(model: Any, blocks: Sequence[Block], group: Group, calibration: Calibration) -> list[Tensor]:
    gates: dict[int, Tensor] = {}

    def gate(index: int, states: Tensor) -> Tensor:  # states (B, L, F)
        count = _count(blocks[index], group)
        ones = states.new_ones(len(states), 1, count, 1, requires_grad=True)
        gates[index] = ones
        return (states.unflatten(-1, (count, -1)) * ones).flatten(-2)

    totals = [torch.zeros(_count(block, group), dtype=torch.float64) for block in blocks]
    examples = 0
    with _hooked(blocks, group, gate), torch.enable_grad():
        for batch in calibration.batches:
            loss = calibration.loss(model, batch)
            found = torch.autograd.grad(loss, [gates[index] for index in range(len(blocks))])
            rows = len(batch.input_ids)
            for total, gradient in zip(totals, found, strict=True):
                # The loss is a mean over the batch, and a gate is of one of its examples alone.
                total += (rows * gradient.double().abs()).sum(0).flatten().cpu()
            examples += rows
    return [total / examples for total in totals]


def _activation(model: Any, blocks: Sequence[Block], group: Group, calibration: Calibration) -> list[Tensor]:
    totals = [torch.zeros(_count(block, group), dtype=torch.float64) for block in blocks]
    mask = torch.empty(0)

    def add(index: int, states: Tensor) -> Tensor:  # states (B, L, F)
        per_head = states.detach().double().abs().unflatten(-1, (_count(blocks[index], group), -1)).mean(-1)
        totals[index] += (per_head * mask[..., None]).sum((0, 1)).cpu()
        return states

    tokens = 0
    with _hooked(blocks, group, add), torch.no_grad():
        for batch in calibration.batches:
            # The options of a choice (B, C, L) are sequences like others.
            mask = batch.attention_mask.double().flatten(0, -2)
            calibration.loss(model, batch)
            tokens += int(mask.sum())
    return [total / tokens for total in totals]


def _layer_taylor(model: Any, layers: Sequence[nn.Module], calibration: Calibration) -> Tensor:
    gates: list[Tensor] = []

    def gate(index: int, before: Tensor, after: Tensor) -> Tensor:  # states (B, L, D)
        gates.append(after.new_ones(len(after), 1, 1, requires_grad=True))
        return before + gates[-1] * (after - before)

    total, examples = torch.zeros(len(layers), dtype=torch.float64), 0
    with _changed(layers, gate), torch.enable_grad():
        for batch in calibration.batches:
            gates.clear()
            found = torch.autograd.grad(calibration.loss(model, batch), gates)
            rows = len(batch.input_ids)
            total += rows * torch.stack([gradient.double().abs().sum() for gradient in found]).cpu()
            examples += rows
    return total / examples


def _layer_turns(model: Any, layers: Sequence[nn.Module], calibration: Calibration) -> Tensor:
    total = torch.zeros(len(layers), dtype=torch.float64)
    mask = torch.empty(0)

    def add(index: int, before: Tensor, after: Tensor) -> Tensor:  # states (B, L, D)
        turned = 1 - nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        total[index] += (turned * mask).sum().cpu()
        return after

    tokens = 0
    with _changed(layers, add), torch.no_grad():
        for batch in calibration.batches:
            mask = batch.attention_mask.double().flatten(0, -2)
            calibration.loss(model, batch)
            tokens += int(mask.sum())
    return total / tokens


def _changed(
    layers: Sequence[nn.Module], change: Callable[[int, Tensor, Tensor], Tensor]
) -> AbstractContextManager[None]:
    """With what each layer returns passed through `change`, beside the states that it was given."""

    def hook(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def changed(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor):
                return change(index, inputs[0], output)
            return change(index, inputs[0], output[0]), *output[1:]

        return changed

    return _registered([layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)])


def _count(block: Block, group: Group) -> int:
    return block.num_heads if group == "heads" else block.num_neurons


def _hooked(
    blocks: Sequence[Block], group: Group, change: Callable[[int, Tensor], Tensor]
) -> AbstractContextManager[None]:
    """With what the output matrices read, heads' outputs or neurons, passed through `change`."""

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        return lambda module, inputs: (change(index, inputs[0]),)

    handles = []
    for index, block in enumerate(blocks):
        name = block.names.attention_output if group == "heads" else block.names.ffn_output
        handles.append(block.part(name).register_forward_pre_hook(hook(index)))
    return _registered(handles)


@contextmanager
def _registered(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """With these hooks, which are removed behind it."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
