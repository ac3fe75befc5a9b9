"""An exported ONNX model with weights, activations of matrix products and embeddings in int8.

Weights are int8, symmetric, with a scale for each output channel; embedding tables with one for the table.
Activations are uint8, asymmetric: with "dynamic" their scale is taken from each tensor as it comes, with
"static" from calibration examples beforehand. The processor's VNNI instructions accumulate their products
exactly, so that no bit of the weights need be given up (`reduce_range`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fastdistil.errors import UserError
from fastdistil.export.folder import copy_tokenizer, new_folder, read_exported, write_exported
from fastdistil.export.quiet import quiet
from fastdistil.export.runtime import load_runtime
from fastdistil.export.verify import verify
from fastdistil.models.load import load_tokenizer

_OPERATORS = ["MatMul", "Gather"]


def quantize_onnx(
    source: str | Path,
    folder: str | Path,
    *,
    mode: Literal["dynamic", "static"] = "dynamic",
    calibration: Sequence[Any] | None = None,
) -> Path:
    """Write an int8 version of the exported model in `source` to `folder`, and return `folder`.

    Args:
        calibration: `TaskBatch`es of training examples, which "static" needs. "dynamic" is compared with the
            source on them, too.

    Raises:
        UserError: `source` is not an exported ONNX model or is quantised already, `folder` is there already,
            or "static" has no calibration examples.
        RunError: the outputs have nothing to do with the source's.
    """
    from transformers import AutoConfig

    source = Path(source).expanduser()
    facts = read_exported(source)
    if facts is None or facts.runtime != "onnxruntime":
        raise UserError(f"{source}: not an ONNX model; make one first: fastdistil export --format onnx")
    if facts.quantized is not None:
        raise UserError(f"{source}: is quantised already ({facts.quantized} int8); quantise the float model")
    if mode == "static" and not calibration:
        raise UserError("static int8 needs calibration examples: give a task, or take dynamic int8")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    model = load_runtime(source, config)
    quantised = replace(facts, quantized=mode)
    with new_folder(folder) as partial:
        with quiet():
            _quantize(source / facts.file, partial / facts.file, mode, model, calibration or ())
        copy_tokenizer(source, partial)
        write_exported(partial, config, config.architectures[0], quantised)
        result = verify(partial, model, load_tokenizer(source, masks=False), calibration or ())
        write_exported(partial, config, config.architectures[0], result.record(quantised))
    return Path(folder).expanduser()


def _quantize(source: Path, target: Path, mode: str, model: Any, calibration: Sequence[Any]) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    proto = onnx.load(str(source))
    common: dict[str, Any] = {"per_channel": True, "reduce_range": False, "op_types_to_quantize": _OPERATORS}
    options = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
    if mode == "dynamic":
        # The quantiser infers shapes again, and trips over those of weights that it has transposed.
        del proto.graph.value_info[:]
        quantize_dynamic(proto, target, weight_type=QuantType.QInt8, extra_options=options, **common)
        return
    quantize_static(
        proto,
        target,
        _Calibration(model, calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # What leaves a product is summed in float, and need not be rounded.
        extra_options=options | {"OpTypesToExcludeOutputQuantization": _OPERATORS},
        **common,
    )


class _Calibration:
    """The examples as `quantize_static` reads them."""

    def __init__(self, model: Any, batches: Sequence[Any]) -> None:
        self._feeds = (model.feed(batch.inputs) for batch in batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)
