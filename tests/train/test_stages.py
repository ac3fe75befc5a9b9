"""Recipes in stages: what each starts from, what it trains, what it takes over, and how it is resumed."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import fastdistil.train.loop
import fastdistil.train.task_run
from fastdistil.errors import UserError
from fastdistil.models.stack import embedding_parameters, layer_parameters
from fastdistil.train.config import load_config
from fastdistil.train.logging import METRICS, read_metrics
from fastdistil.train.run import run

# The second stage is more than an epoch, for which the teacher is asked beforehand.
STEPS = ("stages.0.run.steps=4", "stages.1.run.steps=7", "run.checkpoint_every=2")


def weights(output: Path, name: str) -> dict[str, Tensor]:
    return load_file(output / name / "model.safetensors")


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """`theirs` may leave out the second name of a tied weight, as model folders do."""
    assert ours.keys() >= theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.fixture
def tinybert(on_task: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *more, **keywords: on_task("tinybert-task:no-augmentation", *STEPS, *more, **keywords)


def test_each_stage_has_its_folder_and_the_second_starts_from_the_first(tinybert, phases):
    result = run(tinybert())
    assert list(phases) == ["intermediate", "student", "baseline"]
    assert_equal(phases["student"]["weights"], weights(result.output, "intermediate"))
    assert [m.name for m in result.models] == ["teacher", "student", "baseline"]
    # The student's cost is that of both stages.
    assert [m.train_steps for m in result.models] == [None, 4 + 7, 7]
    ends = {r["phase"]: r for r in read_metrics(result.output / METRICS) if "tokens" in r}
    assert result.models[1].train_tokens == ends["intermediate"]["tokens"] + ends["student"]["tokens"]
    assert result.models[2].train_tokens == ends["baseline"]["tokens"]
    # The baseline is without both stages: it starts where the first one does.
    assert_equal(phases["baseline"]["weights"], phases["intermediate"]["weights"])
    # Nothing of the first stage reads the classifier.
    first = phases["intermediate"]["weights"]
    assert torch.equal(
        weights(result.output, "intermediate")["classifier.weight"], first["classifier.weight"]
    )
    assert not torch.equal(weights(result.output, "student")["classifier.weight"], first["classifier.weight"])


def test_each_stage_learns_by_its_own_objectives_rate_and_schedule(tinybert):
    config = tinybert("optimizer.lr=7e-4", "stages.1.optimizer.lr=2e-4")
    run(config)
    records = [r for r in read_metrics(config.output / METRICS) if "loss" in r]
    terms = {"intermediate": {"attention", "hidden", "embeddings"}, "student": {"kd"}, "baseline": {"task"}}
    for phase, names in terms.items():
        for r in (r for r in records if r["phase"] == phase):
            found = r.keys() - {"phase", "step", "loss", "lr", "tokens", "seconds", "tokens_per_s"}
            assert found == names
            assert r["loss"] == pytest.approx(sum(r[name] for name in names), rel=1e-5)
    rates = {phase: [r["lr"] for r in records if r["phase"] == phase] for phase in terms}
    assert rates["intermediate"] == pytest.approx([7e-4] * 4)
    # 0.1 of 7 steps to warm up, then a straight line to zero.
    straight = [2e-4 * min(1, (7 - step) / 6.3) for step in range(7)]
    assert rates["student"] == pytest.approx(straight)
    assert rates["baseline"] == pytest.approx(straight)


def test_a_phase_that_is_finished_is_not_trained_again(tinybert, phases, capsys):
    config = tinybert()
    first = run(config)
    phases.clear()
    capsys.readouterr()
    again = run(config, resume=True)
    assert not phases
    assert "intermediate: finished before" in capsys.readouterr().err
    assert [m.scores for m in again.models] == [m.scores for m in first.models]
    assert [m.train_tokens for m in again.models] == [m.train_tokens for m in first.models]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe of stages, given as mappings, and gives its path."""

    def write(*stages: dict[str, Any], **more: Any) -> str:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({"run": {"steps": 2}, "stages": list(stages), **more}))
        return str(file)

    return write


HIDDEN = {"name": "hidden", "layers": "uniform"}
PREDICTION = {"name": "prediction", "kd_weight": 1, "temperature": 1}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def assert_layer_by_layer(phases: dict[str, dict[str, Any]], output: Path, names: list[str]) -> None:
    """Phase n trains layer n, the first one the embeddings too, and no more; each starts from the last."""
    for layer, name in enumerate(names):
        before, after = phases[name]["weights"], weights(output, name)
        if layer:
            assert_equal(before, weights(output, names[layer - 1]))
        model = phases[name]["phase"].model
        own = [*layer_parameters(model, layer), *(embedding_parameters(model) if layer == 0 else [])]
        expected = {n for n, p in model.named_parameters() if any(p is q for q in own)}
        assert changed(before, after) == expected
        assert len(expected) > 10


