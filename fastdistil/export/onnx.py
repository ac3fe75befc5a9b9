"""A model as one ONNX file for ONNX Runtime.

`transformers.exporters` traces it, with batch and length left open. Attention is one node of ONNX Runtime's
(`attention.py`), and of the last layer only what the head reads is computed (`rewrite.py`). What else can be
fused, such as bias and GELU, ONNX Runtime fuses itself, when it loads the file.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fastdistil.errors import UserError
from fastdistil.evaluate.cost import count_parameters
from fastdistil.export.attention import onnxruntime_attention
from fastdistil.export.example import example_inputs, labels, open_axes, with_plain_weights
from fastdistil.export.folder import Exported, new_folder, write_exported
from fastdistil.export.quiet import quiet, reason
from fastdistil.export.verify import verify
from fastdistil.models.load import max_positions

FILE = "model.onnx"
OLDEST_OPSET = 18  # that torch.onnx has translations for
_LARGEST = 2**31  # bytes of a protocol buffer


def export_onnx(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    opset: int | None = None,
    optimize: bool = True,
    examples: Sequence[Any] = (),
) -> Path:
    """Write `model` as `folder`/model.onnx, beside config and tokenizer, and return `folder`.

    Its outputs are compared with the model's before the folder gets its name.

    Args:
        model: of transformers, with any head or none; its modules may have been replaced. It is exported in
            eval mode, and left as it was.
        opset: of ONNX; None: torch's default.
        optimize: whether the file is for ONNX Runtime, with its attention; else it has standard operators
            alone, which other runtimes know, too.
        examples: `TaskBatch`es that the two are compared on, besides texts of our own.

    Raises:
        UserError: `folder` is there already, or the exporter refuses the opset or the model.
        RunError: the outputs differ from the model's.
    """
    check_model(model)
    _check_opset(opset)
    with new_folder(folder) as partial:
        _write(model, partial / FILE, opset, optimize)
        tokenizer.save_pretrained(partial)
        facts = Exported("onnxruntime", FILE, count_parameters(model), max_length=max_positions(model))
        write_exported(partial, model.config, type(model).__name__, facts)
        result = verify(partial, model, tokenizer, examples)
        write_exported(partial, model.config, type(model).__name__, result.record(facts))
    return Path(folder).expanduser()


def check_model(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{type(model).__name__} cannot be exported: it is not a PyTorch model of transformers"
        )


def _check_opset(opset: int | None) -> None:
    from onnx.defs import onnx_opset_version

    if opset is not None and not OLDEST_OPSET <= opset <= onnx_opset_version():
        raise UserError(
            f"opset must be between {OLDEST_OPSET} and {onnx_opset_version()}, the newest of the installed "
            f"onnx, got {opset}"
        )


def _write(model: Any, file: Path, opset: int | None, optimize: bool) -> None:
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateInitializersPass
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    from fastdistil.export.rewrite import rewrite

    inputs: dict[str, Any] = {n: value.to(model.device) for n, value in example_inputs(model).items()}
    config = OnnxConfig(dynamic_shapes=open_axes(inputs, length=max_positions(model)), opset_version=opset)
    training, model = model.training, with_plain_weights(model)
    attention = onnxruntime_attention(model) if optimize else nullcontext()
    try:
        with quiet(), attention:
            program = OnnxExporter().export(model.eval(), inputs, config).program
            # Layers that share weights have transposed copies of them.
            DeduplicateInitializersPass(size_limit=_LARGEST)(program)
            # Where in which of this machine's files each node comes from.
            ClearMetadataAndDocStringPass()(program)
            if optimize:
                rewrite(program)
    except Exception as error:
        raise UserError(f"{type(model).__name__} cannot be exported to ONNX: {reason(error)}") from error
    finally:
        model.train(training)
    written = program.opset_imports[""]
    if opset is not None and written != opset:
        raise UserError(f"opset {opset} is newer than those that the exporter knows; ask for an older one")
    _name_axes(program)
    if sum(value.const_value.nbytes for value in program.graph.initializers.values()) >= _LARGEST:
        raise UserError(f"{type(model).__name__} is larger than the 2 GB that one ONNX file can hold")
    onnx_ir.save(program, str(file))


def _name_axes(program: Any) -> None:
    """The exporter calls them s18 and s41."""
    import onnx_ir

    ids = program.graph.inputs[0]
    names = {str(dim): label for dim, label in zip(ids.shape, labels(len(ids.shape)), strict=True)}
    for value in (*program.graph.inputs, *program.graph.outputs):
        value.shape = onnx_ir.Shape(
            [dim if isinstance(dim, int) else names.get(str(dim.value), dim) for dim in value.shape]
        )
