"""Exported ONNX models answer what PyTorch answers, at any batch size and length."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil.compress.registry import find_method
from fastdistil.compress.replacements import replacements
from fastdistil.compress.store import load
from fastdistil.errors import RunError, UserError
from fastdistil.export.folder import read_exported
from fastdistil.export.onnx import export_onnx
from fastdistil.models.taps import accepted_inputs

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

ATOL = 1e-5  # of outputs of about 1, summed in another order
# One text; an odd length and padding; the longest that the model has positions for, but for RoBERTa.
SHAPES = [(1, 3), (3, 13), (8, 39)]


def _difference(model: Any, exported: Any, inputs: dict[str, torch.Tensor], name: str) -> float:
    with torch.inference_mode():
        expected = getattr(model(**accepted_inputs(model, inputs)), name)
    got = getattr(exported(**inputs), name)
    mask = inputs["attention_mask"]
    if expected.shape[:2] == mask.shape:
        expected, got = expected[mask], got[mask]
    return float((expected - got).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_pytorch(bert: Any, onnx_folder: Path, inputs: Callable[..., Any], shape: Any) -> None:
    assert _difference(bert, load(onnx_folder), inputs(*shape), "logits") < ATOL


# RoBERTa counts positions from the padding id, DistilBERT has no types, ModernBERT windows and rotations.
@pytest.mark.parametrize(
    "family", ["modernbert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("roberta", "distilbert"))]
)
def test_other_families_equal_pytorch(
    family: str, build: Callable[..., Any], inputs: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = build(family)
    exported = load(export_onnx(model, tokenizer, tmp_path / "model"))
    assert _difference(model, exported, inputs(3, 13), "logits") < ATOL


@pytest.mark.parametrize(
    ("head", "name"),
    [("", "last_hidden_state"), pytest.param("QuestionAnswering", "end_logits", marks=pytest.mark.slow)],
)
def test_other_outputs_equal_pytorch(
    head: str,
    name: str,
    build: Callable[..., Any],
    inputs: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = build("bert", head)
    exported = load(export_onnx(model, tokenizer, tmp_path / "model"))
    assert _difference(model, exported, inputs(3, 13), name) < ATOL


@pytest.mark.slow
def test_choices_equal_pytorch(
    build: Callable[..., Any], inputs: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = build("bert", "MultipleChoice")
    exported = load(export_onnx(model, tokenizer, tmp_path / "model"))
    flat = inputs(6, 13)
    options = {name: value.unflatten(0, (2, 3)) for name, value in flat.items()}  # of two examples
    with torch.inference_mode():
        expected = model(**options).logits
    torch.testing.assert_close(exported(**options).logits, expected, atol=ATOL, rtol=0)


def test_layers_with_different_numbers_of_heads(
    build: Callable[..., Any], inputs: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Of the second layer's four heads of width 8, one is left."""
    model = build("bert")
    layer = model.bert.encoder.layer[1].attention
    for linear in (layer.self.query, layer.self.key, layer.self.value):
        linear.weight = torch.nn.Parameter(linear.weight[:8].clone())
        linear.bias = torch.nn.Parameter(linear.bias[:8].clone())
    layer.output.dense.weight = torch.nn.Parameter(layer.output.dense.weight[:, :8].clone())
    layer.self.num_attention_heads, layer.self.all_head_size = 1, 8
    exported = load(export_onnx(model, tokenizer, tmp_path / "model"))
    assert _difference(model, exported, inputs(3, 13), "logits") < ATOL


