"""Exported models behind the face of a PyTorch model: scored, measured, saved and loaded like one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdistil.compress.store import load
from fastdistil.data.task_batches import read_task_batch
from fastdistil.data.task_encoding import encode
from fastdistil.data.tasks import Examples, find_task
from fastdistil.errors import UserError
from fastdistil.evaluate.cost import measure_latency
from fastdistil.evaluate.task import evaluate_task

pytest.importorskip("onnxruntime")


def test_task_scores_equal_pytorch(bert: Any, onnx_folder: Path, tokenizer: Any) -> None:
    task = find_task("mnli")  # three classes, and pairs, so that token types count
    texts = [("a b c", "d e"), ("f", "g h i j"), ("k l m n o p", "q"), ("r s", "t u v")]
    examples = Examples([*texts, *((b, a) for a, b in texts)], np.arange(8) % 3)
    data = encode(task, examples, tokenizer, 16)
    exported = load(onnx_folder)
    assert evaluate_task(exported, task, data) == evaluate_task(bert, task, data)
    inputs = read_task_batch(data, np.arange(8)).inputs
    torch.testing.assert_close(exported(**inputs).logits, bert(**inputs).logits, rtol=0, atol=1e-5)


def test_latency_is_measured_beside_pytorch(bert: Any, onnx_folder: Path) -> None:
    times = measure_latency({"a": bert, "b": load(onnx_folder)}, batch_sizes=(1, 2), length=16, runs=2)
    assert [(t.batch_size, t.length) for t in times["b"]] == [(1, 16), (2, 16)]
    assert all(t.p50_ms > 0 for t in times["b"])


def test_saved_and_loaded_again_it_is_bit_equal(
    int8_folder: Path, inputs: Callable[..., Any], tmp_path: Path
) -> None:
    model, given = load(int8_folder), inputs(3, 13)
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(load(tmp_path / "copy")(**given).logits, model(**given).logits)


def test_saved_config_says_the_same(int8_folder: Path, tmp_path: Path) -> None:
    load(int8_folder).save_pretrained(tmp_path / "copy")
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "copy", int8_folder))
    assert ours == theirs


def test_threads_are_those_of_torch_until_set(
    bert: Any, onnx_folder: Path, inputs: Callable[..., Any]
) -> None:
    model, given = load(onnx_folder), inputs(2, 9)
    assert model.threads == torch.get_num_threads()
    assert load(onnx_folder, threads=2).threads == 2
    before = model(**given).logits
    model.set_threads(2)
    assert model.threads == 2
    torch.testing.assert_close(model(**given).logits, before, atol=1e-6, rtol=0)


def test_threads_rest_between_passes(onnx_folder: Path) -> None:
    """Else they would take the processor from the model that is measured next."""
    options = load(onnx_folder, threads=2)._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_parameters_are_counted_as_of_pytorch(bert: Any, onnx_folder: Path) -> None:
    assert load(onnx_folder).num_parameters_ == sum(p.numel() for p in bert.parameters())


def test_it_is_in_eval_mode(onnx_folder: Path) -> None:
    assert not load(onnx_folder).training


def test_a_missing_file_is_named(onnx_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx_folder, tmp_path / "model")
    (folder / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"model\.onnx, which its config.json names, is missing"):
        load(folder)


def test_a_torn_file_is_one_line(onnx_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx_folder, tmp_path / "model")
    file = folder / "model.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"^\S*model.onnx cannot be read by ONNX Runtime [^\n]+$"):
        load(folder)


def test_a_config_with_nonsense_is_one_line(onnx_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx_folder, tmp_path / "model")
    file = folder / "config.json"
    plain = json.loads(file.read_text())
    plain["fastdistil"] = {"runtime": "onnxruntime"}
    file.write_text(json.dumps(plain))
    with pytest.raises(UserError, match="does not describe an exported model"):
        load(folder)
