"""Rewritten graphs compute the same, with less."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdistil.compress.store import load
from fastdistil.export.onnx import export_onnx
from fastdistil.models.taps import accepted_inputs

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

ATOL = 1e-5
HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'


def _model(body: str, inputs: str = "float[B, L, 8] x", outputs: str = "float[B, 8] y") -> Any:
    """Of ONNX's text format, with weights, an index, and the shapes of all values that have known ones."""
    weights = "float[8, 8] w, float[8] g, float[8] b, int64 i, int64[1] axis, int64[1] from, int64[1] to"
    known = "float[B, L, 8] c, float[B, L, 8] e"  # of operators that onnx does not know
    text = f"{HEADER}g ({inputs}, {weights}) => ({outputs}) <{known}> {{\n{body}\n}}"
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    values = {
        "w": rng.standard_normal((8, 8)).astype(np.float32) / 3,
        "g": rng.standard_normal(8).astype(np.float32),
        "b": rng.standard_normal(8).astype(np.float32),
        "i": np.array(0),
        "axis": np.array([2]),
        "from": np.array([0]),
        "to": np.array([4]),
    }
    for name, value in values.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    kept = [value for value in proto.graph.input if value.name not in values]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def _run(model: Any) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    feeds = {}
    for value in session.get_inputs():
        shape = [{"B": 3, "L": 5}.get(dim, dim) for dim in value.shape]
        feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
        if value.type == "tensor(int32)":
            feeds[value.name] = np.ones(shape, np.int32)
    return list(session.run(None, feeds))


