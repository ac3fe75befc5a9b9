"""An exported ONNX model with weights, activations of matrix products and embeddings in int8.

Weights are int8, symmetric, with a scale for each output channel; embedding tables with one for the table.
Activations are uint8, asymmetric: with "dynamic" their scale is taken from each tensor as it comes, with
"static" from calibration examples beforehand. The processor's VNNI instructions accumulate their products
exactly, so that no bit of the weights need be given up (`reduce_range`).

The largest embedding table, that of the words, may have 4 bits instead: two entries a byte, and a scale for
each block of a row. ONNX Runtime's operator GatherBlockQuantized looks its rows up.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastdistil.compress.int4_blocks import BLOCK, choose_table, quantize_blocks
from fastdistil.errors import UserError
from fastdistil.export.folder import copy_tokenizer, new_folder, read_exported, write_exported
from fastdistil.export.quiet import quiet
from fastdistil.export.runtime import load_runtime
from fastdistil.export.verify import verify
from fastdistil.models.load import load_tokenizer

_OPERATORS = ["MatMul", "Gather"]
_ZERO = 8  # what an entry of 0 is stored as: the operator's default


def quantize_onnx(
    source: str | Path,
    folder: str | Path,
    *,
    mode: Literal["dynamic", "static"] = "dynamic",
    calibration: Sequence[Any] | None = None,
    embedding_bits: Literal[4, 8] = 8,
    reference: Any = None,
) -> Path:
    """Write an int8 version of the exported model in `source` to `folder`, and return `folder`.

    Args:
        calibration: `TaskBatch`es of training examples, which "static" needs. "dynamic" is compared with the
            source on them, too.
        embedding_bits: of the largest embedding table; the others have 8.
        reference: a model that the outputs are compared with instead of the source's: what was trained under
            the rounding that is put into effect here, and need not answer like its own float weights.

    Raises:
        UserError: `source` is not an exported ONNX model or is quantised already, `folder` is there already,
            "static" has no calibration examples, or no table can have 4 bits.
        RunError: the outputs have nothing to do with the source's, or the reference's.
    """
    import onnx
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
            proto = onnx.load(str(source / facts.file))
            if embedding_bits == 4:
                _four_bit_table(proto)
            _quantize(proto, partial / facts.file, mode, model, calibration or ())
        copy_tokenizer(source, partial)
        write_exported(partial, config, config.architectures[0], quantised)
        tokenizer = load_tokenizer(source, masks=False)
        result = verify(partial, model if reference is None else reference, tokenizer, calibration or ())
        write_exported(partial, config, config.architectures[0], result.record(quantised))
    return Path(folder).expanduser()


def _quantize(proto: Any, target: Path, mode: str, model: Any, calibration: Sequence[Any]) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

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


def _four_bit_table(proto: Any) -> None:
    """Put the largest table that nothing but look-ups read into 4 bits, in place.

    `quantize_dynamic` and `quantize_static` then find no Gather of it.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    tables = {
        table.name: table
        for table in graph.initializer
        if table.data_type == TensorProto.FLOAT
        and len(table.dims) == 2
        and all(_is_lookup(node, table.name) for node in readers.get(table.name, [None]))
    }
    name = choose_table({name: table.dims for name, table in tables.items()})
    table = tables[name]
    packed, scales = pack_rows(numpy_helper.to_array(table))
    graph.initializer.remove(table)
    graph.initializer.append(numpy_helper.from_array(packed, f"{name}_int4"))
    graph.initializer.append(numpy_helper.from_array(scales, f"{name}_int4_scale"))
    for node in readers[name]:
        (rows,) = node.output
        halves = f"{rows}_half"  # the operator's output has the type of its scales
        lookup = helper.make_node(
            "GatherBlockQuantized",
            [f"{name}_int4", node.input[1], f"{name}_int4_scale"],
            [halves],
            f"{node.name}_int4",
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            block_size=BLOCK,
            bits=4,
        )
        cast = helper.make_node("Cast", [halves], [rows], f"{node.name}_cast", to=TensorProto.FLOAT)
        position = list(graph.node).index(node)
        graph.node.remove(node)
        graph.node.insert(position, lookup)
        graph.node.insert(position + 1, cast)
    if all(opset.domain != "com.microsoft" for opset in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _is_lookup(node: Any, table: str) -> bool:
    """Whether the node gathers rows of the table."""
    if node is None or node.op_type != "Gather" or node.input[0] != table:
        return False
    return all(attribute.name != "axis" or attribute.i == 0 for attribute in node.attribute)


def pack_rows(
    table: np.ndarray,  # (V, D) float32, D even
) -> tuple[np.ndarray, np.ndarray]:
    """(V, D / 2) uint8, of each pair of entries the first in the low half, and (V, D / block) float16."""
    steps, scales = quantize_blocks(torch.from_numpy(table))
    stored = (steps.numpy() + _ZERO).astype(np.uint8)
    return stored[:, 0::2] | stored[:, 1::2] << 4, scales.numpy()


class _Calibration:
    """The examples as `quantize_static` reads them."""

    def __init__(self, model: Any, batches: Sequence[Any]) -> None:
        self._feeds = (model.feed(batch.inputs) for batch in batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)
