"""What a low rank of each linear layer loses on real inputs, and how to share a budget of parameters between
the layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.data.batches import Batch
from fastdistil.models.taps import accepted_inputs

_BISECTIONS = 100  # of a float64 interval: the price is then known to the last bit


@dataclass(frozen=True)
class Factorisation:
    """A weight W (out, in) in orthonormal directions of its outputs: rank r is basis[:, :r] @ parts[:r]."""

    basis: Tensor  # (out, k), k = min(out, in), of W's precision, at least float32
    parts: Tensor  # (k, in): basis.mT @ W


def factorise(weight: Tensor, moment: Tensor | None = None) -> Factorisation:
    """The directions in which W's outputs are largest, in descending order.

    Of all matrices M of rank r, basis_r basis_rᵀ W minimises

        E‖W x − M x‖²,

    where basis_r are the first r eigenvectors of the outputs' second moment E[y yᵀ] = W E[x xᵀ] Wᵀ; the
    minimum is the sum of the other eigenvalues. It is the solution of DRONE (Chen et al. 2021, "DRONE:
    Data-aware Low-rank Compression for Large NLP Models", theorem 1) and of SVD-LLM (Wang et al. 2024), which
    factorise W C^½ and multiply by C^-½; the projection needs no inverse, so inputs that fill only part of
    their space are no special case. Without `moment`, E[x xᵀ] is taken to be the identity: the plain SVD
    (Eckart and Young 1936).

    Args:
        weight: (out, in).
        moment: float64; as `second_moments` measures it: E[y yᵀ] (out, out), y = W x without bias, or, where
            out > in, the smaller E[x xᵀ] (in, in).
    """
    precision = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.detach().double()
    out_features, in_features = weight.shape
    if out_features <= in_features:
        q, r = None, weight
        outputs = r @ r.mT if moment is None else moment
    else:
        # All outputs lie in the span of Q's `in` columns, so that the problem is one of size `in`.
        q, r = torch.linalg.qr(weight)
        outputs = r @ r.mT if moment is None else r @ moment @ r.mT
    directions = torch.linalg.eigh(outputs).eigenvectors.flip(1)
    basis = directions if q is None else q @ directions
    return Factorisation(basis.to(precision), (directions.mT @ r).to(precision))


def second_moments(
    model: Any, linears: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """For each linear layer the second moment that `factorise` takes, over all tokens but padding."""
    sums: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def add(name: str, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        wide = module.in_features < module.out_features
        states = args[0] if wide else output
        if mask is not None and states.shape[:-1] == mask.shape:
            states = states[mask]
        states = states.flatten(0, -2)
        states = states if states.dtype == torch.float64 else states.float()
        if not wide and module.bias is not None:
            states = states - module.bias
        product = (states.mT @ states).double()
        sums[name] = sums[name] + product if name in sums else product

    handles = [module.register_forward_hook(partial(add, name)) for name, module in linears.items()]
    tokens = 0
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.attention_mask.bool()
                tokens += int(mask.sum())
                # The options of a choice (B, C, L) are sequences like others.
                inputs = accepted_inputs(model, batch.inputs)
                model.base_model(**{key: value.flatten(0, -2) for key, value in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def output_changes(
    model: Any,
    linears: Mapping[str, nn.Module],
    bases: Mapping[str, Tensor],  # (out, k) orthonormal directions of each layer's outputs
    batches: Sequence[Batch],
) -> dict[str, Tensor]:
    """How far the outputs of the whole model move without each direction of a layer: (k,) float64 of each.

    To first order, the outputs z of an example (logits, or the last hidden states of an encoder alone) change
    by J Δ when its tokens' states y_t change by Δ_t = (u · y_t) u, and with random signs v

        E_v (Σ_t (∂(v · z) / ∂y_t · u) (u · y_t))² = ‖J Δ‖²,

    of which the mean over examples is returned, for one v an example. One backward pass gives it for all
    layers. Layers can be compared by it, as they cannot by their own outputs' energy: a query that is wrong
    by a half may do less harm than a value that is wrong by a tenth.
    """
    seen: list[tuple[str, Any, Tensor]] = []

    def keep(name: str, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:  # of a frozen model, before the first layer
            output.requires_grad_()
        seen.append((name, module, output))

    changes = {name: basis.new_zeros(basis.shape[1], dtype=torch.float64) for name, basis in bases.items()}
    generator = torch.Generator().manual_seed(0)
    handles = [module.register_forward_hook(partial(keep, name)) for name, module in linears.items()]
    examples = 0
    try:
        for batch in batches:
            seen.clear()
            with torch.enable_grad():
                z = model(**accepted_inputs(model, batch.inputs))[0]
            signs = (torch.randint(2, z.shape, generator=generator) * 2 - 1).to(z)
            if z.dim() == 3:  # (B, L, D)
                signs *= batch.attention_mask[..., None]
            gradients = torch.autograd.grad(z, [output for *_, output in seen], signs, allow_unused=True)
            examples += len(batch.input_ids)
            for (name, module, output), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    basis = bases[name]
                    states = output.detach()
                    if module.bias is not None:
                        states = states - module.bias.detach()
                    change = ((gradient.to(basis) @ basis) * (states.to(basis) @ basis)).sum(1)
                    changes[name] += change.double().square().sum(0)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / examples for name, total in changes.items()}


def allocate_ranks(
    losses: Sequence[Tensor], shapes: Sequence[tuple[int, int]], budget: int
) -> list[int | None]:
    """The rank of each matrix, or None for one that stays dense, within a `budget` of parameters.

    Minimises the sum of the losses of all directions that go. A rank r costs r (out + in) parameters, a
    matrix that stays dense out · in. For a price λ of a parameter, each matrix by itself takes what maximises
    `kept − λ cost`; all together are then the best of what costs no more than they do (Everett 1963,
    "Generalized Lagrange Multiplier Method", theorem 1). The lowest price within the budget is found by
    bisection, and what it leaves over goes to the largest gains that it can pay.

    Args:
        losses: (k,) of each matrix, what is lost without each direction.
        shapes: (out, in) of each matrix.
        budget: at least the cost of rank 1 for all.
    """
    whole = sum(float(loss.sum()) for loss in losses) or 1.0
    kept, costs = [], []  # by option: ranks 1, 2, ..., and dense
    for loss, (out_features, in_features) in zip(losses, shapes, strict=True):
        ranks = torch.arange(1, largest_saving_rank(out_features, in_features) + 1, dtype=torch.float64)
        share = loss.double().cpu().cumsum(0) / whole
        kept.append(torch.cat([share[: len(ranks)], share[-1:]]))
        dense = ranks.new_tensor([out_features * in_features])
        costs.append(torch.cat([ranks * (out_features + in_features), dense]))

    def choose(price: float) -> list[int]:
        return [int((k - price * c).argmax()) for k, c in zip(kept, costs, strict=True)]

    def cost(options: Sequence[int]) -> float:
        return sum(float(c[i]) for c, i in zip(costs, options, strict=True))

    low, high = 0.0, 1.0  # at 1 a parameter costs as much as there is to gain
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(choose(middle)) <= budget else (middle, high)
    chosen = choose(high)
    left = budget - cost(chosen)
    while steps := _affordable(kept, costs, chosen, left):
        _, matrix, option = max(steps)
        left -= float(costs[matrix][option] - costs[matrix][chosen[matrix]])
        chosen[matrix] = option
    return [None if i == len(c) - 1 else i + 1 for i, c in zip(chosen, costs, strict=True)]


def largest_saving_rank(out_features: int, in_features: int) -> int:
    """The largest r whose factors (out, r) and (r, in) hold fewer numbers than the matrix (out, in)."""
    return (out_features * in_features - 1) // (out_features + in_features)


def _affordable(
    kept: Sequence[Tensor], costs: Sequence[Tensor], chosen: Sequence[int], left: float
) -> list[tuple[float, int, int]]:
    """(gain per parameter, matrix, its next option) of the steps that `left` parameters pay for."""
    steps = []
    for matrix, (k, c, i) in enumerate(zip(kept, costs, chosen, strict=True)):
        if i + 1 < len(c) and k[i + 1] > k[i] and (price := float(c[i + 1] - c[i])) <= left:
            steps.append((float(k[i + 1] - k[i]) / price, matrix, i + 1))
    return steps
