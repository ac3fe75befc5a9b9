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


@pytest.mark.slow
def test_two_processes_with_accumulation_give_the_update_of_one_big_batch(
    distil, corpus, teacher_folder, overrides, tmp_path
):
    """Tolerances and eps as in test_loop.py."""
    exact = ["student.dropout=0", "optimizer.eps=0.01", "data.max_length=19", "run.steps=3"]
    one = distil(*exact, "run.micro_batch_size=8", output=tmp_path / "one")
    run(one)

    two = tmp_path / "two"
    sizes = ["student.num_layers=2", "student.teacher_layers=null", "run.micro_batch_size=2"]
    keys = [*overrides, *exact, *sizes]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "fastdistil", "train", "distilbert", "--output", str(two)]
    files = ["--teacher", str(teacher_folder), "--corpus", str(corpus)]
    process = subprocess.run(
        [*launcher, *command, *files, *(a for key in keys for a in ("--set", key))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(fastdistil.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr

    expected, weights = (load_file(folder / "student" / "model.safetensors") for folder in (one.output, two))
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    checkpoint = two / "checkpoints" / "student" / "checkpoint-3"
    assert (checkpoint / "rng-1.safetensors").exists()
    assert "rng-1.safetensors" in json.loads((checkpoint / "state.json").read_text())["sha256"]
    # One process writes, and what it writes covers both.
    records, single = (read_metrics(folder / "metrics.jsonl") for folder in (two, one.output))
    assert [(r["phase"], r["step"]) for r in records] == [(r["phase"], r["step"]) for r in single]
    for a, b in zip(records, single, strict=True):
        assert a.get("tokens") == b.get("tokens")
        for key in ("loss", "kd", "ce", "cosine", "held_out_loss"):
            torch.testing.assert_close(a.get(key, 0.0), b.get(key, 0.0), rtol=1e-5, atol=1e-6)
