"""What a run does with augmented examples: made once, kept, and learned from the teacher alone."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification

import fastdistil.train.augment
from fastdistil.data.tasks import Examples, find_task, read_examples
from fastdistil.errors import UserError
from fastdistil.train.augment import augmented
from fastdistil.train.logging import METRICS, RunLog, read_metrics
from fastdistil.train.run import run
from fastdistil.train.sections import AugmentConfig

MAKERS = ("bilstm_augment", "tinybert_augment", "load_encoder", "load_masked_lm")


@pytest.fixture
def augment(tasks: Path, task_encoder: Path, tmp_path: Path) -> Callable[..., Examples]:
    """The first 12 examples of a task and copies of them, by the keys of a section `augment`."""

    def make(
        task: str = "sst2",
        *,
        source: Path = task_encoder,
        count: int = 12,
        mask_token: str = "[MASK]",
        **keys: Any,
    ) -> Examples:
        tokenizer = AutoTokenizer.from_pretrained(task_encoder)
        tokenizer.mask_token = mask_token
        examples = read_examples(find_task(task), tasks, "train").select(range(count))
        with RunLog(tmp_path, main=True) as log:
            return augmented(
                examples,
                find_task(task),
                AugmentConfig(**{"method": "tinybert", "copies": 3, **keys}),
                tokenizer,
                source=str(source),
                max_length=24,
                cache_dir=tmp_path / "cache",
                device=torch.device("cpu"),
                log=log,
            )

    return make


@pytest.fixture
def without_makers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, whatever reads a model or makes a copy fails."""

    def forbid() -> None:
        for name in MAKERS:
            monkeypatch.setattr(fastdistil.train.augment, name, None)

    return forbid


@pytest.fixture(scope="module")
def masked_lm(task_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlm") / "tiny"
    shutil.copytree(task_encoder, folder)
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(task_encoder, initializer_range=0.5)
    BertForMaskedLM(config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("method", ["tinybert", "bilstm"])
@pytest.mark.parametrize("task", ["sst2", "mrpc", "stsb"])
def test_copies_follow_the_examples_and_their_labels_are_unknown(augment, tasks, method, task):
    examples = read_examples(find_task(task), tasks, "train").select(range(12))
    both = augment(task, method=method)
    assert both.texts[:12] == examples.texts
    np.testing.assert_array_equal(both.labels[:12], examples.labels)
    copies, labels = both.texts[12:], both.labels[12:]
    assert 20 < len(copies) <= 36
    assert not set(copies) & set(examples.texts)
    assert {len(copy) for copy in copies} == {len(examples.texts[0])}
    assert labels.dtype == examples.labels.dtype
    assert np.isnan(labels).all() if task == "stsb" else (labels == -100).all()


def test_the_copies_of_tinybert_keep_the_words_that_are_not_replaced(augment):
    """0.4 of the words are replaced, each by a whole word of the vocabulary."""
    both = augment(count=45, copies=4)
    originals = [text.split() for (text,) in both.texts[:45]]
    replaced = total = 0
    for (copy,) in both.texts[45:]:
        words = copy.split()
        same = max(
            sum(a == b for a, b in zip(words, o, strict=True)) for o in originals if len(o) == len(words)
        )
        replaced += len(words) - same
        total += len(words)
    assert 0.3 < replaced / total < 0.5


def test_a_file_of_copies_is_read_again_without_any_model(augment, masked_lm, without_makers):
    keys = [{}, {"masked_lm": str(masked_lm)}, {"method": "bilstm"}]
    first = [augment(**k) for k in keys]
    without_makers()
    for k, made in zip(keys, first, strict=True):
        again = augment(**k)
        assert again.texts == made.texts
        np.testing.assert_array_equal(again.labels, made.labels)
    assert len({tuple(made.texts) for made in first}) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"copies": 4},
        {"probability": 0.5},
        {"num_candidates": 7},
        {"seed": 1},
        {"method": "bilstm"},
        {"count": 11},
        {"task": "mrpc"},
    ],
    ids=str,
)
def test_other_settings_or_examples_are_another_file(augment, tmp_path, other):
    """Also those of which the copies would be the same: a file that is made in vain is no mistake."""
    augment()
    assert len(list((tmp_path / "cache" / "augmented").iterdir())) == 1
    augment(**other)
    assert len(list((tmp_path / "cache" / "augmented").iterdir())) == 2
    augment()
    assert len(list((tmp_path / "cache" / "augmented").iterdir())) == 2


def test_another_model_in_the_same_folder_makes_other_copies(augment, task_encoder, masked_lm, tmp_path):
    """The words that stand for others are near in its embeddings, or what its head proposes."""
    folder = tmp_path / "model"
    shutil.copytree(task_encoder, folder)
    near = augment(source=folder)
    proposed = augment(source=folder, masked_lm=str(masked_lm))
    assert near.texts != proposed.texts
    model = BertForMaskedLM.from_pretrained(masked_lm)
    model.save_pretrained(str(folder))
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert augment(source=folder).texts != near.texts


def test_word_vectors_may_stand_for_embeddings(augment, tasks, tmp_path):
    """Of a file with four words on two axes; no other word is replaced, and by its neighbour alone."""
    texts = " ".join(text for (text,) in read_examples(find_task("sst2"), tasks, "train").texts)
    words = sorted(set(texts.split()))[:2]
    lines = [f"{words[0]} 1 0", "near 1 0.1", f"{words[1]} 0 1", "close 0.1 1"]
    (tmp_path / "glove.txt").write_text("\n".join(lines))
    keys = {"vectors": str(tmp_path / "glove.txt"), "num_candidates": 1, "probability": 1.0}
    both = augment(count=45, **keys)
    stands_for = dict(zip(words, ("near", "close"), strict=True))
    originals = {text for (text,) in both.texts[:45]}
    expected = {" ".join(stands_for.get(word, word) for word in text.split()) for text in originals}
    assert {text for (text,) in both.texts[45:]} == expected - originals
    assert both.texts[45:]


