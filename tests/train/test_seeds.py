"""Several seeds of a run: each in its folder, mean and deviation over them, and nothing done twice."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastdistil.train.loop
import fastdistil.train.seeds
from fastdistil.cli import main
from fastdistil.errors import UserError
from fastdistil.train.logging import METRICS, read_metrics
from fastdistil.train.seeds import gain, run_seeds


@pytest.fixture
def kd(on_task: Callable[..., Any]) -> Callable[..., Any]:
    """With a student that is drawn from the seed, so that seeds differ in every row but the teacher's."""
    keys = ("student.init=random", "run.steps=12", "optimizer.lr=3e-3")
    return lambda *more, **keywords: on_task("kd", *keys, *more, task="mrpc", **keywords)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The seed of each run, and whether it was resumed."""
    seen: list[tuple[int, bool]] = []
    original = fastdistil.train.seeds.run

    def spy(config: Any, resume: bool) -> Any:
        seen.append((config.seed, resume))
        return original(config, resume=resume)

    monkeypatch.setattr(fastdistil.train.seeds, "run", spy)
    return seen


def scores(output: Path) -> dict[str, np.ndarray]:
    """name -> (runs, 3) accuracy, F1 and retained, from the seeds' own folders."""
    found: dict[str, list[list[float]]] = {}
    for folder in sorted(output.glob("seed-*")):
        for model in json.loads((folder / "results.json").read_text())["models"]:
            row = [*model["scores"].values(), model["retained"]]
            found.setdefault(model["name"], []).append(row)
    return {name: np.array(rows) for name, rows in found.items()}


def test_the_table_has_mean_and_sample_deviation_of_the_seeds_own_results(kd, tmp_path, runs):
    config = kd("seed=3")
    results = run_seeds(config, 3)
    assert runs == [(3, False), (4, False), (5, False)]
    assert [r.output.name for r in results] == ["seed-3", "seed-4", "seed-5"]
    table = (tmp_path / "run" / "results.md").read_text()
    assert table.startswith("# kd on mrpc, 3 seeds\n")
    assert "over the seeds 3, 4, 5" in table
    assert "| model | parameters | accuracy | F1 | retained |" in table
    found = scores(config.output)
    assert found.keys() == {"teacher", "student", "baseline"}
    for name in ("student", "baseline"):
        means, deviations = found[name].mean(0), found[name].std(0, ddof=1)
        assert (deviations > 0).all()
        cells = [f"{mean:.2%} ± {d:.2%}" for mean, d in zip(means, deviations, strict=True)]
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert line.endswith(f" | {' | '.join(cells)} |")
    # The same teacher is scored each time: no deviation to tell.
    assert "±" not in next(line for line in table.splitlines() if line.startswith("| teacher |"))
    plain = json.loads((config.output / "results.json").read_text())
    assert plain["seeds"] == [3, 4, 5]
    assert [[m["name"] for m in run] for run in plain["runs"]] == [["teacher", "student", "baseline"]] * 3


def test_resuming_repeats_no_seed_that_is_finished(kd, runs):
    config = kd("run.steps=2", "baseline=false")
    first, second = run_seeds(config, 2)
    finished = {
        file: (file.stat().st_mtime_ns, file.read_bytes())
        for file in config.output.glob("seed-*/**/*")
        if file.is_file()
    }
    runs.clear()
    again = run_seeds(config, 3, resume=True)
    assert runs == [(2, False)]
    assert [r.models for r in again[:2]] == [first.models, second.models]
    for file, (time, content) in finished.items():
        assert (file.stat().st_mtime_ns, file.read_bytes()) == (time, content)
    assert (config.output / "results.md").read_text().startswith("# kd on mrpc, 3 seeds\n")


def test_a_seed_that_was_interrupted_goes_on(kd, runs, monkeypatch, tmp_path):
    keys = ("run.checkpoint_every=4", "student.dropout=0.1", "baseline=false")
    whole, config = kd(*keys, output=tmp_path / "whole"), kd(*keys, output=tmp_path / "crashed")
    run_seeds(whole, 2)
    original, calls = fastdistil.train.loop.tap, 0

    def crashing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12 + 6:  # in step 6 of the second seed
            raise SystemExit
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(fastdistil.train.loop, "tap", crashing)
        with pytest.raises(SystemExit):
            run_seeds(config, 2)
    assert not (config.output / "results.md").exists()
    runs.clear()
    run_seeds(config, 2, resume=True)
    assert runs == [(1, True)]
    for seed in ("seed-0", "seed-1"):
        ours, theirs = (f / seed / "student" / "model.safetensors" for f in (config.output, whole.output))
        assert ours.read_bytes() == theirs.read_bytes()
    records = read_metrics(config.output / "seed-1" / METRICS)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))


def test_seeds_of_another_configuration_are_not_taken_for_these(kd):
    run_seeds(kd("run.steps=1", "baseline=false"), 2)
    with pytest.raises(
        UserError, match=r"cannot resume .*seed-0 with another configuration: run.steps was 1"
    ):
        run_seeds(kd("run.steps=2", "baseline=false"), 2, resume=True)
    with pytest.raises(UserError, match="seed-0 already holds another run"):
        run_seeds(kd("run.steps=2", "baseline=false"), 2)


def test_the_results_of_a_single_run_are_left_alone(kd, tmp_path, runs):
    config = kd(output=tmp_path / "run")
    config.output.mkdir()
    (config.output / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(UserError, match="holds a run of one seed: choose another --output"):
        run_seeds(config, 2)
    assert not runs


def test_seeds_is_an_option_of_the_command(kd, tasks, task_keys, finetuned, tmp_path, runs, capsys):
    output = tmp_path / "cli"
    keys = [
        *task_keys,
        "student.num_layers=2",
        "student.teacher_layers=null",
        "run.steps=1",
        "baseline=false",
    ]
    files = ["--teacher", str(finetuned("mrpc")), "--task", "mrpc", "--data", str(tasks)]
    sets = [a for key in keys for a in ("--set", key)]
    assert main(["train", "kd", *files, "--output", str(output), "--seeds", "2", *sets]) == 0
    assert runs == [(0, False), (1, False)]
    assert (output / "results.md").exists()
    capsys.readouterr()
    assert main(["train", "kd", *files, "--output", str(output), "--seeds", "1"]) == 2
    assert "--seeds" in capsys.readouterr().err


def test_the_gain_is_taken_seed_by_seed():
    """By hand: differences of 0.02, 0.04 and 0.06."""
    baselines, gains = (0.5, 0.7, 0.6), (0.02, 0.04, 0.06)
    results = [
        [
            SimpleNamespace(name="teacher", scores={"accuracy": 0.9}),
            SimpleNamespace(name="student", scores={"accuracy": base + more}),
            SimpleNamespace(name="baseline", scores={"accuracy": base}),
        ]
        for base, more in zip(baselines, gains, strict=True)
    ]
    assert gain(results) == "The student less the baseline, seed by seed: accuracy +4.00% ± 2.00%."
    assert gain([models[:2] for models in results]) is None
