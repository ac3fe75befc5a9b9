"""BERT's pretraining (recipe bert): the model goes on, is cut or starts anew, and learns both tasks."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, BertForPreTraining, MobileBertForPreTraining

from fastdistil.errors import UserError
from fastdistil.models.load import load_masked_lm
from fastdistil.train.config import load_config
from fastdistil.train.logging import METRICS, read_metrics
from fastdistil.train.run import run

SHARED = Path(__file__).parents[3] / "shared"
ENCODER = SHARED / "models" / "encoder-12x384"
ENWIK8 = SHARED / "data" / "text" / "enwik8"


@pytest.fixture(scope="session")
def documents(corpus, tmp_path_factory) -> Path:
    """The corpus as documents of five rows."""
    rng = random.Random(1)
    lines = corpus.read_text().splitlines()
    rows = [
        {"title": f"t{i // 5}", "text": " ".join(rng.choices(line.split(), k=3))}
        for i, line in enumerate(lines)
    ]
    file = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def pretrain(documents, encoder_folder, overrides, tmp_path):
    """Configuration of a BERT run that goes on with the tiny encoder; takes more overrides."""

    def make(*more: str, recipe: str = "bert", source: Path = encoder_folder, **options):
        keys = [*overrides, "data.document_column=title", *more]
        options = {"corpus": str(documents), "output": tmp_path / "run", **options}
        return load_config(recipe, keys, teacher=str(source), **options)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_an_encoder_learns_both_tasks_and_is_saved_with_both_heads(pretrain, encoder_folder):
    result = run(pretrain("run.eval_sequences=1000", "optimizer.lr=1e-9"))
    folder = result.output / "model"
    model, info = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert type(model) is BertForPreTraining
    assert not info["missing_keys"]
    # At this rate the encoder stays what it was.
    before = weights(encoder_folder)
    after = weights(folder)
    for name in ("encoder.layer.3.output.dense.weight", "embeddings.word_embeddings.weight"):
        torch.testing.assert_close(after[f"bert.{name}"], before[name], rtol=0, atol=1e-6)

    (row,) = result.models
    assert row.scores.keys() == {"loss", "accuracy", "perplexity", "next_sentence_accuracy"}
    (plain,) = json.loads((result.output / "results.json").read_text())["models"]
    assert plain["scores"] == row.scores
    assert f"| {row.scores['next_sentence_accuracy']:.2%} |" in (result.output / "results.md").read_text()
    records = read_metrics(result.output / METRICS)
    last = [record for record in records if "held_out_loss" in record][-1]
    assert last["held_out_next_sentence_accuracy"] == row.scores["next_sentence_accuracy"]
    steps = [record for record in records if "ce" in record]
    assert all(record["loss"] == pytest.approx(record["ce"] + record["next_sentence"]) for record in steps)


def test_heads_that_the_folder_has_are_kept(pretrain, tmp_path):
    first = run(pretrain("run.steps=2", output=tmp_path / "first")).output / "model"
    second = run(pretrain("run.steps=2", "optimizer.lr=1e-9", source=first, output=tmp_path / "second"))
    before, after = weights(first), weights(second.output / "model")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)


def test_a_cut_model_starts_from_the_layers_that_are_named(pretrain, encoder_folder):
    config = pretrain("run.steps=1", "optimizer.lr=1e-9", "student.teacher_layers=[1, 3]")
    folder = run(config).output / "model"
    before, after = weights(encoder_folder), weights(folder)
    name = "encoder.layer.{}.attention.self.query.weight"
    for ours, theirs in ((0, 1), (1, 3)):
        torch.testing.assert_close(
            after[f"bert.{name.format(ours)}"], before[name.format(theirs)], atol=1e-6, rtol=0
        )
    assert f"bert.{name.format(2)}" not in after


@pytest.mark.parametrize(
    ("sizes", "layers", "width", "heads", "feed_forward"),
    [
        ([], 4, 32, 2, 48),
        (["student.num_layers=3", "student.hidden_size=24", "student.num_attention_heads=4"], 3, 24, 4, 36),
        (["student.intermediate_size=20"], 4, 32, 2, 20),
    ],
)
def test_pretraining_from_scratch_takes_the_sizes_alone(
    pretrain, encoder_folder, sizes, layers, width, heads, feed_forward
):
    config = pretrain("student.init=random", "run.steps=1", "optimizer.lr=1e-9", *sizes)
    folder = run(config).output / "model"
    made = AutoModelForPreTraining.from_pretrained(folder)
    found = made.config
    assert type(made) is BertForPreTraining
    assert (found.num_hidden_layers, found.hidden_size) == (layers, width)
    assert (found.num_attention_heads, found.intermediate_size) == (heads, feed_forward)
    old = weights(encoder_folder)["embeddings.word_embeddings.weight"]
    ours = made.bert.embeddings.word_embeddings.weight
    assert ours.shape != old.shape or not torch.allclose(ours, old, atol=1e-3)
    # The output bias starts at the log frequencies.
    torch.testing.assert_close(made.cls.predictions.bias.exp().sum(), torch.tensor(1.0))
    assert made.cls.predictions.bias.std() > 0.1


def test_a_masked_language_model_from_scratch_keeps_its_family(pretrain):
    config = pretrain("student.init=random", "run.steps=1", "run.head_warmup_steps=0", recipe="mlm")
    result = run(config)
    model, _ = load_masked_lm(result.output / "model")
    assert type(model).__name__ == "BertForMaskedLM"
    assert model.config.num_hidden_layers == 4


def test_the_warm_up_trains_pooler_and_both_heads_alone(pretrain, encoder_folder):
    config = pretrain("run.head_warmup_steps=2", "run.steps=1", "optimizer.lr=1e-9")
    result = run(config)
    before, after = weights(encoder_folder), weights(result.output / "head")
    for name, weight in before.items():
        torch.testing.assert_close(after[f"bert.{name}"], weight, rtol=0, atol=0)
    # Biases start at zero, so any other value is learnt.
    for name in (
        "bert.pooler.dense.bias",
        "cls.seq_relationship.bias",
        "cls.predictions.transform.dense.bias",
    ):
        assert after[name].abs().max() > 0
    # The next phase goes on with all of them.
    last = weights(result.output / "model")
    torch.testing.assert_close(last["cls.seq_relationship.bias"], after["cls.seq_relationship.bias"])


def test_a_mobilebert_is_distilled_with_both_tasks(pretrain, documents, overrides, tmp_path):
    """The paper's pretraining distillation has the next sentence beside the masked tokens."""
    teacher = run(pretrain("run.steps=1", output=tmp_path / "teacher")).output / "model"
    objectives = "[{name: vocabulary, kd_weight: 0.5, ce_weight: 0.5}, {name: next_sentence}]"
    config = load_config(
        "mobilebert",
        [
            *overrides,
            "data.document_column=title",
            "data.sentence_pairs=true",
            "student.num_layers=2",
            "student.mobilebert.bottleneck_size=8",
            "student.mobilebert.embedding_size=16",
            "stages.0.run.steps=1",
            f"stages.1.objectives={objectives}",
            "baseline=true",
        ],
        teacher=str(teacher),
        corpus=str(documents),
        output=tmp_path / "run",
    )
    result = run(config)
    assert [row.name for row in result.models] == ["teacher", "student", "baseline"]
    assert all("next_sentence_accuracy" in row.scores for row in result.models)
    student = AutoModelForPreTraining.from_pretrained(result.output / "student")
    assert type(student) is MobileBertForPreTraining
    records = read_metrics(result.output / METRICS)
    assert all("next_sentence" in r for r in records if r["phase"] == "baseline" and "ce" in r)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.sentence_pairs=false"], "set data.sentence_pairs=true"),
        (["student.hidden_size=24"], "set student.init to 'random' or leave it out"),
        (["student.num_layers=5"], "student.num_layers is 5, but the teacher has only 4 layers"),
        (["data.max_length=64"], "has only 40 positions"),
    ],
)
def test_what_does_not_fit_is_told_before_the_text_is_read(pretrain, tmp_path, more, message):
    (tmp_path / "nothing.txt").touch()
    with pytest.raises(UserError, match=message):
        run(pretrain(*more, corpus=str(tmp_path / "nothing.txt")))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    not (ENCODER.is_dir() and ENWIK8.is_dir()), reason="no ../shared with the encoder and text"
)
@pytest.mark.slow
def test_two_real_layers_learn_from_real_articles(overrides, tmp_path):
    settings = [
        "data.document_column=title",
        "data.max_length=32",
        "data.max_sequences=1500",
        "student.num_layers=2",
        "optimizer.lr=5e-4",
        "run.steps=12",
        "run.eval_every=12",
        "run.checkpoint_every=12",
    ]
    config = load_config(
        "bert", [*overrides, *settings], teacher=str(ENCODER), corpus=str(ENWIK8), output=tmp_path / "run"
    )
    result = run(config)
    first, last = (r for r in read_metrics(result.output / METRICS) if "held_out_loss" in r)
    assert last["held_out_loss"] < first["held_out_loss"] - 1
    (row,) = json.loads((result.output / "results.json").read_text())["models"]
    assert 0 < row["scores"]["accuracy"] < 1
    assert 0 < row["scores"]["next_sentence_accuracy"] < 1
    assert row["layers"] == 2