def test_no_copy_at_all_is_no_mistake(augment):
    both = augment(method="bilstm", mask_probability=0, pos_probability=0, ngram_probability=0)
    assert len(both) == 12


def test_vectors_of_other_words_are_named(augment, tmp_path):
    (tmp_path / "glove.txt").write_text("zzz 1 0\n")
    with pytest.raises(UserError, match="the word vectors have none of the words of the texts"):
        augment(vectors=str(tmp_path / "glove.txt"))


@pytest.mark.parametrize(("task", "kind"), [("squad", "span"), ("dream", "choice")])
def test_spans_and_choices_are_refused_in_one_line(task, kind, tmp_path):
    examples = Examples([("a", "b")], np.zeros(1, dtype=np.int64))
    with pytest.raises(UserError) as caught, RunLog(tmp_path, main=True) as log:
        augmented(
            examples, find_task(task), AugmentConfig(method="bilstm"), None, source="", max_length=8,
            cache_dir=tmp_path, device=torch.device("cpu"), log=log,
        )  # fmt: skip
    assert str(caught.value) == f"augment: bilstm copies sentences and pairs; {task} is a {kind}"


def test_a_masked_language_model_with_another_vocabulary_is_refused(augment, teacher_folder):
    with pytest.raises(UserError, match="different tokenizers"):
        augment(masked_lm=str(teacher_folder))


TINYBERT = "augment={method: tinybert, copies: 5, masked_lm: null}"


def test_a_run_learns_what_the_teacher_says_of_the_copies(on_task, phases, tmp_path):
    """Its only batch has examples and copies alike: KD is a mean over both, the labels' term is not."""
    keys = [
        "student.dropout=0",
        "run.batch_size=64",
        "run.steps=1",
        "baseline=false",
        "task.max_tokens=100000",
    ]
    config = on_task("kd", TINYBERT, *keys, f"data.cache_dir={tmp_path / 'cache'}")
    run(config)
    (batch,) = phases["student"]["batches"]
    known = batch.labels != -100
    assert 0 < known.sum() < len(known) == 64
    models = [BertForSequenceClassification.from_pretrained(config.teacher).eval() for _ in range(2)]
    models[0].bert.encoder.layer = models[0].bert.encoder.layer[:2]
    models[0].load_state_dict(phases["student"]["weights"])
    with torch.no_grad():
        ours, theirs = (model(**batch.inputs).logits for model in models)
    soft = nn.functional.kl_div((ours / 5).log_softmax(-1), (theirs / 5).softmax(-1), reduction="batchmean")
    record = next(r for r in read_metrics(config.output / METRICS) if "loss" in r)
    assert record["kd"] == pytest.approx(25 * soft.item(), rel=1e-4)
    ce = nn.functional.cross_entropy(ours[known], batch.labels[known])
    assert record["task"] == pytest.approx(ce.item(), rel=1e-4)
    assert record["loss"] == pytest.approx(0.5 * record["kd"] + 0.5 * record["task"], rel=1e-5)


def test_an_epoch_has_all_copies_and_that_of_the_baseline_has_none(on_task, phases, tmp_path, capsys):
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    run(on_task("bilstm", TINYBERT, "run.epochs=1", "baseline_epochs=1", cache))
    read = {name: sum(len(b.labels) for b in phases[name]["batches"]) for name in ("student", "baseline")}
    (line,) = (line for line in capsys.readouterr().err.splitlines() if " copies of 45 examples" in line)
    copies = int(line.split()[1])
    assert 100 < copies <= 5 * 45
    assert read == {"student": 45 + copies, "baseline": 45}
    assert not any((b.labels == -100).any() for b in phases["baseline"]["batches"])


def test_a_stage_without_augmentation_reads_the_examples_alone(on_task, phases, tmp_path):
    keys = ["stages.0.run.epochs=1", "stages.1.run.epochs=1", "stages.1.augment=null", "baseline=false"]
    run(on_task("tinybert-task", "augment.copies=2", *keys, f"data.cache_dir={tmp_path / 'cache'}"))
    read = {name: sum(len(b.labels) for b in phases[name]["batches"]) for name in phases}
    assert 100 < read["intermediate"] <= 3 * 45
    assert read["student"] == 45


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_pairs_and_scores_are_augmented_too(on_task, phases, tmp_path, task):
    result = run(
        on_task("bilstm", "augment.copies=3", "run.epochs=1", f"data.cache_dir={tmp_path}", task=task)
    )
    labels = torch.cat([b.labels for b in phases["student"]["batches"]])
    unknown = labels.isnan() if task == "stsb" else labels == -100
    assert len(labels) - unknown.sum() == 45
    assert unknown.sum() > 90
    assert [m.name for m in result.models] == ["teacher", "student", "baseline"]
    losses = [r["loss"] for r in read_metrics(result.output / METRICS) if "loss" in r]
    assert all(loss is not None for loss in losses)


def test_copies_are_masked_with_the_tokens_of_the_tokenizer(augment: Callable[..., Examples]) -> None:
    """After another tokenizer's copies of the same texts, which are in the cache, too."""
    for token, other in (("[MASK]", "[UNK]"), ("[UNK]", "[MASK]")):
        texts = " ".join(text for (text,) in augment(method="bilstm", mask_token=token).texts)
        assert token in texts
        assert other not in texts
