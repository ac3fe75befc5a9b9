"""Whole runs: what is written, and what is said when something does not fit."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertModel

import fastdistil.train.run
from fastdistil.errors import RunError, UserError
from fastdistil.train.config import load_config
from fastdistil.train.run import describe, run


@pytest.fixture
def encoder_folder(teacher_folder: Path, tmp_path: Path) -> Path:
    """The teacher's encoder in a folder without a head."""
    folder = tmp_path / "encoder"
    shutil.copytree(teacher_folder, folder)
    BertModel.from_pretrained(teacher_folder, add_pooling_layer=False).save_pretrained(str(folder))
    return folder


def test_a_distilled_student_and_its_report_are_written(distil):
    result = run(distil("baseline=true", "run.steps=2"))
    student, baseline = result.output / "student", result.output / "baseline"
    model = AutoModelForMaskedLM.from_pretrained(student)
    assert type(model).__name__ == "DistilBertForMaskedLM"
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert model(**tokenizer("ab cde", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    assert not torch.equal(
        model.vocab_projector.bias, load_file(baseline / "model.safetensors")["vocab_projector.bias"]
    )
    assert "pipeline_tag: fill-mask" in (student / "README.md").read_text()

    assert [m.name for m in result.models] == ["teacher", "student", "baseline"]
    teacher, distilled, alone = result.models
    assert teacher.parameters > distilled.parameters == alone.parameters
    assert (distilled.layers, distilled.train_steps, teacher.train_steps) == (2, 2, None)
    assert teacher.held_out_tokens == distilled.held_out_tokens > 0
    text = (result.output / "results.md").read_text()
    for m in result.models:
        assert f"| {m.name} | {m.layers} × 32 | " in text
        assert f"| {m.loss:.4f} | {m.accuracy:.2%} |" in text
    assert (result.output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_mlm_grows_a_head_first_and_then_trains_everything(encoder_folder, corpus, overrides, tmp_path):
    keys = [*overrides, "run.steps=2", "run.head_warmup_steps=2"]
    result = run(
        load_config("mlm", keys, teacher=str(encoder_folder), corpus=str(corpus), output=tmp_path / "run")
    )
    start = load_file(encoder_folder / "model.safetensors")
    head, model = (load_file(result.output / name / "model.safetensors") for name in ("head", "model"))
    for name, value in start.items():
        assert torch.equal(head[f"bert.{name}"], value), name
    word, transform = "bert.embeddings.word_embeddings.weight", "cls.predictions.transform.dense.weight"
    assert not torch.equal(model[word], head[word])
    assert not torch.equal(model[transform], head[transform])
    loaded = AutoModelForMaskedLM.from_pretrained(result.output / "model")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert [m.name for m in result.models] == ["model"]


def test_a_stream_is_trained_on_without_preparing_it(distil, corpus, monkeypatch):
    """The hub is not reachable from a test: the documents of a file stand in for its stream."""
    from fastdistil.data.corpus import open_corpus

    opened = []

    def fake(spec, **keywords):
        opened.append((spec, keywords["streaming"]))
        return open_corpus(str(corpus))

    monkeypatch.setattr(fastdistil.train.prepare, "open_corpus", fake)
    keys = ["data.streaming=true", f"data.validation={corpus}", "run.steps=2"]
    assert run(distil(*keys)).models[1].train_steps == 2
    assert (str(corpus), True) in opened


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.max_length=64", "data.max_length is 64, but .* has only 40 positions"),
        ("data.streaming=true", "data.streaming needs data.validation"),
        ("student.num_layers=9", "student.num_layers is 9, but the teacher has only 4 layers"),
        ("run.batch_size=4000", None),
    ],
)
def test_what_does_not_fit_the_teacher_or_the_text_is_named(distil, key, message):
    if message is None:  # a batch larger than the corpus is no mistake: it goes round
        assert run(distil(key, "run.micro_batch_size=2000", "run.steps=1")).models[1].train_steps == 1
        return
    with pytest.raises(UserError, match=message):
        run(distil(key))


def test_another_tokenizer_than_the_teachers_is_refused(distil, teacher_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    vocabulary = tokenizer.get_vocab()
    a, b = (token for token, i in vocabulary.items() if i in (20, 21))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    type(tokenizer)(vocab=vocabulary).save_pretrained(str(other))
    with pytest.raises(UserError, match="different tokenizers: token 20 is"):
        run(distil(f"data.tokenizer={other}"))


def test_a_full_disk_outside_a_checkpoint_is_one_line(distil, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")

    monkeypatch.setattr(fastdistil.train.run, "write_results", full)
    config = distil("run.steps=1")
    with pytest.raises(
        RunError, match=r"No space left on device \(results.json\); what was saved in .* is kept"
    ):
        run(config)
    monkeypatch.undo()
    assert run(config, resume=True).models[1].train_steps == 1


def test_the_loss_is_described_with_its_temperature_factor_and_its_means(distil):
    assert describe(distil().objectives) == (
        "loss = 5 · T²·KL(teacher‖student) at T=2 [mean over all tokens but padding] "
        "+ 2 · CE at T=1 [mean over the masked tokens] "
        "+ 1 · (1 − cos) of the last hidden states [mean over all tokens but padding]; "
        "each mean is over the whole batch of an optimiser step"
    )
