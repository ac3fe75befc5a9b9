"""int8 ONNX models: close to float, smaller, and their operators are int8 ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil.compress.store import load
from fastdistil.data.task_batches import TaskBatch
from fastdistil.errors import UserError
from fastdistil.export.folder import read_exported
from fastdistil.export.onnx_int8 import quantize_onnx

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def static_folder(tmp_path_factory: pytest.TempPathFactory, onnx_folder: Path, calibration: Any) -> Path:
    folder = tmp_path_factory.mktemp("static") / "model"
    return quantize_onnx(onnx_folder, folder, mode="static", calibration=calibration)


@pytest.fixture(scope="module")
def calibration(inputs: Callable[..., Any]) -> list[TaskBatch]:
    return [TaskBatch(**inputs(4, 16, seed), labels=torch.zeros(4).long()) for seed in (1, 2, 3)]


@pytest.mark.parametrize("mode", ["int8_folder", "static_folder"])
def test_logits_are_within_the_error_of_int8(
    mode: str, bert: Any, inputs: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    """Against float64, relative to the deviation of the logits over the texts."""
    given = inputs(8, 16, seed=9)
    with torch.inference_mode():
        expected = bert.double()(**given).logits
        bert.float()
    error = load(request.getfixturevalue(mode))(**given).logits - expected
    assert 0 < float(error.square().mean().sqrt() / expected.std()) < 0.1


@pytest.mark.parametrize("mode", ["int8_folder", "static_folder"])
def test_matrices_and_embeddings_are_int8(mode: str, request: pytest.FixtureRequest) -> None:
    graph = onnx.load(request.getfixturevalue(mode) / "model.onnx").graph
    floats = [i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 2]
    # Static leaves the products of one row a text in float: the pooler's and the classifier's.
    assert sum(i.dims[0] * i.dims[1] for i in floats) <= 32 * 32 + 32 * 3
    assert sum(i.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) for i in graph.initializer) > 15


def test_weights_have_a_scale_for_each_output(int8_folder: Path) -> None:
    graph = onnx.load(int8_folder / "model.onnx").graph
    scales = [i for i in graph.initializer if i.name.endswith("_scale") and list(i.dims) == [48]]
    assert len(scales) == 2  # the first matrix of each layer's feed-forward part


def test_folder_says_what_it_is(int8_folder: Path, static_folder: Path, onnx_folder: Path) -> None:
    facts = [read_exported(folder) for folder in (int8_folder, static_folder, onnx_folder)]
    assert [fact.quantized for fact in facts if fact] == ["dynamic", "static", None]
    assert len({fact.parameters for fact in facts if fact}) == 1


def test_int8_of_int8_is_refused(int8_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is quantised already"):
        quantize_onnx(int8_folder, tmp_path / "model")


def test_a_folder_of_transformers_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an ONNX model"):
        quantize_onnx(source, tmp_path / "model")


def test_static_without_examples_is_refused(onnx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs calibration examples"):
        quantize_onnx(onnx_folder, tmp_path / "model", mode="static")
    assert not list(tmp_path.iterdir())
