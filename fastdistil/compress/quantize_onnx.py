"""A compressed model as an ONNX one, float or int8, in a temporary folder until it is saved."""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastdistil.data.batches import Batch
from fastdistil.errors import UserError
from fastdistil.models.load import load_fitting_tokenizer


def onnx_model(model: Any, *, opset: int | None = None) -> Any:
    """The `fastdistil.export.runtime.OnnxModel` of a PyTorch model, in float32.

    Its tokenizer, on whose texts the export is checked, is that of the folder the model was loaded from.

    Raises:
        UserError: onnxruntime is not installed, the model came from no folder with a tokenizer, or cannot be
            exported.
        RunError: the exported model answers something else.
    """
    return _in_temporary_folder(lambda folder: _export(model, folder, opset=opset))


def int8_onnx_model(
    model: Any,
    mode: Literal["dynamic", "static"],
    batches: Sequence[Batch] | None = None,
    *,
    embedding_bits: Literal[4, 8] = 8,
    reference: Any = None,
) -> Any:
    """The same with int8 weights, activations and embeddings; the keywords are those of
    `fastdistil.export.onnx_int8.quantize_onnx`."""
    from fastdistil.export.onnx_int8 import quantize_onnx

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="fastdistil-float-") as temporary:
            source = Path(temporary) / "model"
            _export(model, source)
            quantize_onnx(
                source,
                folder,
                mode=mode,
                calibration=batches,
                embedding_bits=embedding_bits,
                reference=reference,
            )

    return _in_temporary_folder(write)


def _export(model: Any, folder: Path, *, opset: int | None = None) -> None:
    try:
        from fastdistil.export.onnx import export_onnx

        source = model.config._name_or_path
        if not source:
            raise UserError("the model was loaded from no folder: save it, with its tokenizer, and load it")
        export_onnx(model, load_fitting_tokenizer(source, model, masks=False), folder, opset=opset)
    except ModuleNotFoundError as error:
        raise UserError(f"the backend onnxruntime needs {error.name}: pip install {error.name}") from error


def _in_temporary_folder(write: Any) -> Any:
    from transformers import AutoConfig

    from fastdistil.export.runtime import load_runtime

    parent = tempfile.mkdtemp(prefix="fastdistil-onnx-")
    try:
        folder = Path(parent) / "model"
        write(folder)
        model = load_runtime(folder, AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except BaseException:
        shutil.rmtree(parent)
        raise
    # The file is read again by save_pretrained and when the number of threads changes.
    weakref.finalize(model, shutil.rmtree, parent, ignore_errors=True)
    return model
