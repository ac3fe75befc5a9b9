"""int8, bfloat16 and ONNX Runtime as steps of a chain."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from fastdistil.compress.encoded import densify
from fastdistil.compress.fake_quant import add_fake_quantisation, remove_fake_quantisation
from fastdistil.compress.int4_blocks import choose_table
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.outliers import separate_outliers
from fastdistil.compress.quantize_choice import fastest
from fastdistil.compress.quantize_onnx import int8_onnx_model, onnx_model
from fastdistil.compress.quantize_torchao import calibrate, quantize_layers
from fastdistil.compress.replacements import replacements
from fastdistil.compress.store import cast
from fastdistil.errors import UserError
from fastdistil.schema import Section

Backend = Literal["auto", "onnxruntime", "torchao"]
EmbeddingBits = Literal[4, 8]

# A matrix or table with fewer rows holds next to nothing: a task's last layer, the token types.
_FEWEST_ROWS = 16
_EMBEDDING_BITS = (
    "of an entry of the largest embedding table, that of the words: 4 takes about half the bytes of 8, with "
    "a scale for each 32 entries of a row, and rounds more coarsely"
)
_JACOB = "Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Inference"


class Int8Options(Section):
    backend: Backend = Field(
        default="auto",
        description="onnxruntime: an ONNX folder; torchao: int8 layers in the PyTorch model; auto: what is "
        "faster here of those that keep the loss, both are measured",
    )
    embeddings: bool = Field(default=True, description="whether the embedding tables are int8, too")
    embedding_bits: EmbeddingBits = Field(
        default=8, description=f"{_EMBEDDING_BITS}; with backend onnxruntime alone"
    )
    outliers: bool = Field(
        default=True,
        description="whether up to two inputs of a layer that dwarf all others, on calibration examples, are "
        "scaled down, or multiplied in float",
    )
    max_loss_increase: float = Field(
        default=0.05, ge=0, description="of the loss on the calibration examples, that auto accepts"
    )


class Int8StaticOptions(Int8Options):
    batches: int = Field(default=16, ge=1, description="of the calibration examples that set the scales")


class Int8QatOptions(Section):
    backend: Literal["onnxruntime", "torchao"] = Field(
        default="onnxruntime", description="whose rounding is learnt, and what the int8 model then runs on"
    )
    embeddings: bool = Field(default=True, description="whether the embedding tables are int8, too")
    embedding_bits: EmbeddingBits = Field(
        default=8, description=f"{_EMBEDDING_BITS}; with backend onnxruntime alone"
    )


class OnnxOptions(Section):
    opset: int | None = Field(default=None, description="of ONNX; null: the exporter's default")


class OnnxInt8Options(Section):
    embedding_bits: EmbeddingBits = Field(default=8, description=_EMBEDDING_BITS)


class NoOptions(Section):
    pass


def apply_dynamic(model: Any, options: Int8Options, calibration: Calibration | None) -> Any:
    """The model in int8, the scales of its activations taken from their values as the model runs.

    With backend "torchao" a scale for each token, with "onnxruntime" one for a tensor.

    Raises:
        UserError: the model is quantised, in half precision or exported already; the backend cannot make it.
        RunError: what the backend makes answers something else.
    """
    model = _float_model(model, "int8")
    builders = {
        "onnxruntime": partial(_onnxruntime, model, options, "dynamic", calibration),
        "torchao": partial(_torchao, model, options, calibration, static=False),
    }
    return _by_backend(model, options, builders, calibration)


def apply_static(model: Any, options: Int8StaticOptions, calibration: Calibration | None) -> Any:
    """The model in int8, the scales of its activations set beforehand, on the first `batches` examples.

    Raises:
        UserError: no examples, or as `apply_dynamic`.
        RunError: as `apply_dynamic`.
    """
    if calibration is None or not calibration.batches:
        raise UserError(
            "int8-static sets its scales on a task's training examples: give a task, or take int8"
        )
    model = _float_model(model, "int8-static")
    few = Calibration(calibration.batches[: options.batches], calibration.loss)
    builders = {
        "onnxruntime": partial(_onnxruntime, model, options, "static", few),
        "torchao": partial(_torchao, model, options, few, static=True),
    }
    return _by_backend(model, options, builders, calibration)


def apply_qat(model: Any, options: Int8QatOptions, calibration: Calibration | None) -> Any:
    """The model in float, rounding its weights and activations as the backend's int8 will: for training.

    Raises `UserError` as `apply_dynamic`.
    """
    model = _float_model(model, "int8-qat")
    if options.backend == "torchao":
        _require_eight_bits(options)
        paths = layers_to_quantize(model, embeddings=options.embeddings)
        return add_fake_quantisation(model, paths, "row")
    _require_embeddings(options)
    # ONNX Runtime leaves none in float, however small.
    paths = layers_to_quantize(model, embeddings=True, fewest_rows=1)
    if options.embedding_bits == 4:
        modules = {path: model.get_submodule(path) for path in paths}
        tables = {path: m.weight.shape for path, m in modules.items() if isinstance(m, nn.Embedding)}
        table = choose_table(tables)
        paths.remove(table)
        model = add_fake_quantisation(model, [table], "block")
    return add_fake_quantisation(model, paths, "tensor")


def finish_qat(model: Any, options: Int8QatOptions) -> Any:
    """The int8 model of what `apply_qat` made, trained or not.

    It rounds as in training, but that an ONNX model computes of the last layer only the tokens that its head
    reads, and takes the scales there from these alone: they are as fine, or finer.
    """
    if options.backend == "torchao":
        return quantize_layers(model, remove_fake_quantisation(model))
    learnt, bits = copy.deepcopy(model).eval(), options.embedding_bits
    remove_fake_quantisation(model)
    return int8_onnx_model(model.eval(), "dynamic", embedding_bits=bits, reference=learnt)


def apply_embeddings(model: Any, options: NoOptions, calibration: Calibration | None) -> Any:
    """The model with int8 embedding tables, a scale for each row; everything else stays in float.

    Raises:
        UserError: there is no table that is not an output matrix too, or it is quantised already.
    """
    model = _float_model(model, "int8-embeddings")
    tables = [
        path
        for path in layers_to_quantize(model, embeddings=True)
        if isinstance(model.get_submodule(path), nn.Embedding)
    ]
    if not tables:
        raise UserError(f"int8-embeddings: {type(model).__name__} has no embedding table that is its own")
    return quantize_layers(model, tables)


def apply_bf16(model: Any, options: NoOptions, calibration: Calibration | None) -> Any:
    """The model with its floating weights in bfloat16; `UserError` if it is quantised already."""
    _refuse_quantised(model, "bf16")
    return cast(model, torch.bfloat16)


def apply_onnx(model: Any, options: OnnxOptions, calibration: Calibration | None) -> Any:
    """The model on ONNX Runtime, in float32, as `export_onnx` writes it.

    Raises:
        UserError: the model is quantised already, or the exporter refuses the opset or the model.
        RunError: the exported model answers something else.
    """
    _refuse_quantised(model, "onnx", allowed=("int8_embedding",))
    return onnx_model(densify(model), opset=options.opset)


def apply_onnx_int8(model: Any, options: OnnxInt8Options, calibration: Calibration | None) -> Any:
    """`apply_dynamic` with backend "onnxruntime"."""
    model = _float_model(model, "onnx-int8")
    return _onnxruntime(model, Int8Options(**options.model_dump()), "dynamic", calibration)


def apply_onnx_int8_qat(model: Any, options: OnnxInt8Options, calibration: Calibration | None) -> Any:
    """`apply_qat` with backend "onnxruntime"."""
    model = _float_model(model, "onnx-int8-qat")
    return apply_qat(model, Int8QatOptions(**options.model_dump()), calibration)


def finish_onnx_int8_qat(model: Any, options: OnnxInt8Options) -> Any:
    return finish_qat(model, Int8QatOptions(**options.model_dump()))


def layers_to_quantize(model: Any, *, embeddings: bool, fewest_rows: int = _FEWEST_ROWS) -> list[str]:
    """Paths of the linear layers, and of the embedding tables if wanted; one of each layer that is shared.

    Left in float are matrices and tables of fewer than `fewest_rows`, and a matrix that two layers have in
    common, such as the word embeddings that are the output of a language model.

    Raises `UserError` if nothing is left.
    """
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    wanted = (nn.Linear, nn.Embedding) if embeddings else (nn.Linear,)
    paths = [
        path
        for path, module in model.named_modules()
        if type(module) in wanted and len(module.weight) >= fewest_rows and len(owners[module.weight]) == 1
    ]
    if not paths:
        raise UserError(f"{type(model).__name__} has no layer that int8 would make smaller")
    return paths


def _float_model(model: Any, method: str) -> Any:
    """`model` with plain float weights; what a coding has made of them stays."""
    _refuse_quantised(model, method)
    return densify(model)


def _refuse_quantised(model: Any, method: str, allowed: tuple[str, ...] = ()) -> None:
    facts = getattr(model.config, "fastdistil", None) or {}
    if "runtime" in facts:
        done = f"an {'int8 ' if facts.get('quantized') else ''}model of {facts['runtime']}"
    elif kinds := {spec["kind"] for _, spec in replacements(model) if "int8" in spec["kind"]} - {*allowed}:
        done = f"quantised ({', '.join(sorted(kinds))})"
    elif model.dtype in (torch.bfloat16, torch.float16):
        done = str(model.dtype).removeprefix("torch.")
    else:
        return
    raise UserError(f"{method}: the model is {done} already; apply {method} to the float model instead")


def _by_backend(
    model: Any,
    options: Int8Options,
    builders: Mapping[str, Callable[[], Any]],
    calibration: Calibration | None,
) -> Any:
    if options.backend == "auto":
        return fastest(model, builders, calibration, options.max_loss_increase)
    return builders[options.backend]()


def _onnxruntime(
    model: Any, options: Int8Options, mode: Literal["dynamic", "static"], calibration: Calibration | None
) -> Any:
    _require_embeddings(options)
    batches = None if calibration is None else calibration.batches
    model = _prepared(model, options, calibration)
    return int8_onnx_model(model, mode, batches, embedding_bits=options.embedding_bits)


def _require_embeddings(options: Int8Options | Int8QatOptions) -> None:
    if not options.embeddings:
        raise UserError("embeddings: false is for the backend torchao; with onnxruntime they are int8")


def _require_eight_bits(options: Int8Options | Int8QatOptions) -> None:
    if options.embedding_bits != 8:
        raise UserError("embedding_bits: 4 is for the backend onnxruntime; with torchao they are int8")


def _torchao(model: Any, options: Int8Options, calibration: Calibration | None, *, static: bool) -> Any:
    _require_eight_bits(options)
    model = _prepared(model, options, calibration)
    paths = layers_to_quantize(model, embeddings=options.embeddings)
    if not static:
        return quantize_layers(model, paths)
    assert calibration is not None
    return quantize_layers(model, paths, calibrate(model, paths, calibration.batches))


def _prepared(model: Any, options: Int8Options, calibration: Calibration | None) -> Any:
    """A copy of `model`, its outliers apart."""
    model = copy.deepcopy(model)
    if not options.outliers or calibration is None:
        return model
    return separate_outliers(model, layers_to_quantize(model, embeddings=False), calibration.batches)


def _method(name: str, description: str, options: type[Section], apply: Any, **keywords: Any) -> Method:
    keywords = {"kind": "quantisation", "paper": _JACOB, "main": None, "recovers": False} | keywords
    return Method(name=name, description=description, options=options, apply=apply, **keywords)


METHODS = (
    _method(
        "int8",
        "quantise weights, embeddings and activations to int8, with scales found as the model runs",
        Int8Options,
        apply_dynamic,
        main="backend",
    ),
    _method(
        "int8-static",
        "quantise to int8, with the activations' scales set beforehand on training examples",
        Int8StaticOptions,
        apply_static,
        main="backend",
    ),
    _method(
        "int8-qat",
        "train under int8 rounding, by distillation from the float teacher, then quantise to int8",
        Int8QatOptions,
        apply_qat,
        main="backend",
        finish=finish_qat,
        recovers=True,
    ),
    _method(
        "int8-embeddings",
        "quantise the embedding tables alone to int8, with a scale for each row",
        NoOptions,
        apply_embeddings,
    ),
    _method(
        "bf16", "store the weights and compute in bfloat16", NoOptions, apply_bf16, paper=None, ends=True
    ),
    _method(
        "onnx",
        "run in float32 on ONNX Runtime",
        OnnxOptions,
        apply_onnx,
        kind="runtime",
        paper=None,
        main="opset",
        ends=True,
    ),
    _method(
        "onnx-int8",
        "quantise to int8 for ONNX Runtime; the same as int8 with backend onnxruntime",
        OnnxInt8Options,
        apply_onnx_int8,
        main="embedding_bits",
        ends=True,
    ),
    _method(
        "onnx-int8-qat",
        "train under the rounding of ONNX Runtime's int8, then quantise to it; the same as int8-qat",
        OnnxInt8Options,
        apply_onnx_int8_qat,
        main="embedding_bits",
        finish=finish_onnx_int8_qat,
        recovers=True,
    ),
)
