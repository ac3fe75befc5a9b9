"""What a model costs: parameters, bytes, milliseconds, memory.

Latency and memory are those of the encoder, which is what every task runs; the head of a masked language
model or of a task is left out. Where the encoder takes token types, each text is two segments of equal
length: a siamese BiLSTM reads both.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.errors import RunError, UserError
from fastdistil.models.taps import accepted_inputs

LENGTH = 128
BATCH_SIZES = (1, 8)


@dataclass(frozen=True)
class Latency:
    """Wall time of one forward pass of the encoder."""

    batch_size: int
    length: int
    threads: int  # of the CPU, as torch was set
    p50_ms: float
    p95_ms: float
    runs: int


def count_parameters(model: Any) -> int:
    """Weights, a tied one counted once; of a pruned matrix those that are left, of a clustered one all that
    are not zero: a codebook's entries are not weights."""
    exported: int | None = getattr(model, "num_parameters_", None)
    if exported is not None:
        return exported
    from fastdistil.compress.encoded import kind_of, parameter_of

    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if kind_of(module) == "clustered":
            count += int(module.weight.detach().count_nonzero()) - parameter_of(module).numel()
    return count


def bytes_on_disk(folder: str | Path) -> int:
    """Size of the weight files of a model folder."""
    return sum(file.stat().st_size for file in weight_files(folder))


def weight_files(folder: str | Path) -> list[Path]:
    """What a model's weights are read from: safetensors files, or the file of another runtime and what lies
    beside it under the same name ("model.onnx.data").

    Raises `UserError` if there is none.
    """
    exported = _compression(folder).get("file")
    found = sorted(Path(folder).glob("*.safetensors" if exported is None else f"{exported}*"))
    if not found:
        raise UserError(f"{folder}: no {'safetensors weights' if exported is None else exported} in it")
    return found


def model_folder(source: str | Path) -> Path:
    """Where the files of a model lie; one of the hub was downloaded when it was loaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), local_files_only=True))


def measure_latency(
    models: Mapping[str, Any],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    length: int = LENGTH,
    runs: int = 30,
    warmup: int = 3,
) -> dict[str, list[Latency]]:
    """Name -> one `Latency` for each batch size, all sequences `length` tokens long, without padding.

    The models take turns, one forward pass each, so that a machine that slows down slows them all. They are
    put back into the mode they were in.
    """
    times: dict[tuple[str, int], list[float]] = {}
    modes = {name: model.training for name, model in models.items()}
    with torch.inference_mode():
        for batch_size in batch_sizes:
            inputs = {name: example_inputs(model, batch_size, length) for name, model in models.items()}
            for turn in range(warmup + runs):
                for name, model in models.items():
                    model.eval()
                    elapsed = time_forward(model.base_model, inputs[name])
                    if turn >= warmup:
                        times.setdefault((name, batch_size), []).append(1000 * elapsed)
    for name, model in models.items():
        model.train(modes[name])
    return {name: [_summary(times[name, b], b, length) for b in batch_sizes] for name in models}


def measure_peak_memory(
    folder: str | Path,
    *,
    batch_size: int = 8,
    length: int = LENGTH,
    device: str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> int:
    """Bytes that the model of a folder adds to a fresh process at the height of a forward pass, with weights.

    `dtype` is that of the weights of a plain model, None what its file has; a compressed model has its own.

    On a CPU: the high-water mark of the resident memory while the encoder runs, less what is resident before
    the model is loaded. On a GPU: `torch.cuda.max_memory_allocated`.

    Raises `RunError` if that process fails, with the last line it wrote.
    """
    code = "from fastdistil.evaluate import cost; cost.print_peak_memory()"
    weights = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    arguments = [str(folder), str(batch_size), str(length), device, weights]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().split("\n")[-1]
        raise RunError(f"{folder}: peak memory could not be measured: {reason}")
    return int(done.stdout.strip().split("\n")[-1])


def print_peak_memory() -> None:
    """What the measuring process runs: the folder and how to measure it as arguments, bytes printed."""
    folder, batch_size, length, device, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
    compression = _compression(folder)
    # Importing the code is done before the first look: its memory is not the model's.
    if compression:
        load = _compressed_loader(folder, compression.get("runtime"))
    else:
        load = _encoder_loader(folder, dtype)
    before = _resident("VmRSS")
    model = load(folder).to(device)
    # The loaded weights are pages of the file, and count as resident only where a pass has read them.
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is Tensor:
            tensor.data = tensor.data.clone()
    _reset_peak(device)
    with torch.inference_mode():
        for _ in range(2):
            time_forward(model.base_model, example_inputs(model, batch_size, length))
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else _resident("VmHWM") - before
    print(peak)


def _compression(folder: str | Path) -> dict[str, Any]:
    """How the folder's model differs from what its class of `transformers` is: its config's "fastdistil"."""
    from fastdistil.compress.store import described

    return described(folder) or {}


def _compressed_loader(folder: str, runtime: str | None) -> Callable[[str], Any]:
    import transformers

    from fastdistil.compress.replacements import rebuild
    from fastdistil.compress.store import load
    from fastdistil.models import bilstm

    if runtime is not None:
        import_module("fastdistil.export.runtime")
        import_module({"executorch": "executorch.runtime"}.get(runtime, runtime))
        return load
    # All code that the modules of this model need is imported on the way to one that has no memory.
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    (name,) = config.architectures
    model_class = getattr(transformers, name, None) or getattr(bilstm, name)
    with torch.device("meta"):
        rebuild(model_class(config))
    return load


def _encoder_loader(folder: str, dtype: str) -> Callable[[str], Any]:
    from transformers import MODEL_MAPPING, AutoConfig

    import fastdistil.models.bilstm  # noqa: F401  registers it with the Auto classes

    encoder_class: Any = MODEL_MAPPING[type(AutoConfig.from_pretrained(folder, trust_remote_code=False))]

    def load(folder: str) -> Any:
        model, info = encoder_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        if any(key.startswith("pooler.") for key in info["missing_keys"]):
            model.pooler = None
        return model.eval()

    return load


def example_inputs(model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
    """Random token ids without padding, and what else the model takes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    second = torch.arange(length, device=ids.device) >= length // 2
    inputs["token_type_ids"] = second.long().expand_as(ids)
    return accepted_inputs(model, inputs)


def time_forward(model: Any, inputs: dict[str, Tensor]) -> float:
    """Seconds of one forward pass, with what a GPU still had to do before it left out."""
    _synchronize(model.device)
    start = time.perf_counter()
    model(**inputs)
    _synchronize(model.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(times: list[float], batch_size: int, length: int) -> Latency:
    p50, p95 = (
        torch.tensor(times, dtype=torch.float64)
        .quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))
        .tolist()
    )
    return Latency(batch_size, length, torch.get_num_threads(), p50, p95, len(times))


def _resident(field: str) -> int:
    """VmRSS (resident memory) or VmHWM (its high-water mark) of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    # macOS has the high-water mark alone.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        marker.write_text("5")