def test_a_layerwise_stage_trains_one_layer_after_the_other(
    recipe, corpus, encoder_folder, overrides, tmp_path, phases
):
    transfer = {"name": "attention_transfer", "distance": "kl", "layers": "uniform"}
    first = {"name": "transfer", "reads": "text", "layerwise": True, "objectives": [HIDDEN, transfer]}
    second = {"name": "whole", "reads": "text", "objectives": [{"name": "cosine"}]}
    keys = [*overrides, "student.num_layers=3", "student.init=random", "student.architecture=same"]
    file = recipe(first, second, masking=None)
    files = {"teacher": str(encoder_folder), "corpus": str(corpus), "output": tmp_path / "run"}
    config = load_config(file, keys, **files)
    run(config)
    names = ["transfer-layer-1", "transfer-layer-2", "transfer"]
    assert list(phases) == [*names, "student"]
    assert_layer_by_layer(phases, config.output, names)
    assert_equal(phases["student"]["weights"], weights(config.output, "transfer"))
    # Each layer learns from its own pair alone: of 3 layers of a teacher of 4, these are 1, 2 and 4.
    for layer, (name, theirs) in enumerate(zip(names, (0, 1, 3), strict=True)):
        for objective in phases[name]["phase"].objectives:
            assert objective.pairs == ((layer, theirs),)


def test_mobilebert_is_transferred_layer_by_layer_and_then_distilled(
    corpus, teacher_folder, overrides, tmp_path, phases
):
    keys = [
        *overrides,
        "student.num_layers=2",
        "student.mobilebert={bottleneck_size: 16, num_feedforward_networks: 2, embedding_size: 16}",
        "run.steps=2",
        "stages.0.run.steps=2",
    ]
    files = {"teacher": str(teacher_folder), "corpus": str(corpus), "output": tmp_path / "run"}
    result = run(load_config("mobilebert", keys, **files))
    names = ["transfer-layer-1", "transfer"]
    assert list(phases) == [*names, "student"]
    # The head is the teacher's and tied to the embeddings, which the first phase trains.
    assert_layer_by_layer(phases, result.output, names)
    assert_equal(phases["student"]["weights"], weights(result.output, "transfer"))
    records = [r for r in read_metrics(result.output / METRICS) if "loss" in r]
    assert [(r["phase"], r["step"]) for r in records] == [
        (name, step) for name in [*names, "student"] for step in (1, 2)
    ]
    for r in records[:4]:
        terms = ("feature_map", "feature_mean", "feature_variance", "attention")
        found = [next(r[name] for name in r if name.startswith(term)) for term in terms]
        loss = 100 * found[0] + 5000 * found[1] + 5 * found[2] + found[3]
        assert r["loss"] == pytest.approx(loss, rel=1e-4)
    for r in records[4:]:
        assert r["loss"] == pytest.approx(0.5 * r["kd"] + 0.5 * r["ce"], rel=1e-5)
    assert [m.name for m in result.models] == ["teacher", "student"]


def test_a_layer_without_a_pair_is_named_before_its_stage_is_trained(
    recipe, corpus, encoder_folder, overrides, tmp_path, phases
):
    skip = {"name": "hidden", "layers": "skip"}
    file = recipe(
        {"name": "transfer", "reads": "text", "layerwise": True, "objectives": [skip]}, masking=None
    )
    keys = [*overrides, "student.num_layers=2"]
    files = {"teacher": str(encoder_folder), "corpus": str(corpus), "output": tmp_path / "run"}
    with pytest.raises(
        UserError, match="student: no objective of this layerwise stage has a pair for layer 2"
    ):
        run(load_config(file, keys, **files))
    assert not phases


def test_text_first_and_a_task_after_it(
    recipe, corpus, finetuned, task_encoder, tasks, task_keys, tmp_path, phases
):
    """The first stage learns from the encoder before it was fine-tuned, which a stage may name."""
    general = {
        "name": "general",
        "reads": "text",
        "teacher": str(task_encoder),
        "objectives": [HIDDEN],
        "data": {"corpus": str(corpus), "max_length": 16},
    }
    prediction = {"name": "prediction", "reads": "task", "objectives": [PREDICTION]}
    keys = [*task_keys, "student.num_layers=2", "student.architecture=same"]
    files = {"teacher": str(finetuned("sst2")), "task": "sst2", "data": str(tasks)}
    file = recipe(general, prediction, masking=None, baseline=True)
    result = run(load_config(file, keys, output=tmp_path / "run", **files))
    assert list(phases) == ["general", "student", "baseline"]
    assert "classifier.weight" not in weights(result.output, "general")
    for name, value in weights(result.output, "general").items():
        assert torch.equal(phases["student"]["weights"][f"bert.{name}"], value), name
    assert_equal(phases["baseline"]["weights"], phases["student"]["weights"])
    teacher = load_file(task_encoder / "model.safetensors")
    taught = phases["general"]["phase"].teacher.state_dict()
    name = "encoder.layer.3.output.dense.weight"
    assert torch.equal(taught[name], teacher[name])
    assert [m.name for m in result.models] == ["teacher", "student", "baseline"]


