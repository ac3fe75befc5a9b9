"""Kill -9 at any moment, resume, and nothing of the result differs from a run that was never touched."""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistil.cli import main
from fastdistil.train.logging import read_metrics

PHASES = ("teacher", "student", "baseline")


@pytest.fixture(scope="module")
def command(corpus: Path, teacher_folder: Path, overrides: list[str]) -> list[str]:
    """Three phases with dropout and a checkpoint every other step."""
    sizes = ["num_layers=4", "hidden_size=32", "num_attention_heads=2", "intermediate_size=48", "dropout=0.1"]
    keys = [
        *overrides,
        *(f"new_teacher.{size}" for size in [*sizes, "steps=6"]),
        f"data.tokenizer={teacher_folder}",
        "student.teacher_layers=[0, 3]",
        "student.num_layers=2",
        "student.dropout=0.1",
        "run.steps=6",
    ]
    return ["train", "quickstart", "--corpus", str(corpus), *(a for key in keys for a in ("--set", key))]


def _results(output: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    weights = {phase: (output / phase / "model.safetensors").read_bytes() for phase in PHASES}
    records = [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")}
        for r in read_metrics(output / "metrics.jsonl")
    ]
    return weights, records


def _wait_for_records(output: Path, count: int) -> Callable[[], bool]:
    """True once `count` more lines stand in metrics.jsonl."""
    file = output / "metrics.jsonl"

    def lines() -> int:
        return file.read_bytes().count(b"\n") if file.exists() else 0

    goal = lines() + count
    return lambda: lines() >= goal


def _wait_for_save(output: Path) -> Callable[[], bool]:
    """True while a checkpoint is being written."""
    return lambda: any((output / "checkpoints").glob("*/.writing-*"))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(launch, command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = launch([*command, "--output", str(whole)])
    process.join()
    assert process.exitcode == 0

    rng = random.Random()
    kills = 0
    for attempt in range(8):
        resume = ["--resume"] if (killed / "config.yaml").exists() else []
        process = launch([*command, "--output", str(killed), *resume])
        moment = _wait_for_save(killed) if attempt % 2 else _wait_for_records(killed, rng.randint(0, 9))
        while process.is_alive() and not moment():
            time.sleep(0.0005)
        time.sleep(0 if attempt % 2 else rng.uniform(0, 0.02))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    else:
        process = launch([*command, "--output", str(killed), "--resume"])
        process.join()
        assert process.exitcode == 0
    assert kills > 2

    (weights, records), (expected_weights, expected_records) = _results(killed), _results(whole)
    for phase in PHASES:
        assert weights[phase] == expected_weights[phase], phase
    assert records == expected_records
    results = [json.loads((folder / "results.json").read_text())["models"] for folder in (whole, killed)]
    assert [m["scores"] for m in results[0]] == [m["scores"] for m in results[1]]
    assert not list(killed.rglob(".writing-*"))


def test_the_output_folder_is_guarded(command, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = [*command, "--output", str(output)]

    def fails(arguments: list[str]) -> str:
        assert main(arguments) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert fails([*arguments, "--resume"]) == (
        f"fastdistil: nothing to resume: {output} holds no run; leave out --resume to start one there"
    )
    assert not output.exists()
    short = ["--set", "new_teacher.steps=1", "--set", "run.steps=1"]
    assert main([*arguments, *short]) == 0
    metrics = (output / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert fails([*arguments, *short]) == (
        f"fastdistil: output {output} already holds this run: "
        "add --resume to go on with it or choose another --output"
    )
    assert "already holds another run (recipe quickstart)" in fails([*arguments, *short, "--set", "seed=1"])
    assert "cannot resume" in (line := fails([*arguments, *short, "--set", "optimizer.eps=1e-3", "--resume"]))
    assert "optimizer.eps was 1e-06, is 0.001" in line
    assert (output / "metrics.jsonl").read_bytes() == metrics

    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").touch()
    assert "is not empty and holds no run" in fails([*command, "--output", str(occupied)])
    assert "is a file, not a folder" in fails([*command, "--output", str(occupied / "thesis.txt")])
    assert [p.name for p in occupied.iterdir()] == ["thesis.txt"]
