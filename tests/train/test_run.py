"""Whole runs: what is written, and what is said when something does not fit."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import fastdistil.train.run
from fastdistil.data.corpus import open_corpus
from fastdistil.data.token_store import cached_token_store
from fastdistil.errors import RunError, UserError
from fastdistil.train.config import RunConfig, load_config
from fastdistil.train.logging import METRICS, RunLog, read_metrics
from fastdistil.train.objective_config import describe
from fastdistil.train.prepare import prepare_data
from fastdistil.train.run import run


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
    assert teacher.scores.keys() == distilled.scores.keys() == {"loss", "accuracy", "perplexity"}
    text = (result.output / "results.md").read_text()
    for m in result.models:
        assert f"| {m.name} | {m.layers} × 32 | " in text
        assert f"| {m.scores['loss']:.4f} | {m.scores['accuracy']:.2%} |" in text
    assert (result.output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_minilm_makes_an_encoder_and_reports_its_distance_to_the_teacher(relate):
    config = relate("run.eval_sequences=1000")
    result = run(config)
    model, info = AutoModel.from_pretrained(result.output / "student", output_loading_info=True)
    assert type(model).__name__ == "DistilBertModel"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(result.output / "student").mask_token_id is not None
    card = (result.output / "student" / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "license: unknown" in card
    assert "AutoModel.from_pretrained" in card

    teacher, before, after = result.models
    assert [m.name for m in result.models] == ["teacher", "before training", "student"]
    assert (teacher.scores, teacher.path, before.path) == ({}, config.teacher, None)
    assert (before.train_steps, after.train_steps) == (None, 6)
    assert before.parameters == after.parameters
    # The curve begins and ends where the table does: both are on all held-out text.
    curve = [r for r in read_metrics(result.output / METRICS) if "held_out_query_relation" in r]
    assert [r["step"] for r in curve] == [0, 3, 6]
    for term in ("query_relation", "key_relation", "value_relation"):
        assert curve[0][f"held_out_{term}"] == pytest.approx(before.scores[term], rel=1e-5)
        assert curve[-1][f"held_out_{term}"] == pytest.approx(after.scores[term], rel=1e-5)
        assert 0 < after.scores[term] < before.scores[term]
    text = (result.output / "results.md").read_text()
    assert "| model | layers × width | parameters | query relation | key relation | value relation |" in text
    for m in (before, after):
        cells = " | ".join(f"{value:.4f}" for value in m.scores.values())
        assert f"| {m.name} | 2 × 32 | {m.parameters / 1e6:.2f} M | {cells} |" in text
    assert f"query relation {before.scores['query_relation']:.4f} → " in text
    assert (result.output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_teacher_with_a_head_serves_minilm_as_its_encoder_does(relate, teacher_folder, tmp_path):
    scores = []
    for teacher in (None, teacher_folder):
        config = relate("run.steps=2", output=tmp_path / str(teacher is None))
        if teacher is not None:
            config = config.model_copy(update={"teacher": str(teacher)})
        scores.append(run(config).models[-1].scores)
    assert scores[0] == scores[1]


def test_the_text_is_read_unmasked_where_masking_is_null(relate, monkeypatch):
    seen = []
    original = fastdistil.train.loop.tap_teacher

    def spy(model, inputs, *arguments, **keywords):
        seen.append(inputs["input_ids"])
        return original(model, inputs, *arguments, **keywords)

    monkeypatch.setattr(fastdistil.train.loop, "tap_teacher", spy)
    config = relate("run.steps=2")
    run(config)
    mask_id = AutoTokenizer.from_pretrained(config.teacher).mask_token_id
    assert not any(ids.eq(mask_id).any() for ids in seen)
    seen.clear()
    run(relate("run.steps=2", "masking.probability=0.3", output=config.output.with_name("masked")))
    assert all(ids.eq(mask_id).any() for ids in seen)


def test_learned_projections_are_counted_in_the_scores_and_not_saved_with_the_student(
    relate, layer_objectives
):
    result = run(relate(*layer_objectives))
    _, before, after = result.models
    assert set(before.scores) == {
        "query_relation", "key_relation", "value_relation", "hidden", "embeddings", "attention"
    }  # fmt: skip
    # 6 steps at a rate of 0.01 train a projection: with a fresh one the student would not be nearer.
    assert after.scores["hidden"] < before.scores["hidden"]
    curve = [r for r in read_metrics(result.output / METRICS) if "held_out_hidden" in r]
    assert after.scores["hidden"] == pytest.approx(curve[-1]["held_out_hidden"], rel=0.2)
    assert not [name for name in load_file(result.output / "student" / "model.safetensors") if "proj" in name]
    checkpoint = load_file(result.output / "checkpoints/student/checkpoint-6/projections.safetensors")
    assert [tuple(value.shape) for value in checkpoint.values()] == [(32,), (32, 24)]  # one, shared
    assert result.models[-1].hidden_size == 24


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["objectives.0.teacher_layer=4"],
            "objectives.0.teacher_layer: the teacher has no layer 4, .* 0 to 3",
        ),
        (["objectives.0.student_layer=2"], "objectives.0.student_layer: the student has no layer 2"),
        (["objectives.0.num_heads=5"], r"num_heads must divide the widths .* got 5; these would: 1, 2, 4"),
        (
            ["objectives=[{name: hidden, layers: [[0, 7]]}]"],
            "objectives.0.layers: the teacher has no layer 7",
        ),
        (
            [
                "objectives=[{name: attention_transfer}]",
                "student.init=random",
                "student.num_attention_heads=4",
            ],
            "objectives.0: .* student has 4 heads and the teacher 2: set student.num_attention_heads=2",
        ),
        (
            [
                "objectives=[{name: hidden, projection: false}]",
                "student.init=random",
                "student.hidden_size=16",
            ],
            "objectives.0.projection is false, but the student is 16 wide and the teacher 32",
        ),
        (
            ["objectives=[{name: cosine}]", "student.init=random", "student.hidden_size=16"],
            "student's are 16 wide and the teacher's 32",
        ),
        (
            ["objectives=[{name: embeddings, share_projection: true}]"],
            "objectives.0.share_projection needs an objective hidden with a projection before it",
        ),
    ],
)
def test_objectives_that_do_not_fit_the_models_are_named_before_the_text_is_read(
    relate, keys, message, monkeypatch
):
    monkeypatch.setattr(fastdistil.train.prepare, "prepare_data", None)
    with pytest.raises(UserError, match=message) as caught:
        run(relate(*keys))
    assert "\n" not in str(caught.value)


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


def of_corpus(config: RunConfig, corpus: Path) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"corpus": str(corpus)})})


def test_held_out_text_is_another_split_of_the_folder(distil, corpus, tmp_path):
    folder, lines = tmp_path / "texts", corpus.read_text().splitlines(keepends=True)
    folder.mkdir()
    (folder / "train.txt").write_text("".join(lines[20:]))
    (folder / "validation.txt").write_text("".join(lines[:20]))
    config = of_corpus(distil(f"data.validation={folder}"), folder)
    tokenizer = AutoTokenizer.from_pretrained(config.teacher)
    with RunLog(tmp_path, main=True) as log:
        text = prepare_data(config.data, tokenizer, Accelerator(cpu=True), log)
    lengths = []
    for split in ("validation", "train"):
        part = open_corpus(str(folder), split=split)
        expected = cached_token_store(part, tokenizer, max_length=16, cache_dir=tmp_path)
        lengths.append(expected.meta.num_tokens)
    assert text.held_out.meta.num_tokens == lengths[0] < lengths[1]


@pytest.mark.parametrize("validation", ["texts", "texts/train.txt", "texts/*.txt"])
def test_text_that_is_trained_on_is_not_held_out(distil, corpus, tmp_path, validation):
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(corpus, folder / "train.txt")
    keys = [f"data.validation={tmp_path / validation}", "data.validation_split=train"]
    with pytest.raises(UserError, match=r"data.validation: .*train.txt is text that is trained on, too"):
        run(of_corpus(distil(*keys), folder))


def test_a_stream_is_trained_on_without_preparing_it(distil, corpus, monkeypatch, tmp_path):
    """The hub is not reachable from a test: the documents of a file stand in for its stream."""
    opened = []

    def fake(spec, **keywords):
        opened.append((spec, keywords.get("streaming", False)))
        return open_corpus(spec)

    monkeypatch.setattr(fastdistil.train.prepare, "open_corpus", fake)
    held_out = shutil.copy(corpus, tmp_path / "held-out.txt")
    keys = ["data.streaming=true", f"data.validation={held_out}", "run.steps=2"]
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

    monkeypatch.setattr(fastdistil.train.report, "write_results", full)
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


def test_the_other_losses_are_described_too(relate, layer_objectives):
    assert describe(relate("objectives.0.key_weight=0").objectives) == (
        "loss = 1 · KL(teacher‖student) of Q-Q + 1 · KL(teacher‖student) of V-V relations of the last layer "
        "of the teacher and the last layer of the student "
        "[mean over 4 relation heads and all tokens but padding]; "
        "each mean is over the whole batch of an optimiser step"
    )
    text = describe(relate(*layer_objectives).objectives)
    over = "mean over all tokens but padding and the width, sum over layers: uniform"
    assert f"1 · MSE of hidden states [{over}]" in text
    over = "mean over heads and pairs of tokens, sum over layers: 1←3"
    assert f"1 · MSE of raw attention scores [{over}]" in text


def test_a_mistake_found_before_training_leaves_the_output_free(distil, tmp_path):
    """Not so once something is trained: then the folder holds a run, whatever the user asks for next."""
    with pytest.raises(UserError, match="only 40 positions"):
        run(distil("data.max_length=64"))
    assert not (tmp_path / "run").exists()
    run(distil("run.steps=2"))
    with pytest.raises(UserError, match="already holds another run"):
        run(distil("run.steps=3"))
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