@pytest.mark.parametrize(
    ("length", "other", "message"),
    [
        (64, None, "data.max_length is 64, but .* has only 40 positions"),
        (16, "teacher_folder", "teacher and student have different tokenizers"),
    ],
)
def test_what_does_not_fit_a_stage_on_text_is_named_before_the_task_is_read(
    recipe, corpus, finetuned, tasks, task_keys, tmp_path, monkeypatch, request, length, other, message
):
    data = {"corpus": str(corpus), "max_length": length}
    general = {"name": "general", "reads": "text", "objectives": [HIDDEN], "data": data}
    if other is not None:
        general["teacher"] = str(request.getfixturevalue(other))
    prediction = {"name": "prediction", "reads": "task", "objectives": [PREDICTION]}
    file = recipe(general, prediction, masking=None)
    files = {"teacher": str(finetuned("sst2")), "task": "sst2", "data": str(tasks)}
    config = load_config(file, [*task_keys, "student.num_layers=2"], output=tmp_path / "run", **files)
    monkeypatch.setattr(fastdistil.train.task_run, "TaskData", None)
    with pytest.raises(UserError, match=message):
        run(config)


def test_a_run_of_two_stages_that_crashes_in_either_goes_on_exactly(tinybert, tmp_path, monkeypatch):
    """With the teacher's dropout, and a step after the last checkpoint that is lost."""
    whole = tinybert(output=tmp_path / "whole")
    assert whole.student.dropout is None
    run(whole)
    original = fastdistil.train.loop.tap
    config = tinybert(output=tmp_path / "crashed")
    resume = False
    for crash in (4, 2 + 4):  # in step 4 of stage one; then, resumed from step 2, in step 4 of stage two
        calls = 0

        def crashing(*arguments: Any, crash: int = crash, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == crash:
                raise SystemExit
            return original(*arguments, **keywords)

        monkeypatch.setattr(fastdistil.train.loop, "tap", crashing)
        with pytest.raises(SystemExit):
            run(config, resume=resume)
        resume = True
    monkeypatch.undo()
    assert (config.output / "intermediate").exists()
    assert not (config.output / "student").exists()
    run(config, resume=True)
    assert_same_run(whole.output, config.output)


def assert_same_run(whole: Path, other: Path) -> None:
    for name in ("intermediate", "student", "baseline"):
        assert_equal(weights(other, name), weights(whole, name))
    timing = ("seconds", "tokens_per_s")
    ours, theirs = (
        [{k: v for k, v in r.items() if k not in timing} for r in read_metrics(folder / METRICS)]
        for folder in (other, whole)
    )
    assert ours == theirs
    results = [json.loads((folder / "results.json").read_text())["models"] for folder in (whole, other)]
    assert [m["scores"] for m in results[0]] == [m["scores"] for m in results[1]]


@pytest.mark.slow
def test_a_run_of_two_stages_that_is_killed_ends_with_the_same_bits(
    launch, tasks, task_keys, finetuned, tmp_path
):
    """Within each stage, between them, and while a checkpoint is written."""
    keys = [*task_keys, *STEPS, "student.num_layers=2", "student.dropout=0.1", "optimizer.lr=1e-3"]
    files = ["--teacher", str(finetuned("sst2")), "--task", "sst2", "--data", str(tasks)]
    command = ["train", "tinybert-task:no-augmentation", *files, *(a for key in keys for a in ("--set", key))]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = launch([*command, "--output", str(whole)])
    process.join()
    assert process.exitcode == 0

    def has_record(phase: str, step: int) -> Callable[[], bool]:
        def there() -> bool:
            file = killed / METRICS
            records = read_metrics(file) if file.exists() else []
            return any(r["phase"] == phase and r["step"] == step and "loss" in r for r in records)

        return there

    moments = [
        has_record("intermediate", 3),
        lambda: (killed / "intermediate").exists(),
        has_record("student", 1),
        lambda: any((killed / "checkpoints" / "student").glob(".writing-*")),
    ]
    kills = 0
    for moment in [*moments, lambda: False]:
        resume = ["--resume"] if (killed / "config.yaml").exists() else []
        process = launch([*command, "--output", str(killed), *resume])
        while process.is_alive() and not moment():
            time.sleep(0.0005)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    assert kills >= 3
    assert_same_run(whole, killed)
    assert not list(killed.rglob(".writing-*"))
