"""What a model costs: parameters, bytes, milliseconds, memory.

Latency and memory are those of the encoder, which is what every task runs; the head of a masked language
model or of a task is left out. Where the encoder takes token types, each text is two segments of equal
length: a siamese BiLSTM reads both.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """Weights, a tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def bytes_on_disk(folder: str | Path) -> int:
    """Size of the weight files of a model folder."""
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no safetensors weights in it")
    return sum(file.stat().st_size for file in files)


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
            inputs = {name: _inputs(model, batch_size, length) for name, model in models.items()}
            for turn in range(warmup + runs):
                for name, model in models.items():
                    model.eval()
                    elapsed = _time_forward(model, inputs[name])
                    if turn >= warmup:
                        times.setdefault((name, batch_size), []).append(1000 * elapsed)
    for name, model in models.items():
        model.train(modes[name])
    return {name: [_summary(times[name, b], b, length) for b in batch_sizes] for name in models}


def measure_peak_memory(
    folder: str | Path, *, batch_size: int = 8, length: int = LENGTH, device: str = "cpu"
) -> int:
    """Bytes that the model of a folder adds to a fresh process at the height of a forward pass, with weights.

    On a CPU: the high-water mark of the resident memory while the encoder runs, less what is resident before
    the model is loaded. On a GPU: `torch.cuda.max_memory_allocated`.

    Raises `RunError` if that process fails, with the last line it wrote.
    """
    code = "from fastdistil.evaluate import cost; cost.print_peak_memory()"
    arguments = [str(folder), str(batch_size), str(length), device]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().split("\n")[-1]
        raise RunError(f"{folder}: peak memory could not be measured: {reason}")
    return int(done.stdout.strip().split("\n")[-1])


def print_peak_memory() -> None:
    """What the measuring process runs: folder, batch size, length and device as arguments, bytes printed."""
    from transformers import MODEL_MAPPING, AutoConfig

    import fastdistil.models.bilstm  # noqa: F401  registers it with the Auto classes

    folder, batch_size, length, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # Importing the class is done before the first look: the code's memory is not the model's.
    encoder_class: Any = MODEL_MAPPING[type(config)]
    before = _resident("VmRSS")
    model, info = encoder_class.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if any(key.startswith("pooler.") for key in info["missing_keys"]):
        model.pooler = None
    model.eval().to(device)
    # The loaded weights are pages of the file, and count as resident only where a pass has read them.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    _reset_peak(device)
    with torch.inference_mode():
        for _ in range(2):
            _time_forward(model, _inputs(model, batch_size, length))
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else _resident("VmHWM") - before
    print(peak)


def _inputs(model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # RoBERTa takes token types but has a single one; a BiLSTM, which embeds none, does not count them.
    if getattr(model.config, "type_vocab_size", 2) > 1:
        second = torch.arange(length, device=ids.device) >= length // 2
        inputs["token_type_ids"] = second.long().expand_as(ids)
    return accepted_inputs(model, inputs)


def _time_forward(model: Any, inputs: dict[str, Tensor]) -> float:
    """Seconds of one forward pass of the encoder, with what a GPU still had to do before it left out."""
    _synchronize(model.device)
    start = time.perf_counter()
    model.base_model(**inputs)
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
