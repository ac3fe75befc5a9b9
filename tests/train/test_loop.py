"""The loop inside one process; other processes are in test_processes.py."""

import math
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastdistil.train.loop
from fastdistil.errors import RunError
from fastdistil.train.config import ScheduleConfig
from fastdistil.train.logging import read_metrics
from fastdistil.train.loop import lr_factor
from fastdistil.train.run import run


def weights(output: Path, name: str = "student") -> dict[str, torch.Tensor]:
    return load_file(output / name / "model.safetensors")


def projection(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / "student" / f"checkpoint-{step}" / "projections.safetensors")


def test_the_schedule_warms_up_and_ends_near_zero():
    linear = [lr_factor(step, 20, ScheduleConfig(name="linear", warmup=0.2)) for step in range(20)]
    assert linear[:4] == [0.25, 0.5, 0.75, 1.0]
    assert linear[4] == 1.0
    assert linear[12] == pytest.approx(0.5)
    assert linear[19] == pytest.approx(1 / 16)
    cosine = [lr_factor(step, 20, ScheduleConfig(name="cosine", warmup=0)) for step in range(20)]
    assert cosine[0] == 1.0
    assert cosine[10] == pytest.approx(0.5)
    assert cosine[19] == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 20))
    assert lr_factor(19, 20, ScheduleConfig(name="constant", warmup=0.1)) == 1.0


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_accumulation_gives_the_same_update_as_one_big_batch(distil, tmp_path, positions):
    """Sequences of different lengths, so micro-batches have different counts: a mean of means would differ.

    Adam divides by the gradient's size, which would amplify the rounding of those near zero: hence the eps.
    """
    outputs = []
    for micro in (8, 2):
        config = distil(
            f"run.micro_batch_size={micro}",
            f"objectives.0.positions={positions}",
            "student.dropout=0",
            "optimizer.eps=0.01",
            "data.max_length=19",
            "run.steps=3",
            output=tmp_path / f"micro-{micro}",
        )
        run(config)
        outputs.append(weights(config.output))
    for name, value in outputs[0].items():
        torch.testing.assert_close(
            value, outputs[1][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_accumulation_gives_the_same_update_for_objectives_of_layers(relate, layer_objectives, tmp_path):
    """And the same projection. Tolerances as above."""
    outputs = []
    for micro in (8, 2):
        config = relate(
            *layer_objectives,
            f"run.micro_batch_size={micro}",
            "student.dropout=0",
            "optimizer.eps=0.01",
            "data.max_length=19",
            "run.steps=3",
            output=tmp_path / f"micro-{micro}",
        )
        run(config)
        outputs.append(weights(config.output) | projection(config.output, 3))
    assert outputs[0].keys() == outputs[1].keys()
    for name, value in outputs[0].items():
        torch.testing.assert_close(
            value, outputs[1][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_what_was_tapped_of_the_teacher_is_gone_when_the_next_micro_batch_comes(relate, monkeypatch):
    tapped = []
    original = fastdistil.train.loop.tap_teacher

    def spy(*arguments, **keywords):
        assert [reference() for reference in tapped] == [None] * len(tapped)
        taps = original(*arguments, **keywords)
        (states,) = taps.attention.values()
        tapped.extend(weakref.ref(getattr(states, name)) for name in ("query", "key", "value"))
        return taps

    monkeypatch.setattr(fastdistil.train.loop, "tap_teacher", spy)
    run(relate("run.steps=2"))
    assert len(tapped) == 3 * 2 * 2


def test_a_run_with_a_projection_goes_on_exactly_after_a_crash(
    relate, layer_objectives, tmp_path, monkeypatch
):
    """With dropout; the crash is in the fourth step, the checkpoint of the second."""
    keys = [*layer_objectives, "student.dropout=0.1"]
    whole = relate(*keys, output=tmp_path / "whole")
    run(whole)

    calls = 0
    original = fastdistil.train.loop.tap_teacher

    def crashing(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == 2 * 3 + 1:
            raise SystemExit
        return original(*arguments, **keywords)

    config = relate(*keys, output=tmp_path / "crashed")
    monkeypatch.setattr(fastdistil.train.loop, "tap_teacher", crashing)
    with pytest.raises(SystemExit):
        run(config)
    monkeypatch.undo()
    resumed = run(config, resume=True)
    expected = weights(whole.output) | projection(whole.output, 6)
    ours = weights(config.output) | projection(config.output, 6)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, ours[name]), name
    # A run that is resumed after its end reads the projection again for the table.
    assert run(config, resume=True).models[-1].scores == resumed.models[-1].scores


def test_the_log_has_the_unweighted_terms_and_their_weighted_sum(distil):
    config = distil()
    result = run(config)
    records = read_metrics(config.output / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    for r in steps:
        assert r["loss"] == pytest.approx(5 * r["kd"] + 2 * r["ce"] + r["cosine"], rel=1e-5)
        assert r["phase"] == "student"
        assert 8 * 14 * r["step"] < r["tokens"] <= 8 * 16 * r["step"]  # a few sequences have padding
        assert r["tokens_per_s"] > 0
    held_out = [r["step"] for r in records if "held_out_loss" in r]
    assert held_out == [0, 3, 6]
    assert [m.name for m in result.models] == ["teacher", "student"]


def test_the_teacher_has_no_dropout_and_is_not_changed(distil, monkeypatch):
    modes = []
    original = fastdistil.train.loop.tap_teacher

    def spy(model, *arguments, **keywords):
        modes.append((model.training, {p.requires_grad for p in model.parameters()}))
        return original(model, *arguments, **keywords)

    monkeypatch.setattr(fastdistil.train.loop, "tap_teacher", spy)
    config = distil("run.steps=2")
    before = load_file(Path(config.teacher) / "model.safetensors")
    result = run(config)
    assert modes == [(False, {False})] * 4
    for name, value in load_file(Path(config.teacher) / "model.safetensors").items():
        assert torch.equal(value, before[name])
    assert result.models[1].train_steps == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(distil):
    config = distil("optimizer.lr=1e30", "optimizer.max_grad_norm=1e30")
    with pytest.raises(RunError, match=r"loss or gradient is not finite within the 1 steps before step \d"):
        run(config)
    for file in config.output.rglob("model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())


def test_ctrl_c_saves_nothing_that_is_not_finite(distil, monkeypatch):
    """Inside of a step, before the log has read the loss of the one before it."""
    calls = 0
    original = fastdistil.train.loop.tap_teacher

    def interrupting(*arguments, **keywords):
        nonlocal calls
        if calls == 2 * 3:
            os.kill(os.getpid(), signal.SIGINT)
        calls += 1
        return original(*arguments, **keywords)

    monkeypatch.setattr(fastdistil.train.loop, "tap_teacher", interrupting)
    seldom = ("run.log_every=100", "run.eval_every=100", "run.checkpoint_every=100")
    config = distil("optimizer.lr=1e38", "optimizer.max_grad_norm=1e30", *seldom)
    with pytest.raises(RunError, match=r"not finite within the 4 steps before step 4 .*in another --output"):
        run(config)
    assert not list(config.output.rglob("model.safetensors"))


@pytest.mark.parametrize("micro_step", [0, 1], ids=["inside a step", "at the end of a step"])
def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on_exactly(
    distil, tmp_path, monkeypatch, micro_step
):
    whole = distil(output=tmp_path / "whole")
    run(whole)

    calls = 0
    original = fastdistil.train.loop.tap_teacher

    def interrupting(*arguments, **keywords):
        nonlocal calls
        if calls == 2 * 3 + micro_step:  # two micro-batches a step
            os.kill(os.getpid(), signal.SIGINT)
        calls += 1
        return original(*arguments, **keywords)

    monkeypatch.setattr(fastdistil.train.loop, "tap_teacher", interrupting)
    config = distil("run.checkpoint_every=100", output=tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert calls == 2 * 3 + micro_step + 1
    saved = list((config.output / "checkpoints" / "student").iterdir())
    assert [p.name for p in saved] == [f"checkpoint-{3 + micro_step}"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    run(config, resume=True)
    for name, value in weights(whole.output).items():
        assert torch.equal(value, weights(config.output)[name]), name
    tokens = [read_metrics(c.output / "metrics.jsonl")[-2]["tokens"] for c in (whole, config)]
    assert tokens[0] == tokens[1]
