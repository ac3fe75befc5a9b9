"""Export a model folder: what `fastdistil export` does."""

import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdistil.errors import UserError
from fastdistil.evaluate.cost import bytes_on_disk, model_folder
from fastdistil.export.card import write_card
from fastdistil.export.example import example_inputs
from fastdistil.export.executorch import export_executorch
from fastdistil.export.folder import Exported, new_folder, read_exported
from fastdistil.export.onnx import export_onnx
from fastdistil.export.onnx_int8 import quantize_onnx
from fastdistil.export.runtime import load_runtime
from fastdistil.models.load import load_fitting_tokenizer, max_positions
from fastdistil.wording import gain

FORMATS = ("onnx", "onnx-int8", "executorch")
_RUNS, _WARMUP = 20, 3
_PACKAGES = {"onnx": "onnxruntime onnx onnxscript", "executorch": "executorch"}


@dataclass(frozen=True)
class ExportResult:
    """An exported folder beside what it was made of. Latencies are p50 of the whole model, head included."""

    path: Path
    format: str
    parameters: int
    bytes: int  # of the runtime's file
    source_bytes: int  # of the weights that it was made of, on disk
    max_error: float  # of the outputs, absolute
    agreement: float | None  # fraction of the checked outputs with the same largest entry
    latency_before_ms: float  # of one sequence; of PyTorch, or of the float ONNX model
    latency_after_ms: float
    length: int  # tokens
    threads: int
    notes: tuple[str, ...] = ()
    scores_before: Mapping[str, float] | None = None  # on a task; None: none was named
    scores_after: Mapping[str, float] | None = None

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, with its unit."""
        same = (
            "" if self.agreement is None else f"; the same answer on {self.agreement:.1%} of what was checked"
        )
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        before, after = self.scores_before or {}, self.scores_after or {}
        return [
            ("exported to", f"{self.path}, {self.format}"),
            ("parameters", f"{self.parameters / 1e6:.2f} M"),
            ("largest error", f"{self.max_error:.2g}{same}"),
            (
                "size on disk",
                f"{self.source_bytes / 1e6:.1f} MB -> {self.bytes / 1e6:.1f} MB, "
                f"{gain(self.source_bytes / self.bytes, 'smaller', 'larger')}",
            ),
            (
                f"latency, 1 × {self.length} tokens, {threads}",
                f"{self.latency_before_ms:.2f} ms -> {self.latency_after_ms:.2f} ms, "
                f"{gain(self.latency_before_ms / self.latency_after_ms, 'faster', 'slower')}",
            ),
            *((name.replace("_", " "), f"{before[name]:.2%} -> {after[name]:.2%}") for name in after),
            *(("note", note) for note in self.notes),
        ]


def export_model(
    source: str | Path,
    format: str,
    output: str | Path,
    *,
    opset: int | None = None,
    max_length: int = 128,
    examples: Sequence[Any] = (),
    score: Callable[[Any], Mapping[str, float]] | None = None,
    task: str | None = None,
    data: str | None = None,
) -> ExportResult:
    """Write the model `source` to the folder `output` for another runtime, compared with the original.

    Args:
        source: a folder of `transformers`, one that was compressed, or a hub model; for "onnx-int8" also the
            folder of a float ONNX export.
        format: one of `FORMATS`.
        output: a folder that does not exist, or is empty. It appears when all is done.
        opset: of ONNX; None: torch's default.
        max_length: tokens that the latency is measured at, and that an ExecuTorch file takes at most.
        examples: `TaskBatch`es that the two are compared on, besides texts of our own.
        score: of a model, on a task; asked of both, for the result and the model card.
        task, data: the options of `fastdistil export` that `examples` and `score` come from: the card tells
            the command.

    Raises:
        UserError: an unknown format, an `output` that is there already, a source that is exported or
            quantised already, or whatever the exporter refuses; a package of the format is not installed.
        RunError: the outputs differ too much from the original's.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; the formats are {', '.join(FORMATS)}")
    if opset is not None and format == "executorch":
        raise UserError("opset is ONNX's; ExecuTorch has none")
    _check_source(source, format)
    if opset is not None and read_exported(source) is not None:
        raise UserError(f"opset is that of the model in {source} already; leave it out")
    try:
        with new_folder(output) as partial:
            model = _write(source, format, partial, opset, max_length, examples)
            size = bytes_on_disk(model_folder(source))
            result = _result(model, size, partial, Path(output).expanduser(), format, max_length, score)
            options = {
                "--format": format,
                "--opset": opset,
                "--task": task,
                "--data": data,
                "--output": output,
            }
            given = [word for name, value in options.items() if value is not None for word in (name, value)]
            write_card(
                partial,
                title=f"{Path(source).name}: {format}",
                command=shlex.join(map(str, ["fastdistil", "export", source, *given])),
                made_of=source,
                facts=result.rows()[1:],
            )
    except ModuleNotFoundError as error:
        raise UserError(
            f"{format} needs {error.name}: pip install {_PACKAGES[format.removesuffix('-int8')]}"
        ) from error
    return result


