"""What `fastdistil export` does: every format, and every refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdistil.compress.registry import find_method
from fastdistil.compress.store import load
from fastdistil.errors import UserError
from fastdistil.export.folder import read_exported
from fastdistil.export.model import FORMATS, ExportResult, export_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


def test_onnx(source: Path, tmp_path: Path) -> None:
    result = export_model(source, "onnx", tmp_path / "out", max_length=16)
    assert result.max_error < 1e-5
    assert result.agreement == 1.0
    assert result.bytes == (tmp_path / "out" / "model.onnx").stat().st_size
    assert result.source_bytes == (source / "model.safetensors").stat().st_size
    assert [label for label, _ in result.rows()] == [
        "exported to",
        "parameters",
        "largest error",
        "size on disk",
        f"latency, 1 × 16 tokens, {result.threads} thread" + ("s" if result.threads > 1 else ""),
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"fastdistil export {source} --format onnx --output {tmp_path / 'out'}\n" in card
    assert f"| {result.rows()[2][0]} | {result.rows()[2][1]} |" in card


def test_what_is_larger_and_slower_is_told_so() -> None:
    result = ExportResult(Path("out"), "onnx", 1000, 6_000_000, 2_000_000, 0.0, None, 3.0, 6.0, 16, 1)
    told = dict(result.rows())
    assert told["size on disk"] == "2.0 MB -> 6.0 MB, 3.0× larger"
    assert told["latency, 1 × 16 tokens, 1 thread"] == "3.00 ms -> 6.00 ms, 2.0× slower"


def test_int8_of_a_float_onnx_folder(onnx_folder: Path, tmp_path: Path) -> None:
    result = export_model(onnx_folder, "onnx-int8", tmp_path / "out", max_length=16)
    exported = read_exported(tmp_path / "out")
    assert exported is not None
    assert exported.quantized == "dynamic"
    assert result.source_bytes == (onnx_folder / "model.onnx").stat().st_size
    assert 0 < result.max_error < 0.5


@pytest.mark.slow
def test_int8_of_a_pytorch_folder(source: Path, tmp_path: Path) -> None:
    result = export_model(source, "onnx-int8", tmp_path / "out", max_length=16)
    assert load(result.path).exported.quantized == "dynamic"


@pytest.mark.parametrize("format", ["onnx", "executorch"])
def test_what_is_exported_is_not_exported_again(format: str, onnx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"for onnxruntime already, which cannot become {format}"):
        export_model(onnx_folder, format, tmp_path / "out")


def test_int8_of_int8_onnx(int8_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is in int8 already"):
        export_model(int8_folder, "onnx-int8", tmp_path / "out")


@pytest.fixture
def int8_embeddings(source: Path, tokenizer: Any, tmp_path: Path) -> Path:
    model = find_method("int8-embeddings").apply(load(source), None, None)
    model.save_pretrained(tmp_path / "embeddings")
    tokenizer.save_pretrained(tmp_path / "embeddings")
    return tmp_path / "embeddings"


@pytest.mark.parametrize(
    ("format", "bound"), [("onnx", 1e-5), pytest.param("onnx-int8", 0.5, marks=pytest.mark.slow)]
)
def test_replaced_modules(format: str, bound: float, int8_embeddings: Path, tmp_path: Path) -> None:
    result = export_model(int8_embeddings, format, tmp_path / "out", max_length=16)
    assert result.max_error < bound
    assert "replacements" not in json.loads((tmp_path / "out" / "config.json").read_text())["fastdistil"]


@pytest.mark.parametrize("format", FORMATS)
def test_int8_modules(format: str, source: Path, tokenizer: Any, tmp_path: Path) -> None:
    method = find_method("int8")
    model = method.apply(load(source), method.options(backend="torchao"), None)
    folder = tmp_path / "int8"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="is in int8 already; export the float model that it was made of"):
        export_model(folder, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown format 'tflite'; the formats are onnx, onnx-int8, execu"):
        export_model(source, "tflite", tmp_path / "out")


def test_an_opset_for_executorch(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="opset is ONNX's"):
        export_model(source, "executorch", tmp_path / "out", opset=18)


def test_an_output_that_is_there_already(source: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(UserError, match="exists"):
        export_model(source, "onnx", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_a_source_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        export_model(tmp_path / "nothing", "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
