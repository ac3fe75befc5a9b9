"""Chains of real steps on a tiny task: what they make, keep, repeat and refuse."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil.compare import chain as chain_module
from fastdistil.compare.chain import ChainContext, chain_record, mean_task_loss, run_chain, step_folder
from fastdistil.compare.steps import parse_chain
from fastdistil.compress.store import load
from fastdistil.data.tasks import find_task
from fastdistil.errors import UserError
from fastdistil.models.task import load_task_model

Context = Callable[..., ChainContext]


@pytest.fixture
def context(
    finetuned: Callable[[str], Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Context:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(task: str = "sst2", **more: Any) -> ChainContext:
        return ChainContext(
            teacher=str(finetuned(task)),
            task=find_task(task),
            data=str(tasks),
            output=tmp_path / "out",
            max_length=24,
            **more,
        )

    return make


QUICK = ["train.run.steps=3", "train.run.batch_size=8", "train.run.precision=fp32"]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Recipes of the training runs that were begun."""
    begun = []
    train = chain_module._train

    def spy(config: Any, *more: Any) -> Path:
        begun.append(config.recipe)
        return train(config, *more)

    monkeypatch.setattr(chain_module, "_train", spy)
    return begun


def test_a_chain_distils_prunes_and_recovers(context: Context, trainings: list[str]) -> None:
    ctx = context()
    chain = parse_chain(
        "kd+prune-ffn:0.5", [*QUICK, "kd.student.num_layers=2", "kd.student.teacher_layers=[0,1]"]
    )
    folder = run_chain(chain, ctx)
    model, _ = load_task_model(folder, ctx.task, new_head=False)
    assert model.config.num_hidden_layers == 2
    assert model.config.intermediate_size == 24
    assert trainings == ["kd", "recover"]
    kept = {path.name for path in folder.parent.iterdir()}
    assert {"model", "step.json", "run"} <= kept
    assert "start" not in kept
    assert chain_record(chain, ctx).seconds > 0


def test_recovery_starts_from_what_was_pruned_and_changes_it(context: Context) -> None:
    ctx = context()
    without = run_chain(parse_chain("prune-heads:0.5", ["prune-heads.recover=false"]), ctx)
    recovered = run_chain(parse_chain("prune-heads:0.5", QUICK), ctx)
    first, second = (load(folder).state_dict() for folder in (without, recovered))
    assert {name: weight.shape for name, weight in first.items()} == {
        name: weight.shape for name, weight in second.items()
    }
    name = "bert.encoder.layer.0.attention.self.query.weight"
    # Three steps at a small rate: near what they started from, and no longer it.
    assert torch.allclose(first[name], second[name], atol=1e-3)
    assert not torch.equal(first[name], second[name])


def test_steps_are_trained_and_not_scored_and_their_teacher_is_scored_once(context: Context) -> None:
    said: list[str] = []
    ctx = context(say=said.append)
    folder = run_chain(parse_chain("prune-ffn:0.5+prune-heads:0.5", QUICK), ctx)
    run = folder.parent / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records
    assert not any("held_out" in key for record in records for key in record)
    assert not (run / "results.json").exists()
    assert sum(text.startswith("teacher ") for text in said) == 1

    said.clear()
    run_chain(parse_chain("prune-width:0.5", QUICK), context(say=said.append, teacher_is_checked=True))
    assert not any(text.startswith("teacher ") for text in said)


def test_a_finished_chain_is_not_made_again(context: Context, trainings: list[str]) -> None:
    ctx = context()
    chain = parse_chain("prune-ffn:0.5", QUICK)
    folder = run_chain(chain, ctx)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert run_chain(chain, ctx) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert trainings == ["recover"]


def test_chains_share_their_common_beginning(context: Context, trainings: list[str]) -> None:
    ctx = context()
    run_chain(parse_chain("prune-ffn:0.5", QUICK), ctx)
    run_chain(parse_chain("prune-ffn:0.5+prune-heads:0.5", QUICK), ctx)
    assert trainings == ["recover", "recover"]