def _check_source(source: str | Path, format: str) -> None:
    exported = read_exported(source)
    if exported is None:
        return
    kind = "int8" if exported.quantized else "float32"
    if exported.quantized is not None and format == "onnx-int8":
        raise UserError(f"{source} is in int8 already; export the float model that it was made of")
    if exported.runtime != "onnxruntime" or format != "onnx-int8":
        raise UserError(
            f"{source} is a {kind} model for {exported.runtime} already, which cannot become {format}; "
            "export the model that it was made of"
        )


def _write(
    source: str | Path,
    format: str,
    partial: Path,
    opset: int | None,
    max_length: int,
    examples: Sequence[Any],
) -> Any:
    """The model that was exported."""
    from fastdistil.compress.store import load

    model = load(source) if read_exported(source) else load(source, dtype=torch.float32)
    if read_exported(source) is not None:
        quantize_onnx(source, partial, calibration=examples)
        return model
    if _is_int8(model):
        raise UserError(f"{source} is in int8 already; export the float model that it was made of")
    tokenizer = load_fitting_tokenizer(source, model, masks=False)
    if format == "executorch":
        export_executorch(model, tokenizer, partial, max_length=max_length, examples=examples)
    elif format == "onnx":
        export_onnx(model, tokenizer, partial, opset=opset, examples=examples)
    else:
        with tempfile.TemporaryDirectory(prefix="fastdistil-float-") as temporary:
            float_folder = export_onnx(model, tokenizer, Path(temporary) / "model", opset=opset)
            quantize_onnx(float_folder, partial, calibration=examples)
    return model


def _is_int8(model: Any) -> bool:
    from fastdistil.compress.replacements import replacements

    return any(spec["kind"] == "int8_linear" for _, spec in replacements(model))


def _result(
    model: Any,
    source_bytes: int,
    partial: Path,
    output: Path,
    format: str,
    max_length: int,
    score: Callable[[Any], Mapping[str, float]] | None,
) -> ExportResult:
    exported = read_exported(partial)
    assert exported is not None
    assert exported.max_error is not None
    length = min(max_length, max_positions(model))
    made = load_runtime(partial, model.config)
    before, after = _latencies([model, made], length)
    return ExportResult(
        output,
        format,
        exported.parameters,
        (partial / exported.file).stat().st_size,
        source_bytes,
        exported.max_error,
        exported.agreement,
        before,
        after,
        length,
        torch.get_num_threads(),
        _notes(exported),
        None if score is None else score(model),
        None if score is None else score(made),
    )


def _notes(exported: Exported) -> tuple[str, ...]:
    if exported.max_batch is None:
        return tuple(exported.notes)
    bounds = f"takes at most {exported.max_length} tokens and {exported.max_batch} texts at once"
    return (*exported.notes, bounds)


def _latencies(models: Sequence[Any], length: int) -> list[float]:
    """p50 in ms of one sequence; the models take turns."""
    inputs = [example_inputs(model, 1, length) for model in models]
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(_WARMUP + _RUNS):
            for model, given, own in zip(models, inputs, times, strict=True):
                start = time.perf_counter()
                model(**given)
                if turn >= _WARMUP:
                    own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]
