"""A teacher's answers, asked for once: they are what it says, and a student learns the same from them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertForMultipleChoice

import fastdistil.train.answers
import fastdistil.train.loop
import fastdistil.train.task_run
from fastdistil.data.task_batches import read_task_batch
from fastdistil.data.task_encoding import encode
from fastdistil.data.tasks import Examples, find_task
from fastdistil.train.answers import ask_once
from fastdistil.train.cache import write_aside
from fastdistil.train.run import run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of examples of each time that a teacher is asked beforehand."""
    numbers: list[int] = []
    original = fastdistil.train.answers._ask

    def spy(teacher: Any, data: Any, examples: Any, *arguments: Any) -> None:
        numbers.append(len(examples))
        original(teacher, data, examples, *arguments)

    monkeypatch.setattr(fastdistil.train.answers, "_ask", spy)
    return numbers


@pytest.mark.parametrize(("recipe", "layers"), [("kd", ()), ("pkd", (1,)), ("pkd:last", (2,))], ids=str)
def test_a_teacher_is_asked_once_for_all_epochs_and_runs(
    recipe, layers, on_task, asked, monkeypatch, tmp_path, phases
):
    """And the student learns what it does from a teacher that is asked for each batch."""
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    keys = (cache, "student.dropout=0", "optimizer.eps=0.01", "run.steps=8", "baseline=false")
    with monkeypatch.context() as patch:
        patch.setattr(fastdistil.train.loop, "tap_teacher", None)
        once = run(on_task(recipe, *keys, output=tmp_path / "once"))
        teacher = AutoModelForSequenceClassification.from_pretrained(once.models[0].path).eval()
        for batch in phases["student"]["batches"]:
            with torch.no_grad():
                expected = teacher(**batch.inputs, output_hidden_states=True)
            answers = batch.answers
            torch.testing.assert_close(answers.logits, expected.logits, rtol=1e-5, atol=1e-5)
            assert answers.layers == layers
            for place, layer in enumerate(layers):
                first = expected.hidden_states[layer + 1][:, 0]
                torch.testing.assert_close(answers.first[:, place], first, rtol=1e-5, atol=1e-5)
        assert asked == [45]
        run(on_task(recipe, *keys, "seed=1", output=tmp_path / "again"))
        assert asked == [45]

    monkeypatch.setattr(fastdistil.train.task_run.TaskRun, "_answers_suffice", lambda *arguments: False)
    each = run(on_task(recipe, *keys, output=tmp_path / "each"))
    ours, theirs = (load_file(r.output / "student" / "model.safetensors") for r in (once, each))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_of_a_part_of_an_epoch_only_what_is_read_is_asked(on_task, asked, monkeypatch, tmp_path, phases):
    """Once for all runs that read the same; and the student learns what it does from one asked each time."""
    keys = (
        f"data.cache_dir={tmp_path / 'cache'}",
        "student.dropout=0",
        "optimizer.eps=0.01",
        "baseline=false",
    )
    few = (*keys, "run.steps=3", "run.batch_size=8")
    with monkeypatch.context() as patch:
        patch.setattr(fastdistil.train.loop, "tap_teacher", None)
        once = run(on_task("pkd", *few, output=tmp_path / "once"))
        batches = phases["student"]["batches"]
        assert sum(len(batch.labels) for batch in batches) == 24
        assert asked == [24]
        teacher = AutoModelForSequenceClassification.from_pretrained(once.models[0].path).eval()
        for batch in batches:
            with torch.no_grad():
                expected = teacher(**batch.inputs).logits
            torch.testing.assert_close(batch.answers.logits, expected, rtol=1e-5, atol=1e-5)
        run(on_task("pkd", *few, "optimizer.lr=1e-3", output=tmp_path / "another-lr"))
        assert asked == [24]
        run(on_task("pkd", *few, "seed=1", output=tmp_path / "another-order"))
        run(on_task("pkd", *few, "run.steps=6", output=tmp_path / "whole"))
        assert asked == [24, 24, 45]

    monkeypatch.setattr(fastdistil.train.task_run.TaskRun, "_answers_suffice", lambda *arguments: False)
    each = run(on_task("pkd", *few, output=tmp_path / "each"))
    ours, theirs = (load_file(r.output / "student" / "model.safetensors") for r in (once, each))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_hidden_states_of_all_tokens_are_asked_for_with_each_batch(on_task, asked, phases):
    run(on_task("pkd", "objectives.1.tokens=all", "baseline=false"))
    assert asked == []
    assert all(batch.answers is None for batch in phases["student"]["batches"])