@pytest.mark.parametrize(
    ("texts", "seeds"),
    [
        (["prune-ffn:0.5", "prune-ffn:0.25"], (0, 0)),
        (["prune-ffn:0.5", "prune-ffn:0.5"], (0, 1)),
    ],
)
def test_what_decides_the_model_names_its_folder(
    context: Context, texts: list[str], seeds: tuple[int, int]
) -> None:
    folders = {step_folder(parse_chain(t), context(), s) for t, s in zip(texts, seeds, strict=True)}
    assert len(folders) == 2


def test_an_interrupted_step_goes_on(
    context: Context, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context()
    chain = parse_chain("prune-ffn:0.5", QUICK)
    unbroken = run_chain(chain, ctx)
    expected = load(unbroken).state_dict()
    shutil.rmtree(unbroken.parent)
    finish = chain_module.save_model

    def stop(model: Any, tokenizer: Any, folder: Path) -> None:
        if folder.name == "model":
            raise KeyboardInterrupt
        finish(model, tokenizer, folder)

    with monkeypatch.context() as patch:
        patch.setattr(chain_module, "save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            run_chain(chain, ctx)
    folder = run_chain(chain, ctx)
    found = load(folder).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_structure_alone_has_the_shapes_and_no_training(context: Context, trainings: list[str]) -> None:
    ctx = context()
    overrides = [*QUICK, "kd.student.num_layers=2", "kd.student.teacher_layers=[0,1]"]
    chain = parse_chain("kd+prune-ffn:0.5", overrides)
    structure = load(run_chain(chain, ctx, train=False))
    assert trainings == []
    trained = load(run_chain(chain, ctx))
    shapes = [{n: w.shape for n, w in model.state_dict().items()} for model in (structure, trained)]
    assert shapes[0] == shapes[1]


def test_calibration_has_training_examples_and_the_tasks_loss(context: Context) -> None:
    ctx = context(calibration_examples=20)
    model, _ = load_task_model(ctx.teacher, ctx.task, new_head=False)
    calibration = ctx.calibration()
    assert sum(len(batch.labels) for batch in calibration.batches) == 20
    batch = calibration.batches[0]
    logits = model(**batch.inputs).logits.double()
    by_hand = torch.nn.functional.cross_entropy(logits, batch.labels)
    torch.testing.assert_close(calibration.loss(model, batch).double(), by_hand, rtol=1e-5, atol=1e-6)


def test_mean_loss_of_a_regression_is_the_squared_error(context: Context) -> None:
    ctx = context("stsb")
    model, _ = load_task_model(ctx.teacher, ctx.task, new_head=False)
    batch = ctx.calibration().batches[0]
    by_hand = (model(**batch.inputs).logits.squeeze(-1) - batch.labels).square().mean()
    torch.testing.assert_close(mean_task_loss(model, batch), by_hand)


def test_nothing_follows_a_model_for_another_runtime(context: Context) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(
        UserError, match=r"prune-ffn:0\.5: .*model is a model for onnxruntime already, which can only run"
    ):
        run_chain(parse_chain("int8:onnxruntime+prune-ffn:0.5", ["prune-ffn.recover=false"]), context())


def test_steps_of_a_recovery_reach_the_methods_that_ask(context: Context) -> None:
    ctx = context()
    folder = run_chain(parse_chain("prune-movement:0.5", ["recover.run.epochs=2", *QUICK[1:]]), ctx)
    steps = json.loads((folder.parent / "step.json").read_text())
    assert steps["chain"] == "prune-movement:0.5"
    # 45 examples in batches of 8, twice.
    metrics = (folder.parent / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in metrics) == 12
    weight = load(folder).bert.encoder.layer[0].output.dense.weight
    assert 0.3 < (weight == 0).double().mean() < 0.7


def test_a_weak_teacher_is_learnt_from_only_where_that_is_allowed(
    context: Context, task_encoder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    ctx = context()
    model, tokenizer = load_task_model(task_encoder, ctx.task, new_head=True)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "weak")
    chain = parse_chain("prune-ffn:0.5", QUICK)
    refused = replace(ctx, teacher=str(tmp_path / "weak"))
    with pytest.raises(UserError, match="there is nothing to learn from it"):
        run_chain(chain, refused)
    assert (run_chain(chain, replace(refused, allow_weak_teacher=True)) / "config.json").is_file()
