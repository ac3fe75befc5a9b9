"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `checkpoint-<step>`:

    model.safetensors, config.json   the model, as transformers reads it
    projections.safetensors          what the objectives learn, if they do
    optimizer.safetensors            `<moment>/<parameter name>`
    rng-<rank>.safetensors           the generator states of one process
    state.json                       step, tokens, position in the data, fingerprint, SHA-256 of each file

It is written to a temporary folder, flushed to the disk and renamed, so a folder of that name is whole unless
the disk itself lost something, which the checksums find. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastdistil.errors import RunError
from fastdistil.models.load import quiet_transformers

PROJECTIONS = "projections.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Progress:
    """Where a phase of training stands: what a resumed run must know besides weights and generators."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


Rng = dict[str, Tensor]


def rng_state(device: torch.device) -> Rng:
    """The generator states that training draws from (dropout): a copy, a few kilobytes."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Rng, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_checkpoint(
    root: Path,
    model: nn.Module,
    projections: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    rng: Rng,
    data: dict[str, Any],
    accelerator: Accelerator,
    fingerprint: str,
    keep: int,
) -> None:
    """Write `root/checkpoint-<step>` and keep it and the `keep - 1` before it. Every process must call it.

    Raises `RunError` when the disk refuses; earlier checkpoints are then untouched.
    """
    folder = root / f"checkpoint-{progress.step}"
    temporary = root / f".writing-{folder.name}"

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> None:
        write_model(temporary, model)
        if learned := _distinct_tensors(projections):
            write_durably(temporary / PROJECTIONS, save(learned))
        names = _names(model, projections)
        write_durably(temporary / "optimizer.safetensors", save(_optimizer_tensors(names, optimizer)))
        sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        state = {**asdict(progress), "data": data, "fingerprint": fingerprint, "sha256": sums}
        write_durably(temporary / "state.json", json.dumps(state, indent=1).encode())
        publish(temporary, folder)

    rng_file = temporary / f"rng-{accelerator.process_index}.safetensors"
    main = accelerator.is_main_process
    for stage in (
        prepare if main else None,
        lambda: write_durably(rng_file, save(rng)),
        write if main else None,
    ):
        failure = None
        try:
            if stage:
                stage()
        except OSError as error:
            failure = error
        if _any_process(failure is not None, accelerator):
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
            kept = "earlier checkpoints are untouched" if _steps(root) else "there is no earlier one"
            reason = (failure.strerror or failure) if failure else "another process failed"
            raise RunError(f"cannot save {folder}: {reason}; {kept}")
    if main:
        steps = _steps(root)
        # Those of later steps did not verify, or the run would have gone on from them.
        own = [step for step in steps if step <= progress.step]
        for step in set(steps) - set(own[-keep:]):
            shutil.rmtree(root / f"checkpoint-{step}", ignore_errors=True)


def newest_checkpoint(root: Path, fingerprint: str) -> Path | None:
    """The newest checkpoint of this run that is whole; leftovers of interrupted writes are ignored."""
    for step in reversed(_steps(root)):
        folder = root / f"checkpoint-{step}"
        if _verifies(folder, fingerprint):
            return folder
    return None


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    projections: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> tuple[Progress, dict[str, Any]]:
    """Put a checkpoint back into the models, the optimiser and the generators of this process.

    Returns where training stood, and the state of the batch source.
    """
    load_weights(model, folder / "model.safetensors")
    if (folder / PROJECTIONS).exists():
        load_weights(projections, folder / PROJECTIONS)
    names = _names(model, projections)
    _load_optimizer(names, optimizer, load_file(folder / "optimizer.safetensors"))
    rng = folder / f"rng-{accelerator.process_index}.safetensors"
    if rng.exists():
        set_rng_state(load_file(rng), accelerator.device)
    else:
        accelerator.print(f"{folder.name} was written by fewer processes: dropout continues from a new seed")
    state = json.loads((folder / "state.json").read_text())
    return Progress(state["step"], state["tokens"], state["seconds"]), state["data"]


def write_model(folder: Path, model: Any) -> None:
    """`model.safetensors` and `config.json`, flushed to the disk; tied weights are written once."""
    content = save(_distinct_tensors(model), metadata={"format": "pt"})
    write_durably(folder / "model.safetensors", content)
    write_durably(folder / "config.json", model.config.to_json_string(use_diff=False).encode())


def load_weights(model: nn.Module, file: Path) -> None:
    """Copy the tensors of `write_model` into a model of the same shape, bit for bit."""
    tensors = load_file(file)
    state = model.state_dict()
    unknown = sorted(tensors.keys() - state.keys())
    assert not unknown, f"{file} holds tensors that the model lacks: {unknown}"
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def load_projections(projections: nn.Module, root: Path, fingerprint: str) -> None:
    """Copy what the objectives of a finished run learned, from its newest checkpoint.

    Raises `RunError` if that is gone.
    """
    if not projections.state_dict():
        return
    newest = newest_checkpoint(root, fingerprint)
    if newest is None:
        raise RunError(f"{root}: the checkpoints are gone, and with them what the objectives learned")
    load_weights(projections, newest / PROJECTIONS)


def write_durably(file: Path, content: bytes) -> None:
    """Write and flush to the disk."""
    with open(file, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a `transformers` folder, durably; it appears when it is whole, and replaces one of that name."""
    partial = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(str(partial))
    tokenizer.save_pretrained(str(partial))
    for file in partial.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    publish(partial, folder)


def publish(temporary: Path, folder: Path) -> None:
    """Rename a finished temporary folder into place, durably; replaces a folder of that name."""
    _fsync_folder(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    _fsync_folder(folder.parent)


def _distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Those of the state dict, a tied one once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _names(model: nn.Module, projections: nn.Module) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return names | {parameter: f"projections.{name}" for name, parameter in projections.named_parameters()}


def _optimizer_tensors(names: dict[Tensor, str], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}/{names[parameter]}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizer(
    names: dict[Tensor, str], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        moments.setdefault(name, {})[moment] = value
    plain = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Parameters that never had a gradient have no state.
    plain["state"] = {i: moments[names[p]] for i, p in enumerate(order) if names[p] in moments}
    optimizer.load_state_dict(plain)


def _verifies(folder: Path, fingerprint: str) -> bool:
    try:
        state = json.loads((folder / "state.json").read_text())
        return state["fingerprint"] == fingerprint and all(
            _sha256(folder / name) == expected for name, expected in state["sha256"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for p in root.iterdir() if (match := _NAME.fullmatch(p.name)))


def _any_process(flag: bool, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
