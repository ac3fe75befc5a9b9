"""Load a model folder, of a compressed model or a plain one of `transformers`."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.compress.replacements import declare_shared, rebuild
from fastdistil.errors import UserError
from fastdistil.models.load import load_model


def is_compressed(source: str | Path) -> bool:
    """Whether `source` is a folder of a model that only `load` restores, not `AutoModel`."""
    return described(source) is not None


def described(source: str | Path) -> Any:
    """What the folder's config.json has under "fastdistil"; None of a model that is not compressed."""
    path = Path(source).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return config.get("fastdistil") if isinstance(config, dict) else None


def load(
    source: str | Path, auto: Any = None, *, dtype: torch.dtype | None = None, **runtime: Any
) -> Any:  # a torch module
    """The model in a folder, in eval mode, on the CPU: one that was compressed, or any of `transformers`.

    Args:
        source: the folder; a plain `transformers` model may also be named as on the hub.
        auto: the model's class, or an Auto class of `transformers`; default the one that its config names.
        dtype: of the floating weights; default that of the file.
        **runtime: what only a folder for a runtime, such as ONNX, takes: `threads`.

    Only safetensors weights are read, no pickle, and no remote code is run.

    Raises:
        UserError: no such folder; weights that are missing, of another shape, or that nothing reads; a
            replacement of an unknown kind, or written by a later version of fastdistil.
    """
    if not is_compressed(source):
        _no_runtime(source, runtime)
        return _load_plain(source, auto, dtype)
    folder = Path(source).expanduser()
    config = _read_config(folder)
    if isinstance(config.fastdistil, dict) and "runtime" in config.fastdistil:
        from fastdistil.export.runtime import load_runtime

        return load_runtime(folder, config, **runtime)
    _no_runtime(source, runtime)
    weights = _read_weights(folder)
    try:
        model = _build(config, auto, weights)
        _load_weights(model, weights)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return (model if dtype is None else cast(model, dtype)).eval()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with its floating weights in `dtype`, as `from_pretrained` would give it.

    Unlike `model.to`, it leaves constants, such as ModernBERT's rotary frequencies, as precise as they are:
    buffers of modules that store nothing. A folder of the model gives the same outputs then.
    """
    constants = [
        (module, dict(module.named_buffers(recurse=False)))
        for module in model.modules()
        if not module.state_dict()
    ]
    model.to(dtype)
    for module, buffers in constants:
        for name, buffer in buffers.items():
            setattr(module, name, buffer)
    return model


def _no_runtime(source: str | Path, runtime: dict[str, Any]) -> None:
    if runtime:
        raise UserError(f"{source}: {', '.join(runtime)} is for models of another runtime than torch")


def _load_plain(source: str | Path, auto: Any, dtype: torch.dtype | None) -> Any:
    if auto is None:
        auto = _model_class(_read_config(source))
    model, info = load_model(source, dtype or "auto", auto, f"a {auto.__name__}")  # type: ignore[arg-type]
    missing = {key for key in info["missing_keys"] if not _is_pooler(model, key)}
    if missing:
        raise UserError(f"{source}: {_missing(model, missing)}")
    if info["missing_keys"]:
        model.pooler = None
    return model


def _read_config(source: str | Path) -> Any:
    from transformers import AutoConfig

    import fastdistil.models.bilstm  # noqa: F401  registers it with the Auto classes

    try:
        return AutoConfig.from_pretrained(os.path.expanduser(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"{source}: no model can be loaded from there ({first_line})") from error


def _model_class(config: Any) -> Any:
    import transformers

    import fastdistil.models.bilstm as bilstm

    names = config.architectures or []
    for module in (transformers, bilstm):
        found = getattr(module, names[0], None) if len(names) == 1 else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise UserError(f"config.json names no model class of transformers: architectures is {names}")


def _build(config: Any, auto: Any, weights: dict[str, Tensor]) -> Any:
    """The architecture with arbitrary weights, in the dtype of the config."""
    from transformers.initialization import no_init_weights

    auto = auto or _model_class(config)
    # Nothing is drawn: neither time nor random numbers are spent on weights that are then overwritten.
    with no_init_weights():
        from_config = auto.from_config if hasattr(auto, "from_config") else auto._from_config
        try:
            model = from_config(config)
        except (ValueError, AttributeError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise UserError(f"is no {auto.__name__} ({first_line})") from error
        has_pooler = any(_is_pooler(model, name) for name in model.state_dict())
        if has_pooler and not any(_is_pooler(model, name) for name in weights):
            model.pooler = None
    model.tie_weights()
    with no_init_weights():
        rebuild(model)
    declare_shared(model)
    return model


def _load_weights(model: Any, weights: dict[str, Tensor]) -> None:
    own = model.state_dict(keep_vars=True)
    for name, tensor in own.items():
        # A file may hold several dtypes, the config names one.
        if name in weights and weights[name].dtype != tensor.dtype and weights[name].is_floating_point():
            tensor.data = tensor.data.to(weights[name].dtype)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit {type(model).__name__} ({_detail(error)})") from error
    # A tensor with several names is in the file under one of them.
    there = {id(own[name]) for name in weights if name in own}
    absent = {name for name in missing if id(own.get(name)) not in there}
    if absent:
        raise UserError(_missing(model, absent))
    if unexpected:
        raise UserError(
            f"the weights do not fit {type(model).__name__}: nothing reads {len(unexpected)} of them, the "
            f"first is {min(unexpected)!r}"
        )


def _missing(model: Any, names: set[str]) -> str:
    kind = type(model).__name__
    return f"the weights do not fit {kind}: {len(names)} are missing, the first is {min(names)!r}"


def _detail(error: Exception) -> str:
    lines = str(error).strip().split("\n")
    return lines[min(1, len(lines) - 1)].strip().rstrip(".")


def _is_pooler(model: Any, name: str) -> bool:
    """Of an encoder alone, which may lack one: nothing would have trained it."""
    return model.base_model is model and name.startswith("pooler.")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = [single.name]
    if not single.is_file():
        if not index.is_file():
            raise UserError(f"{folder}: the folder has no safetensors weights (other formats are not read)")
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: {name!r} is not the name of a file in the folder")
        try:
            weights |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name}: cannot be read as safetensors ({error})") from error
    return weights
