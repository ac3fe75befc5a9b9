"""Weights that are stored in a code: which ones, how a model holds them, and how it gets plain ones back.

A coded weight is a parametrisation of torch (`torch.nn.utils.parametrize`): the layer stays an `nn.Linear` or
`nn.Embedding` whose `weight` is decoded from a parameter of few numbers and from buffers. So what is trained
and what is written to the disk is the code itself.
"""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastdistil.compress.replacements import drop, replacements
from fastdistil.errors import UserError

DONE = {"masked": "pruned", "sparse": "pruned", "clustered": "clustered"}  # what a kind is the result of


class EncodedWeight(nn.Module):
    """A weight of `shape` decoded from a parameter (any shape) and from what a subclass keeps in buffers.

    In eval mode, where no gradient is wanted, the decoded weight is kept until the parameter changes.
    """

    kind: str

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self._dense: tuple[Tensor, int] | None = None  # with the version of the parameter it was decoded from

    def decode(self, parameter: Tensor) -> Tensor:
        """The weight, differentiable in `parameter`."""
        raise NotImplementedError

    def forward(self, parameter: Tensor) -> Tensor:
        if parameter.is_meta:
            return parameter.new_empty(self.shape)
        wants_gradient = torch.is_grad_enabled() and parameter.requires_grad
        if wants_gradient or self.training:
            return self.decode(parameter)
        if self._dense is None or self._dense[1] != parameter._version:
            # A tensor of inference mode could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._dense = self.decode(parameter), parameter._version
        return self._dense[0]

    def forget(self) -> None:
        """Drop what was decoded: the buffers have changed."""
        self._dense = None

    def train(self, mode: bool = True) -> Self:
        # A fused optimiser changes a parameter without raising its version.
        self._dense = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)


def parametrize_weight(module: Any, code: nn.Module) -> nn.Module:
    """Puts `module.weight` under `code`, a parametrisation with the name of its kind as `kind`, in place."""
    # torch changes the parameter in place, and another module may hold the same one.
    module.weight = nn.Parameter(module.weight.detach(), module.weight.requires_grad)
    # unsafe: torch would call it to look at its result, which is a training step for a mask.
    parametrized: nn.Module = parametrize.register_parametrization(module, "weight", code, unsafe=True)
    return parametrized


def code_of(module: nn.Module) -> Any:
    """The parametrisation of `module.weight`."""
    return _list_of(module)[0]


def parameter_of(module: nn.Module) -> Tensor:
    """The parameter from which `module.weight` is computed."""
    parameter: Tensor = _list_of(module).original
    return parameter


def _list_of(module: Any) -> Any:
    return module.parametrizations["weight"]


def plain(module: nn.Module) -> nn.Module:
    """`module` without its parametrisation, in place: the weight that it had, as a parameter."""
    # torch takes the property `weight` off the class, and a copy of the module has the same class.
    shared: Any = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    return parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def kind_of(module: nn.Module) -> str | None:
    """'masked', 'sparse' or 'clustered', if the weight is one of these."""
    coded = parametrize.is_parametrized(module, "weight")
    return getattr(code_of(module), "kind", None) if coded else None


def coded_weights(model: Any, *kinds: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The replacements of these kinds whose module still stands at its path, as they are when it is reached.

    They may be taken out meanwhile; a module may have several paths.
    """
    for path, spec in replacements(model):
        if spec["kind"] in kinds and kind_of(model.get_submodule(path)) == spec["kind"]:
            yield path, spec


def densify(model: Any) -> Any:
    """Puts plain weights of the same values in place of all pruned and clustered ones.

    For what reads weights: exporters, quantisation. The model computes the same; its folder is as large as
    before the coding. Masks of a pruning that is not finished stay.
    """
    for path, spec in coded_weights(model, "sparse", "clustered"):
        drop(model, path, spec["kind"], plain(model.get_submodule(path)))
    return model


def weights_to_compress(
    model: Any, method: str, *, embeddings: bool, accept: tuple[str, ...] = ()
) -> list[tuple[str, Any]]:
    """Path and module of the encoder's linear layers, the pooler included, and of its embeddings if wanted.

    The head of a task is left alone.

    Raises:
        UserError: a weight is pruned, clustered or quantised already (kinds in `accept` may stand there),
            there is none, or the embeddings are also the output matrix of a language model.
    """
    for path, spec in replacements(model):
        if "int8" in spec["kind"] and (embeddings or "embedding" not in spec["kind"]):
            raise UserError(f"{method}: {path} is quantised already; put {method} before that step")
    base = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is base)
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding) if embeddings else (nn.Linear,)
    found = [
        (f"{prefix}.{name}" if prefix else name, module)
        for name, module in base.named_modules()
        if isinstance(module, kinds)
    ]
    if not found:
        raise UserError(f"{method}: {type(model).__name__} has no linear layers of float weights")
    for path, module in found:
        kind = kind_of(module)
        if kind and kind not in accept:
            raise UserError(f"{method}: {path} is {DONE[kind]} already; leave one of the two steps out")
    if embeddings and _tied(model):
        raise UserError(
            f"{method}: the embeddings of {type(model).__name__} are its output matrix too; "
            "set embeddings to false"
        )
    return found


def _tied(model: Any) -> bool:
    """Whether the word embeddings are the matrix of a language model's head."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
