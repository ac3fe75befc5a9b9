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

from fastdistil.compare import single
from fastdistil.compare.search import compress_for_target
from fastdistil.compare.single import CompressResult, Side, begin, compress_model
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


def test_a_task_of_ones_own_is_a_file(finetuned: Callable[[str], Path], tasks: Path, tmp_path: Path) -> None:
    file = tmp_path / "mood.yaml"
    file.write_text("columns: [sentence]\nlabels: [negative, positive]\nmetrics: [macro_f1]\n")
    result = compress_model(
        str(finetuned("sst2")),
        "kd+prune-ffn:0.5",
        tmp_path / "out",
        task=str(file),
        data=str(tasks / "sst2"),
        overrides=["kd.student.num_layers=2", "train.run.steps=2", "train.run.precision=fp32"],
        say=lambda text: None,
    )
    assert result.before.scores is not None
    assert result.before.scores["macro_f1"] > 0.7
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert f"--task {file}" in card


def _weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def other_encoder(task_encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(task_encoder, tmp_path / "other"))


def test_a_finished_model_is_not_replaced_by_another(
    task_encoder: Path, other_encoder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    compress_model(str(task_encoder), "prune-ffn:0.5", output)
    first = _weights(output)
    for source, method, more, change in (
        (task_encoder, "bf16", {}, "chain was 'prune-ffn:0.5', is 'bf16'"),
        (other_encoder, "prune-ffn:0.5", {}, f"model was '{task_encoder}', is '{other_encoder}'"),
        (task_encoder, "prune-ffn:0.5", {"seed": 1}, "seed was 0, is 1"),
        (
            task_encoder,
            "prune-ffn:0.5",
            {"overrides": ["prune-ffn.recover=false"]},
            "steps.0.recover was {}, is None",
        ),
    ):
        message = f"output {output} holds the finished model of another command: {change}; choose another --o"
        with pytest.raises(UserError, match=re.escape(message)):
            compress_model(str(source), method, output, **more)
    assert _weights(output) == first
    assert compress_model(f"{task_encoder}/", "prune-ffn:0.5", output).chain == "prune-ffn:0.5"
    assert _weights(output) == first


def test_what_was_interrupted_may_become_another_model(task_encoder: Path, tmp_path: Path) -> None:
    begin(tmp_path / "out", str(task_encoder), {"chain": "bf16"})
    compress_model(str(task_encoder), "prune-ffn:0.5", tmp_path / "out")
    with pytest.raises(UserError, match=r"chain was 'prune-ffn:0\.5', is 'bf16'"):
        compress_model(str(task_encoder), "bf16", tmp_path / "out")


def test_a_search_goes_on_in_its_own_folder_alone(task_encoder: Path, tmp_path: Path) -> None:
    searched, made = tmp_path / "searched", tmp_path / "made"
    for folder, making in ((searched, {"chain": "a search"}), (made, {"chain": "bf16"})):
        begin(folder, str(task_encoder), making)
        (folder / "result.json").write_text("{}")
    begin(searched, str(task_encoder), {"chain": "a search"})
    with pytest.raises(UserError, match="chain was 'bf16', is 'a search'"):
        begin(made, str(task_encoder), {"chain": "a search"})
    with pytest.raises(UserError, match="chain was 'a search', is 'bf16'"):
        compress_model(str(task_encoder), "bf16", searched)


def test_a_folder_whose_chain_is_not_known_is_told_by_its_source(task_encoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compress_model(str(task_encoder), "bf16", output)
    (output / "compress.json").write_text(json.dumps({"model": str(task_encoder)}))
    compress_model(str(task_encoder), "bf16", output)
    (output / "compress.json").write_text(json.dumps({"model": "another"}))
    with pytest.raises(UserError, match=f"model was 'another', is '{task_encoder}'"):
        compress_model(str(task_encoder), "bf16", output)


def test_a_copy_that_was_killed_is_not_published(task_encoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    begin(output, str(task_encoder), {"chain": "bf16"})
    (output / ".writing-model").mkdir()
    (output / ".writing-model" / "stale.safetensors").touch()
    compress_model(str(task_encoder), "bf16", output)
    assert not (output / "model" / "stale.safetensors").exists()
    assert not (output / ".writing-model").exists()


@pytest.mark.parametrize("with_task", [False, True])
def test_a_refused_method_leaves_the_folder_free(
    finetuned: Callable[[str], Path], tasks: Path, tmp_path: Path, with_task: bool
) -> None:
    keywords = {"task": "sst2", "data": str(tasks)} if with_task else {}
    with pytest.raises(UserError, match="num_layers is 99"):
        compress_model(str(finetuned("sst2")), "prune-layers:99", tmp_path / "out", **keywords)
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_made_is_kept_where_a_later_one_is_refused(
    finetuned: Callable[[str], Path], tasks: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="num_layers is 99"):
        compress_model(
            str(finetuned("sst2")),
            "prune-ffn:0.5+prune-layers:99",
            tmp_path / "out",
            task="sst2",
            data=str(tasks),
            overrides=["prune-ffn.recover=false", "prune-layers.recover=false"],
            say=lambda text: None,
        )
    assert len(list(tmp_path.glob("out/models/*/seed-0/step.json"))) == 1


@pytest.mark.parametrize("name", ["model", "run/checkpoints"])
def test_what_was_trained_is_kept_where_its_end_is_refused(
    finetuned: Callable[[str], Path],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    trained = tmp_path / "out" / "models" / "int8-0" / "seed-0" / name

    def train_and_refuse(*_: object) -> None:
        trained.mkdir(parents=True)
        raise UserError("no backend of int8 works here")

    monkeypatch.setattr(single, "run_chain", train_and_refuse)
    with pytest.raises(UserError, match="no backend"):
        compress_model(str(finetuned("sst2")), "int8", tmp_path / "out", task="sst2", data=str(tasks))
    assert trained.is_dir()


def test_a_model_that_is_larger_and_slower_is_told_so() -> None:
    sides = Side(1000, 2_000_000, 3.0, None, None), Side(1000, 10_000_000, 6.0, None, None)
    told = dict(CompressResult(Path("out"), "int8", 128, *sides, []).rows())
    assert told["size on disk"] == "2.0 MB -> 10.0 MB, 5.0× larger"
    assert told["latency, 1 × 128 tokens, one thread"] == "3.0 ms -> 6.0 ms, 2.0× slower"


def test_the_home_folder_is_spelled_out(
    task_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(task_encoder, tmp_path / "encoder")
    monkeypatch.setenv("HOME", str(tmp_path))
    result = compress_model("~/encoder", "bf16", Path("~/out"))
    assert result.path == tmp_path / "out" / "model"
    card = (result.path / "README.md").read_text()
    assert f"fastdistil compress {tmp_path}/encoder --method bf16 --seed 0 --output {tmp_path}/out" in card
