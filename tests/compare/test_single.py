"""`fastdistil compress` of one model: with a task and without, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from fastdistil.compare.search import compress_for_target
from fastdistil.compare.single import compress_model
from fastdistil.compress.store import load
from fastdistil.errors import UserError


def test_without_a_task_the_weights_are_only_compressed(task_encoder: Path, tmp_path: Path) -> None:
    result = compress_model(str(task_encoder), "prune-ffn:0.5", tmp_path / "out")
    model = AutoModel.from_pretrained(result.path, add_pooling_layer=False)
    assert model.config.intermediate_size == 24
    before, after = result.before, result.after
    # 24 of 48 neurons of 4 layers: a row and a bias of one matrix, a column of the other.
    assert before.parameters - after.parameters == 4 * 24 * (2 * 32 + 1)
    assert after.disk_bytes < before.disk_bytes
    assert ("quality", "not measured, and nothing was trained: give --task") in result.rows()


def test_with_a_task_both_models_are_scored(
    finetuned: Callable[[str], Path], tasks: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(finetuned("sst2"), teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n")
    result = compress_model(
        str(teacher),
        "prune-heads:0.5",
        tmp_path / "out",
        task="sst2",
        data=str(tasks),
        overrides=["recover.run.steps=2", "recover.run.precision=fp32"],
        say=lambda text: None,
    )
    assert result.before.score is not None
    assert result.before.score > 0.7
    plain = json.loads((tmp_path / "out" / "result.json").read_text())
    assert plain["after"]["scores"] == result.after.scores
    assert load(tmp_path / "out" / "model").config.fastdistil["replacements"]
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "--method prune-heads:0.5 --task sst2" in card
    assert "license: mit" in card


def test_the_same_command_again_makes_nothing_again(
    finetuned: Callable[[str], Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastdistil.train.run as train_run

    def once() -> dict[str, Any]:
        result = compress_model(
            str(finetuned("sst2")),
            "prune-ffn:0.5",
            tmp_path / "out",
            task="sst2",
            data=str(tasks),
            overrides=["recover.run.steps=2", "recover.run.precision=fp32"],
            say=lambda text: None,
        )
        return dict(load(result.path).state_dict())

    first = once()
    monkeypatch.setattr(train_run, "run", lambda *_, **__: pytest.fail("trained again"))
    second = once()
    assert all(torch.equal(second[name], weight) for name, weight in first.items())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kd", "kd trains a student for a task: add --task NAME"),
        ("prune-movement", "prune-movement learns in the recovery which weights to keep"),
        ("low-rank:0.5:3", "low-rank.ratio"),
    ],
)
def test_what_needs_a_task_says_so(task_encoder: Path, tmp_path: Path, method: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compress_model(str(task_encoder), method, tmp_path / "out")


def test_models_of_somebody_else_are_left_alone(task_encoder: Path, tmp_path: Path) -> None:
    """Folders called model/ and models/ are common; only what this command began may be replaced."""
    for name in ("model/mine.py", "models/mine.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no compressed model"):
        compress_model(str(task_encoder), "prune-ffn", tmp_path)
    with pytest.raises(UserError, match="is not empty and holds no search"):
        compress_for_target(str(task_encoder), "sst2", None, tmp_path, 2.0)
    assert (tmp_path / "model" / "mine.py").read_text() == "mine"


def test_half_precision_stays_unless_weights_are_rounded_further(task_encoder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModel.from_pretrained(task_encoder, dtype=torch.bfloat16, add_pooling_layer=False).save_pretrained(
        half
    )
    AutoTokenizer.from_pretrained(task_encoder).save_pretrained(half)
    pruned = compress_model(str(half), "prune-ffn:0.5", tmp_path / "pruned")
    assert load(pruned.path).dtype == torch.bfloat16
    rounded = compress_model(str(half), "int8-embeddings", tmp_path / "rounded")
    assert load(rounded.path).encoder.layer[0].output.dense.weight.dtype == torch.float32


def test_nothing_is_done_to_an_exported_model(task_encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    exported = compress_model(str(task_encoder), "onnx", tmp_path / "onnx")
    with pytest.raises(UserError, match=r"prune-ffn:0\.5: .*model is a model for onnxruntime already"):
        compress_model(str(exported.path), "prune-ffn:0.5", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="what int8:onnxruntime makes is a model for onnxruntime already"):
        compress_model(str(task_encoder), "int8:onnxruntime+prune-ffn:0.5", tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("prune-ffn:0.5", "recover.run.epoch=1", "unknown key run.epoch: did you mean run.epochs?"),
        ("prune-ffn:0.5+kd", "kd.run.epochs=-1", "run.epochs: input should be greater than 0"),
    ],
)
def test_a_wrong_key_of_a_training_is_told_before_anything_is_made(
    finetuned: Callable[[str], Path], tasks: Path, tmp_path: Path, method: str, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compress_model(
            str(finetuned("sst2")),
            method,
            tmp_path / "out",
            task="sst2",
            data=str(tasks),
            overrides=[override],
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(task_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no compressed model"):
        compress_model(str(task_encoder), "prune-ffn", tmp_path)