@pytest.mark.parametrize("method", ["cluster", pytest.param("prune-magnitude", marks=pytest.mark.slow)])
def test_weights_in_a_code(
    method: str, build: Callable[..., Any], inputs: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """They are plain in the file, and in a code still in the model."""
    how = find_method(method)
    options = how.options()
    model = how.finish(how.apply(build("bert"), options, None), options)
    before = replacements(model)
    exported = load(export_onnx(model, tokenizer, tmp_path / "model"))
    assert _difference(model, exported, inputs(3, 13), "logits") < ATOL
    assert replacements(model) == before != []


def test_layers_that_share_weights_have_them_once(
    build: Callable[..., Any], inputs: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = build("bert")
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    folder = export_onnx(model, tokenizer, tmp_path / "model")
    assert _difference(model, load(folder), inputs(3, 13), "logits") < ATOL
    matrices = [i for i in onnx.load(folder / "model.onnx").graph.initializer if list(i.dims) == [32, 48]]
    assert len(matrices) == 1


def test_without_mask_and_types_are_ones_and_zeros(
    bert: Any, onnx_folder: Path, inputs: Callable[..., Any]
) -> None:
    ids = inputs(2, 9)["input_ids"]
    with torch.inference_mode():
        expected = bert(input_ids=ids).logits
    torch.testing.assert_close(load(onnx_folder)(ids).logits, expected, atol=ATOL, rtol=0)


@pytest.mark.slow
def test_standard_operators_alone(bert: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = export_onnx(bert, tokenizer, tmp_path / "model", optimize=False)
    graph = onnx.load(folder / "model.onnx").graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}


def test_attention_is_one_node_a_layer_with_padding_and_one_without(onnx_folder: Path) -> None:
    nodes = onnx.load(onnx_folder / "model.onnx").graph.node
    choices = [node for node in nodes if node.op_type == "If"]
    inputs = [
        [len(node.input) for node in branch.g.node if node.op_type == "MultiHeadAttention"]
        for node in choices
        for branch in sorted(node.attribute, key=lambda attribute: attribute.name)
    ]
    assert inputs == [[5], [3], [5], [3]]  # else, then
    assert not {"Softmax", "MultiHeadAttention"} & {node.op_type for node in nodes}


def test_padding_changes_nothing(onnx_folder: Path, inputs: Callable[..., Any]) -> None:
    """Without it the attention has no mask."""
    exported, alone = load(onnx_folder), inputs(1, 13)
    assert alone["attention_mask"].all()
    padded = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in alone.items()}
    torch.testing.assert_close(exported(**alone).logits, exported(**padded).logits, atol=ATOL, rtol=0)


def test_nothing_tells_where_it_was_made(onnx_folder: Path) -> None:
    assert str(Path(__file__).parents[2]).encode() not in (onnx_folder / "model.onnx").read_bytes()


def test_axes_have_names(onnx_folder: Path) -> None:
    graph = onnx.load(onnx_folder / "model.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["attention_mask"] == ["batch", "length"]
    assert shapes["logits"] == ["batch", 3]


@pytest.mark.slow
def test_opset_is_the_one_asked_for(bert: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = export_onnx(bert, tokenizer, tmp_path / "model", opset=18)
    (version,) = [o.version for o in onnx.load(folder / "model.onnx").opset_import if o.domain == ""]
    assert version == 18


def test_folder_says_what_it_is(bert: Any, onnx_folder: Path) -> None:
    exported = read_exported(onnx_folder)
    assert exported is not None
    assert exported.parameters == sum(p.numel() for p in bert.parameters())
    assert (exported.runtime, exported.quantized, exported.agreement) == ("onnxruntime", None, 1.0)
    assert exported.max_error is not None
    assert exported.max_error < ATOL
    assert {"config.json", "model.onnx", "tokenizer.json"} == {
        file.name for file in onnx_folder.iterdir() if file.name != "tokenizer_config.json"
    }


def test_the_model_is_left_as_it_was(
    build: Callable[..., Any], inputs: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = build("bert").train()
    before = model.config._attn_implementation
    export_onnx(model, tokenizer, tmp_path / "model")
    assert model.training
    assert model.config._attn_implementation == before
    with torch.inference_mode():
        assert model.eval()(**inputs(2, 9)).logits.isfinite().all()


@pytest.mark.parametrize("opset", [17, 99])
def test_an_opset_out_of_range(opset: int, bert: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"opset must be between 18 and .*, got {opset}"):
        export_onnx(bert, tokenizer, tmp_path / "model", opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_opset_newer_than_the_exporter(bert: Any, tokenizer: Any, tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(UserError, match=f"opset {newest} is newer"):
        export_onnx(bert, tokenizer, tmp_path / "model", opset=newest)
    assert not list(tmp_path.iterdir())


def test_a_model_that_the_exporter_refuses(
    build: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("bert")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return hidden if float(hidden.sum()) > 0 else -hidden  # the trace has no value to decide by

    monkeypatch.setattr(model.classifier, "forward", forward)
    with pytest.raises(
        UserError, match=r"^BertForSequenceClassification cannot be exported to ONNX: [^\n]+$"
    ):
        export_onnx(model, tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_module_that_is_no_model_of_transformers(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Linear cannot be exported"):
        export_onnx(torch.nn.Linear(2, 2), tokenizer, tmp_path / "model")


def test_a_folder_that_is_there_already(bert: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(UserError, match="exists"):
        export_onnx(bert, tokenizer, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_outputs_that_differ_leave_nothing(
    build: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is traced with other weights than it answers with."""
    from fastdistil.export import onnx as export

    model, write = build("bert"), export._write

    def write_and_change(*arguments: Any) -> None:
        write(*arguments)
        model.classifier.bias.data += 0.01

    monkeypatch.setattr(export, "_write", write_and_change)
    with pytest.raises(RunError, match=r"differ from the model's by 0\.01, more than 0\.001"):
        export_onnx(model, tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_no_numbers_are_an_error() -> None:
    from fastdistil.export.verify import _compare

    rows = torch.ones(2, 3)
    broken = rows.clone()
    broken[1, 2] = torch.nan
    pairs = [([rows], [broken], True), ([rows], [rows], True)]
    assert math.isnan(_compare(pairs).max_error)