def test_the_answers_of_another_teacher_are_not_taken_for_this_ones(on_task, finetuned, tmp_path, phases):
    keys = (f"data.cache_dir={tmp_path / 'cache'}", "baseline=false")
    run(on_task("kd", *keys, output=tmp_path / "one"))
    first = phases["student"]["batches"][0].answers.logits
    other = tmp_path / "other"
    shutil.copytree(finetuned("sst2"), other)
    model = AutoModelForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        model.classifier.weight.mul_(2)
        model.classifier.bias.mul_(2)
    model.save_pretrained(str(other))
    run(on_task("kd", *keys, teacher=other, output=tmp_path / "two"))
    second = phases["student"]["batches"][0].answers.logits
    torch.testing.assert_close(second, 2 * first)
    # The first teacher again, in the folder of the second one.
    shutil.rmtree(other)
    shutil.copytree(finetuned("sst2"), other)
    run(on_task("kd", *keys, teacher=other, output=tmp_path / "three"))
    assert torch.equal(phases["student"]["batches"][0].answers.logits, first)


def test_labels_in_another_order_are_another_teacher(on_task, finetuned, tmp_path, phases):
    """The config alone says so; the weights stay."""
    keys = (f"data.cache_dir={tmp_path / 'cache'}", "baseline=false")
    other = tmp_path / "other"
    shutil.copytree(finetuned("sst2"), other)
    run(on_task("kd", *keys, teacher=other, output=tmp_path / "one"))
    first = phases["student"]["batches"][0].answers.logits
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {"0": "positive", "1": "negative"}
    config["label2id"] = {"positive": 0, "negative": 1}
    (other / "config.json").write_text(json.dumps(config))
    run(on_task("kd", *keys, "allow_weak_teacher=true", teacher=other, output=tmp_path / "two"))
    second = phases["student"]["batches"][0].answers.logits
    torch.testing.assert_close(second, first.flip(1))


def test_what_was_not_written_whole_leaves_nothing(tmp_path):
    def interrupted(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_aside(tmp_path / "kind" / "file", interrupted)
    assert list((tmp_path / "kind").iterdir()) == []


def test_the_options_of_a_choice_have_an_answer_each(make_tiny_bert, tmp_path):
    config, tokenizer = make_tiny_bert(120, 0.2)
    torch.manual_seed(0)
    teacher = BertForMultipleChoice(config).eval()
    task = find_task("dream")
    texts = [(f"a b c{'d' * i}", f"e{'f' * i}", "g", "h i", "j") for i in range(5)]
    data = encode(task, Examples(texts, np.arange(5) % 3), tokenizer, 32)
    silent: Any = SimpleNamespace(say=lambda line: None)
    some = np.array([1, 3, 4])
    answers = ask_once(teacher, "tiny", data, some, (0, 3), dtype=None, cache_dir=tmp_path, log=silent)
    batch = read_task_batch(replace(data, answers=answers), np.array([4, 1]))
    with torch.no_grad():
        expected = teacher(**batch.inputs, output_hidden_states=True)
    assert batch.answers is not None
    assert batch.answers.first is not None
    torch.testing.assert_close(batch.answers.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert batch.answers.first.shape == (6, 2, 32)
    for place, layer in enumerate((0, 3)):
        torch.testing.assert_close(
            batch.answers.first[:, place], expected.hidden_states[layer + 1][:, 0], rtol=1e-5, atol=1e-5
        )


def test_too_many_bytes_are_not_written(on_task, asked, monkeypatch, tmp_path, capsys, phases):
    config = on_task("pkd", "baseline=false", f"data.cache_dir={tmp_path / 'cache'}")
    capsys.readouterr()  # the teacher is fine-tuned here, unless an earlier test asked for it
    monkeypatch.setattr(fastdistil.train.answers, "_MAX_BYTES", 4 * 45 * (2 + 32) - 1)
    run(config)
    assert "it is asked at every batch instead" in capsys.readouterr().err
    assert asked == []
    assert not (tmp_path / "cache" / "teacher-answers").exists()
    assert all(batch.answers is None for batch in phases["student"]["batches"])
    monkeypatch.setattr(fastdistil.train.answers, "_MAX_BYTES", 4 * 45 * (2 + 32))
    run(on_task("pkd", "baseline=false", f"data.cache_dir={tmp_path / 'cache'}", output=tmp_path / "fits"))
    assert asked == [45]
