"""Modules of a compressed model that its `transformers` config does not describe.

The model's config keeps a list of them, in plain JSON, under `fastdistil`:

    {"format": 1, "replacements": [["bert.encoder.layer.0.output.dense", {"kind": "linear", ...}], ...]}

An entry says which module of the whole model was replaced, and by what: the sizes, not the values, which are
in the safetensors file. `save_pretrained` writes the list with the config, and `store.load` builds the model
of the config and applies the list before it reads the weights. Each kind has a builder, registered with
`replacement` in the module of the method that uses it.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from itertools import chain
from typing import Any

from torch import nn

from fastdistil.errors import UserError

FORMAT = 1  # of the list; a folder of a later one is refused

Builder = Callable[[nn.Module, dict[str, Any]], nn.Module]
_BUILDERS: dict[str, Builder] = {}


def replacement(kind: str) -> Callable[[Builder], Builder]:
    """Registers the builder of a kind.

    A builder is called with the module that stands at the path and the entry's spec. It returns the module
    that stands there afterwards, which may be the same one, changed in place. It reads types and shapes,
    not values, takes dtype and device from the module, and must work on meta tensors. The values that it
    leaves are arbitrary: those of everything in the module's `state_dict` are then loaded, as
    `load_state_dict` does; what a module decodes from them, it decodes in its `_load_from_state_dict`.
    """

    def register(builder: Builder) -> Builder:
        _BUILDERS[kind] = builder
        return builder

    return register


def replacements(model: Any) -> list[tuple[str, dict[str, Any]]]:
    """`(path, spec)` of the model's entries, in the order in which they are applied."""
    return [(path, spec) for path, spec in _entries(model.config)]


def replace(model: Any, path: str, module: nn.Module, spec: dict[str, Any]) -> None:
    """Put `module` at `path` of the whole model, and append `[path, spec]` to its config's list.

    The builder of `spec["kind"]`, applied to the module that stood there, must give one with the same names
    and shapes of weights.
    """
    assert spec["kind"] in _BUILDERS, spec
    put(model, path, module)
    record(model, path, spec)


def record(model: Any, path: str, spec: dict[str, Any]) -> None:
    """Append `[path, spec]` to the config's list: what stands at `path` is already what the spec says."""
    set_replacements(model, [*replacements(model), (path, spec)])


def drop(model: Any, path: str, kind: str, module: nn.Module) -> None:
    """Put `module` at `path`, and take the last entry of that kind and path out of the config's list."""
    entries = replacements(model)
    last = max(i for i, (where, spec) in enumerate(entries) if (where, spec["kind"]) == (path, kind))
    put(model, path, module)
    set_replacements(model, entries[:last] + entries[last + 1 :])


def put(model: Any, path: str, module: nn.Module) -> None:
    """Put `module` at `path` of the whole model, and wherever else the module stands that was there: layers
    that share it go on sharing. The config's list stays as it is."""
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, module)
    declare_shared(model)


def set_replacements(model: Any, entries: list[tuple[str, dict[str, Any]]]) -> None:
    """Make `entries` the config's list; an empty one leaves no trace in the config."""
    # What from_pretrained renamed on loading, save_pretrained would rename back, also where it does not fit.
    model._weight_conversions = None
    if entries:
        listed = [[path, spec] for path, spec in entries]
        others = getattr(model.config, "fastdistil", None) or {}
        model.config.fastdistil = {**others, "format": FORMAT, "replacements": listed}
    elif getattr(model.config, "fastdistil", None) is not None:
        del model.config.fastdistil


def rebuild(model: Any) -> None:
    """Apply the config's list, in order, to a model fresh from its config.

    Raises `UserError` for a list of a later format, an unknown kind, or an entry that does not fit the model.
    """
    for path, spec in _entries(model.config):
        builder = _builder(spec.get("kind"))
        try:
            put(model, path, builder(model.get_submodule(path), spec))
        except UserError:
            raise
        except (AssertionError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the replacement {spec} of {path!r} in config.json does not fit {type(model).__name__} "
                f"({error})"
            ) from error


def declare_shared(model: Any) -> None:
    """Tell `save_pretrained` which weights are one tensor under several names: it refuses to write others.

    The first name is the one that is written.
    """
    first: dict[int, str] = {}
    shared = {}
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
        first.setdefault(id(tensor), name)
    declared = dict(type(model)._tied_weights_keys or {})
    # What the class itself ties has its own rule of which name is written.
    own = set(model.all_tied_weights_keys)
    model._tied_weights_keys = declared | {name: source for name, source in shared.items() if name not in own}


def _entries(config: Any) -> list[list[Any]]:
    described = getattr(config, "fastdistil", None)
    if described is None:
        return []
    if not isinstance(described, dict) or not isinstance(described.get("replacements", []), list):
        raise UserError("config.json: 'fastdistil' is not a table with a list of replacements")
    found = described.get("format", FORMAT)
    if found != FORMAT:
        raise UserError(
            f"config.json: 'fastdistil' has format {found!r}, this version reads {FORMAT}: update fastdistil"
        )
    entries: list[list[Any]] = described.get("replacements", [])
    for entry in entries:
        shaped = isinstance(entry, list | tuple) and len(entry) == 2
        if not shaped or not isinstance(entry[0], str) or not isinstance(entry[1], dict):
            raise UserError(f"config.json: not a replacement, [path, {{kind, ...}}]: {entry!r}")
    return entries


def _builder(kind: Any) -> Builder:
    if kind not in _BUILDERS:
        package = import_module("fastdistil.compress")
        for module in pkgutil.iter_modules(package.__path__):
            import_module(f"fastdistil.compress.{module.name}")
    if kind not in _BUILDERS:
        known = ", ".join(sorted(_BUILDERS))
        raise UserError(f"config.json has a replacement of an unknown kind, {kind!r}; known: {known}")
    return _BUILDERS[kind]


@replacement("linear")
def build_linear(module: nn.Module, spec: dict[str, Any]) -> nn.Linear:
    """A linear map of other widths: `in_features`, `out_features`."""
    assert isinstance(module, nn.Linear)
    return nn.Linear(
        spec["in_features"],
        spec["out_features"],
        bias=module.bias is not None,
        device=module.weight.device,
        dtype=module.weight.dtype,
    )


@replacement("heads")
def build_heads(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """A self-attention with `heads` heads of `head_size`; its linear maps are entries of their own."""
    attention: Any = module
    heads, size = spec["heads"], spec["head_size"]
    if hasattr(attention, "Wqkv"):  # ModernBERT, which takes the number of heads from the width of Wqkv
        attention.head_dim = size
    elif hasattr(attention, "q_lin"):
        attention.n_heads, attention.attention_head_size, attention.scaling = heads, size, size**-0.5
    else:
        attention.num_attention_heads, attention.attention_head_size = heads, size
        attention.all_head_size, attention.scaling = heads * size, size**-0.5
    return attention
