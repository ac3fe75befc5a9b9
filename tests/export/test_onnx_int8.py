"""int8 ONNX models: close to float, smaller, and their operators are int8 ones."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdistil.compress.store import load
from fastdistil.data.task_batches import TaskBatch
from fastdistil.errors import UserError
from fastdistil.export.folder import read_exported
from fastdistil.export.onnx_int8 import _four_bit_table, pack_rows, quantize_onnx

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def static_folder(tmp_path_factory: pytest.TempPathFactory, onnx_folder: Path, calibration: Any) -> Path:
    folder = tmp_path_factory.mktemp("static") / "model"
    return quantize_onnx(onnx_folder, folder, mode="static", calibration=calibration)


@pytest.fixture(scope="module")
def int4_folder(tmp_path_factory: pytest.TempPathFactory, onnx_folder: Path) -> Path:
    """int8, but the word embeddings in 4 bits."""
    return quantize_onnx(onnx_folder, tmp_path_factory.mktemp("int4") / "model", embedding_bits=4)


@pytest.fixture(scope="module")
def static_int4_folder(tmp_path_factory: pytest.TempPathFactory, onnx_folder: Path, calibration: Any) -> Path:
    folder = tmp_path_factory.mktemp("static") / "model"
    return quantize_onnx(onnx_folder, folder, mode="static", calibration=calibration, embedding_bits=4)


@pytest.fixture(scope="module")
def calibration(inputs: Callable[..., Any]) -> list[TaskBatch]:
    return [TaskBatch(**inputs(4, 16, seed), labels=torch.zeros(4).long()) for seed in (1, 2, 3)]


@pytest.mark.parametrize("mode", ["int8_folder", "static_folder"])
def test_logits_are_within_the_error_of_int8(
    mode: str, bert: Any, inputs: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    """Against float64, relative to the deviation of the logits over the texts."""
    given = inputs(8, 16, seed=9)
    double = copy.deepcopy(bert).double()
    with torch.inference_mode():
        expected = double(**given).logits
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


def _unpack(packed: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries, and the scale of each; (V, D) float64."""
    steps = np.stack([packed & 15, packed >> 4], 2).reshape(len(packed), -1) - 8.0
    of_entries = np.repeat(scales.astype(np.float64), 32, 1)[:, : steps.shape[1]]
    return steps * of_entries, of_entries


@pytest.mark.parametrize(
    "width",
    [
        64,
        48,  # a block and a half
        6,  # less than a block
    ],
)
def test_four_bits_are_off_by_half_a_step(width: int) -> None:
    table = np.random.default_rng(0).normal(size=(200, width)).astype(np.float32)
    table[0] = 0
    packed, scales = pack_rows(table)
    assert (packed.nbytes, scales.nbytes) == (200 * width // 2, 200 * 2 * -(-width // 32))
    entries, of_entries = _unpack(packed, scales)
    # A scale in half precision is off by 2**-11 of itself, 8 of them by 2**-8.
    assert np.all(np.abs(entries - table) <= (0.5 + 2**-8) * np.abs(of_entries))
    assert np.all(entries[0] == 0)
    far = np.abs(table[1:]).max(1, keepdims=True)
    assert np.all(np.abs(of_entries[1:]) <= far / 7 * (1 + 2**-11))


def test_both_sides_of_a_block_reach_eight_steps() -> None:
    """-8 is the far end of a block, whichever side it is on."""
    table = np.array([[8, -7] * 16, [-8, 7] * 16], np.float32)
    packed, scales = pack_rows(table)
    assert scales.tolist() == [[-1], [1]]
    np.testing.assert_array_equal(_unpack(packed, scales)[0], table)


def test_looked_up_rows_are_those_of_the_four_bits(int4_folder: Path, onnx_folder: Path) -> None:
    """Against float64, and within half a step of the float table."""
    import onnxruntime

    model = onnx.load(int4_folder / "model.onnx")
    (node,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    (cast,) = (other for other in model.graph.node if node.output[0] in other.input)
    model.graph.output.append(onnx.helper.make_tensor_value_info(cast.output[0], 1, None))
    ids = np.arange(60)[None]
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids[:, :40], "attention_mask": np.ones((1, 40), int)}
    feeds["token_type_ids"] = np.zeros((1, 40), int)
    (rows,) = session.run([cast.output[0]], feeds)
    entries, of_entries = _unpack(values[node.input[0]], values[node.input[2]])
    np.testing.assert_allclose(rows[0], entries[:40], rtol=2**-11, atol=1e-7)
    tables = onnx.load(onnx_folder / "model.onnx").graph.initializer
    (table,) = (i for i in tables if "word_embeddings" in i.name)
    error = np.abs(rows[0] - onnx.numpy_helper.to_array(table)[:40])
    assert np.all(error <= (0.5 + 2**-7) * np.abs(of_entries[:40]))


@pytest.mark.parametrize(
    ("mode", "int8"), [("int4_folder", "int8_folder"), ("static_int4_folder", "static_folder")]
)
def test_the_word_embeddings_alone_have_four_bits(
    mode: str, int8: str, bert: Any, request: pytest.FixtureRequest
) -> None:
    def sizes(folder: str) -> dict[str, int]:
        """Bytes of the tables, by what they are of."""
        graph = onnx.load(request.getfixturevalue(folder) / "model.onnx").graph
        return {
            kind: sum(len(i.raw_data) for i in graph.initializer if f"{kind}_embeddings" in i.name)
            for kind in ("word", "position", "token_type")
        }

    four, eight = sizes(mode), sizes(int8)
    rows = bert.config.vocab_size
    assert four["word"] == rows * (16 + 2)
    assert eight["word"] >= rows * 32
    assert (four["position"], four["token_type"]) == (eight["position"], eight["token_type"])


@pytest.mark.parametrize("mode", ["int4_folder", "static_int4_folder"])
def test_logits_are_within_the_error_of_four_bits(
    mode: str, bert: Any, inputs: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    given = inputs(8, 16, seed=9)
    with torch.inference_mode():
        expected = bert(**given).logits
    error = load(request.getfixturevalue(mode))(**given).logits - expected
    assert 0 < float(error.square().mean().sqrt() / expected.std()) < 0.3


def _lookup(width: int, *nodes: Any) -> Any:
    """A graph that gathers rows of a table."""
    gather = onnx.helper.make_node("Gather", ["table", "ids"], ["rows"])
    table = onnx.numpy_helper.from_array(np.ones((5, width), np.float32), "table")
    return onnx.helper.make_model(onnx.helper.make_graph([gather, *nodes], "g", [], [], [table]))


def test_an_odd_width_has_no_four_bits() -> None:
    with pytest.raises(UserError, match="packs entries in pairs, and the rows have 7: take 8"):
        _four_bit_table(_lookup(7))


def test_a_table_that_is_an_output_matrix_too_is_refused() -> None:
    product = onnx.helper.make_node("Transpose", ["table"], ["matrix"])
    with pytest.raises(UserError, match="embedding table of its own, and the model has none"):
        _four_bit_table(_lookup(8, product))
