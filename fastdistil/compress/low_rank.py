"""Linear layers as products of two thin ones."""

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastdistil.compress.blocks import require_family, stack_path
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.replacements import replace, replacement
from fastdistil.compress.sensitivity import (
    Factorisation,
    allocate_ranks,
    factorise,
    largest_saving_rank,
    output_changes,
    second_moments,
)
from fastdistil.errors import UserError
from fastdistil.schema import Section


class LowRankLinear(nn.Module):
    """`up(down(x))`: x Aᵀ Bᵀ + b with A (r, in) and B (out, r), which has the face of an `nn.Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """(out, in), the product, formed at each call."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.up(self.down(states))
        return result

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


@replacement("low_rank")
def _build(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    linear: Any = module
    weight = linear.weight
    return LowRankLinear(
        linear.in_features,
        linear.out_features,
        spec["rank"],
        bias=linear.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )


class LowRankOptions(Section):
    ratio: float = Field(
        default=0.5, gt=0, lt=1, description="share of the matrices' parameters that remains"
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        description="of every matrix, in place of ratio; one that it does not make smaller stays dense",
    )
    method: Literal["svd", "activation"] | None = Field(
        default=None,
        description="svd: nearest in weights; activation: nearest in outputs on calibration examples; null: "
        "activation where there are examples",
    )
    ranks: Literal["uniform", "sensitivity"] | None = Field(
        default=None,
        description="uniform: the same ratio for every matrix; sensitivity: more where the model's outputs "
        "change more; null: sensitivity where there are examples and no rank is given",
    )
    modules: Literal["all", "ffn", "attention"] = Field(
        default="all", description="which linear layers of the encoder"
    )

    @model_validator(mode="after")
    def _one_size(self) -> "LowRankOptions":
        if self.rank is not None and "ratio" in self.model_fields_set:
            raise ValueError("rank and ratio both say how large the matrices are: give one of them")
        if self.rank is not None and self.ranks == "sensitivity":
            raise ValueError("rank is the same for every matrix: give ratio for ranks by sensitivity")
        return self


def low_rank(model: Any, options: LowRankOptions, calibration: Calibration | None) -> Any:
    """The model with a `LowRankLinear` in place of each linear layer of the encoder that rank makes smaller.

    What is kept of a weight is in `factorise`, how a budget is shared between the layers in
    `allocate_ranks`. On examples W (out, in) is projected on the directions in which its outputs are largest;
    without, on its first singular vectors.

    Raises:
        UserError: a rank that is larger than a matrix, or that makes none smaller; a ratio below that of rank
            1; what looks at examples, without any; a family that is not supported; layers that are
            factorised, quantised, pruned or clustered already.
    """
    linears = _linears(model, options.modules)
    examples = None if calibration is None else calibration.batches
    method = options.method or ("svd" if examples is None else "activation")
    same = options.rank is not None or examples is None
    allocation = options.ranks or ("uniform" if same else "sensitivity")
    for name, value in (("method", method), ("ranks", allocation)):
        if examples is None and value in ("activation", "sensitivity"):
            raise UserError(f"low-rank: {name} {value!r} needs examples of a task, and there is none")
    ranks = _uniform_ranks(linears, options) if allocation == "uniform" else None
    budget = _budget(linears, options.ratio) if options.rank is None else 0
    moments: dict[str, Tensor] = {}
    if examples is not None and method == "activation":
        moments = second_moments(model, linears, examples)
    factors = {path: factorise(linear.weight, moments.pop(path, None)) for path, linear in linears.items()}
    if ranks is None:
        assert examples is not None
        bases = {path: factor.basis for path, factor in factors.items()}
        changes = output_changes(model, linears, bases, examples)
        ranks = allocate_ranks(
            list(changes.values()), [_shape(linear) for linear in linears.values()], budget
        )
    for (path, linear), rank in zip(linears.items(), ranks, strict=True):
        if rank is not None:
            module = low_rank_linear(linear, factors[path], rank)
            replace(model, path, module, {"kind": "low_rank", "rank": rank})
    return model


def low_rank_linear(linear: nn.Linear, factors: Factorisation, rank: int) -> LowRankLinear:
    """The first `rank` directions of the factorised weight; both matrices get rows of the same length, so
    that training steps move them alike."""
    weight = linear.weight
    module = LowRankLinear(
        linear.in_features, linear.out_features, rank, linear.bias is not None, weight.device, weight.dtype
    )
    basis, parts = factors.basis[:, :rank], factors.parts[:rank]
    scale = parts.norm(dim=1).sqrt().clamp(min=1e-12)
    with torch.no_grad():
        module.up.weight.copy_(basis * scale)
        module.down.weight.copy_(parts / scale[:, None])
        if linear.bias is not None:
            module.up.bias.copy_(linear.bias)
    return module.train(linear.training)


def _linears(model: Any, modules: str) -> dict[str, nn.Linear]:
    """Those of the encoder's layers that are dense, by their path; one that several layers share once."""
    require_family(model, "low-rank")
    prefix = stack_path(model)
    stack = model.get_submodule(prefix)
    thin = {m for module in stack.modules() if isinstance(module, LowRankLinear) for m in module.children()}
    linears: dict[str, nn.Linear] = {
        f"{prefix}.{name}": module
        for name, module in stack.named_modules()
        if isinstance(module, nn.Linear) and module not in thin and modules in ("all", _part(name))
    }
    if not linears:
        raise UserError(
            f"low-rank: no dense linear layer of float weights is left to take (modules: {modules})"
        )
    for path, linear in linears.items():
        if parametrize.is_parametrized(linear):
            raise UserError(f"low-rank: {path} is pruned or clustered already; put low-rank before that step")
    return linears


def _part(name: str) -> str:
    # The path in a layer: "3.attention.self.query", "3.attn.Wqkv", "3.output.dense", "3.mlp.Wi".
    return "attention" if name.split(".")[1] in ("attention", "attn") else "ffn"


def _budget(linears: dict[str, nn.Linear], ratio: float) -> int:
    """The parameters that the matrices may have together."""
    parameters = sum(math.prod(_shape(linear)) for linear in linears.values())
    least = sum(sum(_shape(linear)) for linear in linears.values()) / parameters
    if ratio < least:
        raise UserError(
            f"low-rank: ratio {ratio:g} is below that of rank 1 for every matrix: at least {least:.2g}"
        )
    return int(ratio * parameters)


def _uniform_ranks(linears: dict[str, nn.Linear], options: LowRankOptions) -> list[int | None]:
    shapes = {path: _shape(linear) for path, linear in linears.items()}
    rank = options.rank
    if rank is None:
        # A small matrix gets rank 1 even if that is more than its share.
        return [max(1, int(options.ratio * math.prod(shape) / sum(shape))) for shape in shapes.values()]
    for path, (out_features, in_features) in shapes.items():
        if rank > min(out_features, in_features):
            raise UserError(
                f"low-rank: rank {rank} is larger than the {out_features} × {in_features} matrix {path}"
            )
    largest = max(largest_saving_rank(*shape) for shape in shapes.values())
    if rank > largest:
        raise UserError(f"low-rank: rank {rank} makes no matrix smaller, ranks up to {largest} do")
    return [rank if rank <= largest_saving_rank(*shape) else None for shape in shapes.values()]


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


METHODS = (
    Method(
        name="low-rank",
        kind="low rank",
        description="replace linear layers by products of two thin matrices",
        paper="Chen et al. 2021, DRONE: Data-aware Low-rank Compression for Large NLP Models",
        options=LowRankOptions,
        main="ratio",
        apply=low_rank,
    ),
)
