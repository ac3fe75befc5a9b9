"""Two processes over gloo, started by torchrun as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastdistil
from fastdistil.train.logging import read_metrics
from fastdistil.train.run import run


def _in_two_processes(arguments: list[str], keys: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*launcher, "-m", "fastdistil", "train", *arguments, *(a for key in keys for a in ("--set", key))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(fastdistil.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr


def _assert_same_weights(one: Path, two: Path, file: str) -> None:
    expected, weights = (load_file(folder / file) for folder in (one, two))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


EXACT = ["student.dropout=0", "optimizer.eps=0.01", "data.max_length=19", "run.steps=3"]  # see test_loop.py


@pytest.mark.slow
def test_two_processes_with_accumulation_give_the_update_of_one_big_batch(
    distil, corpus, teacher_folder, overrides, tmp_path
):
    one = distil(*EXACT, "run.micro_batch_size=8", output=tmp_path / "one")
    run(one)

    two = tmp_path / "two"
    sizes = ["student.num_layers=2", "student.teacher_layers=null", "run.micro_batch_size=2"]
    files = ["--output", str(two), "--teacher", str(teacher_folder), "--corpus", str(corpus)]
    _in_two_processes(["distilbert", *files], [*overrides, *EXACT, *sizes])

    _assert_same_weights(one.output, two, "student/model.safetensors")
    checkpoint = two / "checkpoints" / "student" / "checkpoint-3"
    assert (checkpoint / "rng-1.safetensors").exists()
    assert "rng-1.safetensors" in json.loads((checkpoint / "state.json").read_text())["sha256"]
    # One process writes, and what it writes covers both.
    _assert_same_records(one.output, two, ("loss", "kd", "ce", "cosine", "held_out_loss"))


def _assert_same_records(one: Path, two: Path, keys: tuple[str, ...]) -> None:
    records, single = (read_metrics(folder / "metrics.jsonl") for folder in (two, one))
    assert [(r["phase"], r["step"]) for r in records] == [(r["phase"], r["step"]) for r in single]
    for a, b in zip(records, single, strict=True):
        assert a.get("tokens") == b.get("tokens")
        for key in keys:
            torch.testing.assert_close(a.get(key, 0.0), b.get(key, 0.0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_objectives_of_layers_and_their_projection_as_one_does(
    relate, corpus, encoder_folder, overrides, layer_objectives, tmp_path
):
    """The student's last feed-forward network gets no gradient here, which DDP must bear."""
    only = [layer_objectives[0].replace("layers: uniform", "layers: [[0, 1]]"), *layer_objectives[1:]]
    one = relate(*EXACT, *only, "run.micro_batch_size=8", output=tmp_path / "one")
    run(one)

    two = tmp_path / "two"
    files = ["--output", str(two), "--teacher", str(encoder_folder), "--corpus", str(corpus)]
    keys = [*overrides, *EXACT, *only, "student.num_layers=2", "run.micro_batch_size=2"]
    _in_two_processes(["minilm", *files], keys)

    _assert_same_weights(one.output, two, "student/model.safetensors")
    _assert_same_weights(one.output, two, "checkpoints/student/checkpoint-3/projections.safetensors")
    _assert_same_records(one.output, two, ("loss", "value_relation", "hidden", "held_out_hidden"))


@pytest.mark.slow
def test_two_processes_learn_a_task_as_one_does(on_task, tasks, task_keys, tmp_path):
    """An epoch has 6 batches; the fourth of this seed is the one of the 5 examples that are left over.

    One process reads a batch at once, two read its halves in micro-batches of at most 48 tokens: the terms'
    counts differ between processes and between micro-batches.
    """
    exact = ["student.dropout=0", "optimizer.eps=0.01", "run.steps=6", "optimizer.lr=1e-3"]
    one = on_task("pkd", *exact, "task.max_tokens=1000", output=tmp_path / "one")
    run(one)

    two = tmp_path / "two"
    sizes = ["student.num_layers=2", "student.teacher_layers=null", "task.max_tokens=48"]
    files = ["--output", str(two), "--teacher", one.teacher, "--task", "sst2", "--data", str(tasks)]
    _in_two_processes(["pkd", *files], [*task_keys, *sizes, *exact])

    for name in ("student", "baseline"):
        _assert_same_weights(one.output, two, f"{name}/model.safetensors")
    terms = ("loss", "kd", "task", "hidden", "held_out_accuracy")
    _assert_same_records(one.output, two, terms)


@pytest.mark.slow
def test_a_batch_of_one_example_is_the_same_step_for_two_processes(on_task, tasks, task_keys, tmp_path):
    """Both then read the one that there is; its logits are the teacher's, asked once by the first process."""
    exact = ["student.dropout=0", "optimizer.eps=0.01", "run.steps=2", "optimizer.lr=1e-3", "baseline=false"]
    only = ["task.max_examples=9"]
    one = on_task("kd", *exact, *only, output=tmp_path / "one")
    run(one)

    two = tmp_path / "two"
    sizes = ["student.num_layers=2", "student.teacher_layers=null"]
    files = ["--output", str(two), "--teacher", one.teacher, "--task", "sst2", "--data", str(tasks)]
    _in_two_processes(["kd", *files], [*task_keys, *sizes, *exact, *only])
    _assert_same_weights(one.output, two, "student/model.safetensors")