def _rewritten(model: Any) -> Any:
    """A checked rewrite of a copy: it computes the same."""
    from fastdistil.export.rewrite import rewrite

    copy = ir.from_proto(ir.to_proto(model))
    rewrite(copy)
    for expected, got in zip(_run(model), _run(copy), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    return copy


def _tokens(model: Any) -> dict[str, Any]:
    """Name -> how many tokens a value of rank 3 has."""
    return {
        output.name: output.shape[1]
        for node in model.graph
        for output in node.outputs
        if output.shape is not None and len(output.shape) == 3
    }


FFN = """
    n = LayerNormalization <axis = -1> (x, g, b)
    m = MatMul (n, w)
    h = Add (m, b)
    a = Gelu (h)
    s = Add (a, n)
    y = Gather <axis = 1> (s, i)
"""


def test_a_feed_forward_network_of_which_one_token_is_read() -> None:
    tokens = _tokens(_rewritten(_model(FFN)))
    assert tokens == {"x_for_y": 1, "n": 1, "m": 1, "h": 1, "a": 1, "s": 1}


@pytest.mark.parametrize("index", [-1, 3])
def test_another_token_than_the_first(index: int) -> None:
    model = _model(FFN)
    model.graph.initializers["i"].const_value = ir.tensor(np.array(index), name="i")
    assert _tokens(_rewritten(model))["n"] == 1


def test_what_is_read_whole_elsewhere_stays_whole() -> None:
    model = _model(FFN, outputs="float[B, 8] y, float[B, L, 8] n")
    assert _tokens(_rewritten(model)) == {"n": "L", "n_for_y": 1, "m": 1, "h": 1, "a": 1, "s": 1}


def test_an_output_of_all_tokens_leaves_everything_as_it_was() -> None:
    model = _model(FFN, outputs="float[B, 8] y, float[B, L, 8] s")
    assert [node.op_type for node in _rewritten(model).graph] == [node.op_type for node in model.graph]


def test_two_that_read_the_same_token() -> None:
    body = FFN.replace("y = Gather", "p = Gather") + "q = Gather <axis = 1> (s, i)\n y = Add (p, q)"
    assert set(_tokens(_rewritten(_model(body))).values()) == {"L"}  # s is read twice


def test_two_tokens_of_the_same_tensor() -> None:
    body = """
        last = Constant <value_int = -1> ()
        r = Relu (x)
        t = Tanh (x)
        p = Gather <axis = 1> (r, i)
        q = Gather <axis = 1> (t, last)
        y = Add (p, q)
    """
    tokens = _tokens(_rewritten(_model(body)))
    assert tokens == {"x_for_p": 1, "r": 1, "x_for_q": 1, "t": 1}


def test_parts_of_the_channels() -> None:
    body = """
        l, r = Split <axis = -1, num_outputs = 2> (x)
        t = Tanh (l)
        p = Mul (t, r)
        f = Slice (x, from, to, axis)
        d = Add (p, f)
        y = Gather <axis = 1> (d, i)
    """
    tokens = _tokens(_rewritten(_model(body, outputs="float[B, 4] y")))
    assert set(tokens.values()) == {1}


@pytest.mark.parametrize(
    "mix",
    [
        "m = CumSum (x, one)",
        "t = Transpose <perm = [0, 2, 1]> (x) m = Transpose <perm = [0, 2, 1]> (t)",
        "m = LayerNormalization <axis = 1> (x, gl)",
    ],
)
def test_tokens_that_meet_are_not_taken_apart(mix: str) -> None:
    body = f"one = Constant <value_int = 1> () {mix} r = Relu (m) y = Gather <axis = 1> (r, i)"
    inputs = "float[B, 5, 8] x, float[5, 8] gl" if "gl" in mix else "float[B, L, 8] x"
    tokens = _tokens(_rewritten(_model(body, inputs=inputs)))
    assert tokens.pop("m_for_y") == tokens.pop("r") == 1
    assert set(tokens.values()) <= {"L", 5, 8}


ATTENTION = """
    q = MatMul (x, w)
    k = Mul (x, g)
    c = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, x{rest})
    o = MatMul (c, w)
    s = Add (o, x)
    y = Gather <axis = 1> (s, i)
"""


def test_of_the_last_attention_one_query_and_all_keys() -> None:
    tokens = _tokens(_rewritten(_model(ATTENTION.format(rest=""))))
    assert tokens == {"x_for_y": 1, "q": 1, "k": "L", "c": 1, "o": 1, "s": 1}


def test_an_attention_with_a_bias_stays_whole() -> None:
    inputs = "float[B, L, 8] x, float[B, 2, L, L] bias"
    rewritten = _rewritten(_model(ATTENTION.format(rest=", , , bias"), inputs=inputs))
    assert _tokens(rewritten) == {
        "q": "L",
        "k": "L",
        "c": "L",
        "c_for_y": 1,
        "x_for_y": 1,
        "o": 1,
        "s": 1,
    }


def test_a_mask_is_looked_at_once() -> None:
    again = "e = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x, , mask)\n"
    body = again + ATTENTION.format(rest=", , mask").replace("(x, w)", "(e, w)")
    rewritten = _rewritten(_model(body, inputs="float[B, L, 8] x, int32[B, L] mask"))
    kinds = [node.op_type for node in rewritten.graph]
    assert kinds.count("ReduceMin") == 1
    assert kinds.count("If") == 2


def test_a_reshape_there_and_back_is_dropped() -> None:
    body = """
        there = Reshape (x, heads)
        back = Reshape (there, flat)
        r = Relu (back)
        y = Gather <axis = 1> (r, i)
    """
    inputs = "float[3, 5, 8] x"
    model = _model(
        "heads = Constant <value_ints = [3, 5, 2, 4]> () flat = Constant <value_ints = [3, 5, 8]> ()" + body,
        inputs=inputs,
        outputs="float[3, 8] y",
    )
    assert [node.op_type for node in _rewritten(model).graph].count("Reshape") == 0


# Whether the head of each reads the first token alone.
@pytest.mark.parametrize(
    ("family", "head", "first"),
    [
        ("bert", "SequenceClassification", True),
        pytest.param("roberta", "SequenceClassification", True, marks=pytest.mark.slow),
        pytest.param("electra", "SequenceClassification", True, marks=pytest.mark.slow),
        pytest.param("distilbert", "SequenceClassification", True, marks=pytest.mark.slow),
        pytest.param("modernbert", "SequenceClassification", True, marks=pytest.mark.slow),
        pytest.param("bert", "TokenClassification", False, marks=pytest.mark.slow),
    ],
)
def test_the_last_layer_computes_what_the_head_reads(
    family: str,
    head: str,
    first: bool,
    build: Callable[..., Any],
    inputs: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = build(family, head)
    folder = export_onnx(model, tokenizer, tmp_path / "model")
    graph = onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx")).graph
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    activations = [node.output[0] for node in graph.node if node.op_type == "Gelu"]
    per_token = [dims[name] for name in activations if len(dims.get(name, [])) == 3 and dims[name][2] >= 48]
    assert per_token[0][1] != 1
    assert (per_token[-1][1] == 1) == first
    x = inputs(3, 13)
    with torch.inference_mode():
        expected = model(**accepted_inputs(model, x)).logits
    got = load(folder)(**x).logits
    if expected.ndim == 3:
        expected, got = expected[x["attention_mask"]], got[x["attention_mask"]]
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
