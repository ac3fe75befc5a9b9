"""Whole runs on a task: what is learned, what the table says, and what is said when something is amiss."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy import stats
from torch import nn
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

import fastdistil.train.answers
import fastdistil.train.loop
import fastdistil.train.task_run
from fastdistil.cli import main
from fastdistil.data.noise import permutation
from fastdistil.errors import UserError
from fastdistil.train.config import load_config
from fastdistil.train.logging import METRICS, read_metrics
from fastdistil.train.run import run

# A model that is taken as it is.
UNCUT = ("student.num_layers=null", "student.architecture=null")


def rows_of(tasks: Path, task: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tasks / task / f"{split}.jsonl").read_text().splitlines()]


def texts_of(row: dict[str, Any]) -> list[str]:
    return [value for value in row.values() if isinstance(value, str)]


def plain_scores(folder: Path, task: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """By `transformers`, one example after the other, and textbook formulas."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = []
    for row in rows:
        inputs = tokenizer(*texts_of(row), truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**inputs).logits[0])
    answers = torch.stack(logits)
    if task == "stsb":
        targets = [row["score"] for row in rows]
        pearson, spearman = (f(answers[:, 0].tolist(), targets) for f in (stats.pearsonr, stats.spearmanr))
        return {"pearson": pearson.statistic, "spearman": spearman.statistic}
    pairs = list(zip(answers.argmax(1).tolist(), [row["label"] for row in rows], strict=True))
    accuracy = sum(a == b for a, b in pairs) / len(pairs)
    if task == "sst2":
        return {"accuracy": accuracy}
    f1 = 2 * pairs.count((1, 1)) / (2 * pairs.count((1, 1)) + pairs.count((1, 0)) + pairs.count((0, 1)))
    return {"accuracy": accuracy, "f1": f1}


@pytest.mark.parametrize("task", ["sst2", "mrpc", "stsb"])
def test_a_finetuned_model_is_a_transformers_folder_with_the_scores_of_the_table(finetuned, tasks, task):
    folder = finetuned(task)
    plain = json.loads((folder.parent / "results.json").read_text())
    (model,) = plain["models"]
    assert (model["name"], model["layers"], model["train_steps"]) == ("model", 4, 90)
    assert plain["held_out"] == f"Scores on the 40 validation examples of {task}."
    assert model["retained"] is None
    expected = plain_scores(folder, task, rows_of(tasks, task, "validation"))
    assert model["scores"] == pytest.approx(expected, abs=1e-5)
    assert min(expected.values()) > 0.8
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    names = {"sst2": ["negative", "positive"], "mrpc": ["not_equivalent", "equivalent"], "stsb": ["score"]}
    assert list(config.id2label.values()) == names[task]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card


def test_a_distilled_student_is_in_the_table_beside_teacher_and_baseline(on_task, tasks):
    config = on_task("kd", task="mrpc")
    result = run(config)
    assert [m.name for m in result.models] == ["teacher", "student", "baseline"]
    teacher, student, baseline = result.models
    rows = rows_of(tasks, "mrpc", "validation")
    means = []
    for m, folder in zip(result.models, (Path(config.teacher), result.output / "student",
                                         result.output / "baseline"), strict=True):  # fmt: skip
        assert m.scores == pytest.approx(plain_scores(folder, "mrpc", rows), abs=1e-6)
        means.append((m.scores["accuracy"] + m.scores["f1"]) / 2)
        assert m.retained == pytest.approx(means[-1] / means[0])
    assert (student.layers, teacher.layers, teacher.train_steps) == (2, 4, None)
    assert student.parameters == baseline.parameters < teacher.parameters
    text = (result.output / "results.md").read_text()
    assert text.startswith("# kd on mrpc\n")
    for m in result.models:
        cells = f"{m.scores['accuracy']:.2%} | {m.scores['f1']:.2%} | {m.retained:.1%}"
        assert f"| {m.name} | {m.layers} × 32 | {m.parameters / 1e6:.2f} M | {cells} |" in text
    # Held-out scores of the last step are those of the table.
    curve = [r for r in read_metrics(result.output / METRICS) if "held_out_f1" in r]
    assert [(r["phase"], r["step"]) for r in curve] == [
        ("student", 0), ("student", 6), ("baseline", 0), ("baseline", 6)
    ]  # fmt: skip
    assert curve[1]["held_out_f1"] == pytest.approx(student.scores["f1"])


def test_the_paths_of_a_run_may_start_in_the_home_folder(tasks, task_keys, finetuned, tmp_path, monkeypatch):
    teacher = finetuned("sst2")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "teacher").symlink_to(teacher)
    (tmp_path / "tasks").symlink_to(tasks)
    keys = [
        *task_keys,
        "data.cache_dir=~/cache",
        "run.epochs=1",
        "baseline=false",
        "student.from_model=~/teacher",
    ]
    config = load_config("kd", keys, teacher="~/teacher", task="sst2", data="~/tasks", output="~/run")
    run(config)
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    assert list((tmp_path / "cache" / "teacher-answers").iterdir())
    assert not Path("~").exists()


def test_student_and_baseline_start_from_the_same_weights_and_read_the_same_batches(on_task, phases):
    """With a fresh head, too, which both must draw alike."""
    config = on_task("kd", "student.init=random")
    run(config)
    student, baseline = phases["student"], phases["baseline"]
    assert student["phase"].seed == baseline["phase"].seed
    assert student["weights"].keys() == baseline["weights"].keys()
    for name, value in student["weights"].items():
        assert torch.equal(value, baseline["weights"][name]), name
    assert len(student["batches"]) == len(baseline["batches"]) == 6
    for ours, theirs in zip(student["batches"], baseline["batches"], strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.labels, theirs.labels)
    ours, theirs = (load_file(config.output / name / "model.safetensors") for name in ("student", "baseline"))
    assert not torch.equal(ours["classifier.weight"], theirs["classifier.weight"])


def test_the_first_step_of_pkd_is_the_loss_of_the_paper(on_task, phases):
    """(1 - α) CE + α T² KL + β times the squared distance of the normalised [CLS] states, by `transformers`.

    The student's layer 1 learns from the teacher's layer 2; its last layer from the logits alone.
    """
    config = on_task("pkd", "student.dropout=0", "run.steps=1", "baseline=false", "objectives.1.weight=7")
    run(config)
    (batch,) = phases["student"]["batches"]
    models = [BertForSequenceClassification.from_pretrained(config.teacher) for _ in range(2)]
    models[0].bert.encoder.layer = models[0].bert.encoder.layer[:2]
    models[0].load_state_dict(phases["student"]["weights"])
    assert batch.labels.shape == (8,)
    with torch.no_grad():
        ours, theirs = (m.eval()(**batch.inputs, output_hidden_states=True) for m in models)
    kd = 25 * nn.functional.kl_div(
        (ours.logits / 5).log_softmax(-1), (theirs.logits / 5).softmax(-1), reduction="batchmean"
    )
    ce = nn.functional.cross_entropy(ours.logits, batch.labels)
    states = [
        nn.functional.normalize(output.hidden_states[layer][:, 0], dim=-1)
        for output, layer in ((ours, 1), (theirs, 2))
    ]
    patient = nn.functional.mse_loss(*states)
    record = next(r for r in read_metrics(config.output / METRICS) if "loss" in r)
    assert record["kd"] == pytest.approx(kd.item(), rel=1e-4)
    assert record["task"] == pytest.approx(ce.item(), rel=1e-4)
    assert record["hidden"] == pytest.approx(patient.item(), rel=1e-4)
    assert record["loss"] == pytest.approx((0.5 * ce + 0.5 * kd + 7 * patient).item(), rel=1e-4)
    assert patient > 0.001


def test_without_scores_the_weights_are_the_same_and_nothing_else_is_written(on_task, tmp_path):
    with_scores, without = (on_task("kd", *UNCUT, "run.steps=3", output=tmp_path / n) for n in ("a", "b"))
    assert run(with_scores).models
    assert run(without, score=False).models == []
    first, second = (load_file(tmp_path / n / "student" / "model.safetensors") for n in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not [r for r in read_metrics(without.output / METRICS) if any("held_out" in key for key in r)]
    assert not {"results.json", "results.md", "curves.png"} & {file.name for file in without.output.iterdir()}


def test_a_regression_learns_the_scores_of_its_teacher(on_task, phases):
    config = on_task("kd", "student.dropout=0", "baseline=false", "run.steps=1", task="stsb")
    run(config)
    (batch,) = phases["student"]["batches"]
    teacher = BertForSequenceClassification.from_pretrained(config.teacher)
    student = BertForSequenceClassification.from_pretrained(config.teacher)
    student.bert.encoder.layer = student.bert.encoder.layer[:2]
    student.load_state_dict(phases["student"]["weights"])
    with torch.no_grad():
        ours, theirs = (m.eval()(**batch.inputs).logits[:, 0] for m in (student, teacher))
    record = next(r for r in read_metrics(config.output / METRICS) if "loss" in r)
    assert record["kd"] == pytest.approx((ours - theirs).square().mean().item(), rel=1e-4)
    assert record["task"] == pytest.approx((ours - batch.labels).square().mean().item(), rel=1e-4)


def test_a_student_is_cut_from_the_first_layers_of_another_model(on_task, task_encoder, phases):
    keys = ["student.teacher_layers=[0, 1]", f"student.from_model={task_encoder}", "run.steps=1"]
    run(on_task("pkd", *keys, "baseline=false"))
    source, first = load_file(task_encoder / "model.safetensors"), phases["student"]["weights"]
    copied = [name for name in source if ".layer.2." not in name and ".layer.3." not in name]
    assert len(copied) == 5 + 2 * 16
    for name in copied:
        assert torch.equal(first[f"bert.{name}"], source[name]), name
    assert not [name for name in first if ".layer.2." in name]
    # A head that neither the encoder nor the teacher gives.
    assert first["classifier.weight"].std() < 0.2


def test_a_model_that_is_named_without_a_depth_is_the_student_as_it_is(on_task, task_encoder, phases):
    result = run(on_task("kd", *UNCUT, f"student.from_model={task_encoder}", "run.steps=1"))
    first = phases["student"]["weights"]
    for name, value in load_file(task_encoder / "model.safetensors").items():
        assert torch.equal(first[f"bert.{name}"], value), name
    assert [m.layers for m in result.models] == [4, 4, 4]
    assert f"It started from {task_encoder}." in (result.output / "student" / "README.md").read_text()


def test_a_trained_head_of_the_student_is_kept(on_task, finetuned, phases):
    """A second distillation goes on with the first one's classifier."""
    run(on_task("kd", *UNCUT, f"student.from_model={finetuned('sst2')}", "run.steps=1"))
    for name, value in load_file(finetuned("sst2") / "model.safetensors").items():
        assert torch.equal(phases["student"]["weights"][name], value), name


def test_an_epoch_reads_every_example_once_with_its_smaller_last_batch(on_task, phases, tasks):
    config = on_task("finetune", "run.epochs=2", "baseline=false", "task.max_tokens=64", "run.log_every=100")
    result = run(config)
    batches = phases["model"]["batches"]
    assert all(batch.input_ids.numel() <= 64 for batch in batches)
    assert sum(len(batch.labels) for batch in batches) == 2 * 45
    (model,) = result.models
    assert model.train_steps == 2 * math.ceil(45 / 8)
    tokenizer = AutoTokenizer.from_pretrained(result.output / "model")
    lengths = [min(24, len(tokenizer(row["sentence"]).input_ids)) for row in rows_of(tasks, "sst2", "train")]
    assert model.train_tokens == 2 * sum(lengths)


def test_micro_batches_give_the_same_update_as_one_batch(on_task, tmp_path):
    """Of an epoch whose last batch is smaller; the copies of a term's mean have different counts."""
    outputs = []
    for tokens in (1000, 48):
        config = on_task(
            "pkd",
            f"task.max_tokens={tokens}",
            "student.dropout=0",
            "optimizer.eps=0.01",  # see test_loop.py
            "baseline=false",
            output=tmp_path / str(tokens),
        )
        run(config)
        outputs.append(load_file(config.output / "student" / "model.safetensors"))
    for name, value in outputs[0].items():
        torch.testing.assert_close(
            value, outputs[1][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_baseline_may_have_epochs_of_its_own(on_task):
    student, baseline = run(on_task("kd", "run.steps=2", "baseline_epochs=0.5")).models[1:]
    assert (student.train_steps, baseline.train_steps) == (2, 3)


def test_so_many_examples_are_used_from_anywhere_in_the_file(on_task, phases, tasks):
    run(on_task("kd", "task.max_examples=8", "baseline=false", "run.steps=1"))
    (batch,) = phases["student"]["batches"]
    rows = rows_of(tasks, "sst2", "train")
    drawn = sorted(permutation(len(rows), 0, 0)[:8].tolist())
    assert drawn[-1] > 8
    assert sorted(batch.labels.tolist()) == sorted(rows[row]["label"] for row in drawn)


@pytest.mark.parametrize(("recipe", "keys", "layers"), [
    ("kd", [], [0, 1]),
    ("pkd", [], [0, 1]),
    ("pkd:last", ["student.num_layers=3"], [0, 1, 2]),
    ("kd:3-layers", [], [0, 1, 2]),
    ("kd", ["student.teacher_layers=[1, 3]"], [1, 3]),
])  # fmt: skip
def test_of_a_teacher_of_any_depth_the_student_is_the_first_half(
    recipe, keys, layers, tasks, task_keys, finetuned, tmp_path, phases
):
    keys = [*task_keys, *keys, "run.steps=1", "baseline=false"]
    teacher = finetuned("sst2")
    config = load_config(
        recipe, keys, teacher=str(teacher), task="sst2", data=str(tasks), output=tmp_path / "run"
    )
    result = run(config)
    assert result.models[-1].layers == len(layers)
    source, first = load_file(teacher / "model.safetensors"), phases["student"]["weights"]
    for ours, theirs in enumerate(layers):
        name = "bert.encoder.layer.{}.output.dense.weight"
        assert torch.equal(first[name.format(ours)], source[name.format(theirs)])
    plain = yaml.safe_load((result.output / "config.yaml").read_text())
    assert plain["student"]["teacher_layers"] == layers
    # With the recipe's word for them, it is the run that is there.
    with pytest.raises(UserError, match="already holds this run: add --resume"):
        run(config)


SPANS = [{"question": "where", "context": "it is here", "answers": {"text": ["here"], "answer_start": [6]}}]
CHOICES = [
    {"article": "it is here", "question": "where", "options": ["here", "there", "far"], "answer": "here"}
]


@pytest.mark.parametrize(
    ("task", "rows", "auto"),
    [("squad", SPANS, AutoModelForQuestionAnswering), ("dream", CHOICES, AutoModelForMultipleChoice)],
)
def test_spans_and_choices_are_distilled(
    task: str, rows: list[Any], auto: Any, task_encoder: Path, task_keys: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data" / task
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 9 * rows))
    teacher = tmp_path / "teacher"
    shutil.copytree(task_encoder, teacher)
    torch.manual_seed(0)
    auto.from_pretrained(task_encoder).save_pretrained(str(teacher))
    keys = ["student.num_layers=2", "student.teacher_layers=null", "run.steps=2", "allow_weak_teacher=true"]
    config = load_config(
        "kd",
        [*task_keys, *keys, "task.max_length=24"],
        teacher=str(teacher),
        task=task,
        data=str(tmp_path / "data"),
        output=tmp_path / "run",
    )
    result = run(config)
    assert [model.name for model in result.models] == ["teacher", "student", "baseline"]
    assert all(0 <= score <= 1 for model in result.models for score in model.scores.values())
    record = next(r for r in read_metrics(config.output / METRICS) if "loss" in r)
    assert record["kd"] > 0
    assert record["task"] > 0
    assert auto.from_pretrained(config.output / "student").config.num_hidden_layers == 2


def test_a_folder_may_have_the_usual_split_under_its_usual_name(
    task_encoder: Path, task_keys: list[str], tmp_path: Path
) -> None:
    """MNLI's own is called validation_matched."""
    (tmp_path / "mnli").mkdir()
    rows = [{"premise": "it is here", "hypothesis": "it is", "label": label} for label in (0, 1, 2)]
    for split in ("train", "validation"):
        (tmp_path / "mnli" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [*task_keys, "run.steps=1"]
    files = {"data": str(tmp_path), "output": tmp_path / "run"}
    (model,) = run(load_config("finetune", keys, teacher=str(task_encoder), task="mnli", **files)).models
    assert model.scores["accuracy"] == pytest.approx(1 / 3)


@pytest.fixture
def weak(task_encoder: Path, tmp_path: Path) -> Path:
    """A teacher with a head that was never trained."""
    folder = tmp_path / "weak"
    shutil.copytree(task_encoder, folder)
    torch.manual_seed(0)
    BertForSequenceClassification.from_pretrained(task_encoder).save_pretrained(str(folder))
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.fixture
def command(tasks: Path, task_keys: list[str], tmp_path: Path) -> list[str]:
    """`fastdistil train kd` of one step, without its teacher."""
    keys = [*task_keys, "student.num_layers=2", "student.teacher_layers=null", "run.steps=1"]
    files = ["--data", str(tasks), "--output", str(tmp_path / "run")]
    return ["train", "kd", "--task", "sst2", *files, *(a for key in keys for a in ("--set", key))]


def test_a_teacher_at_chance_stops_the_run_before_anything_is_learned(command, weak, capsys, tmp_path):
    assert main([*command, "--teacher", str(weak)]) == 2
    line = said(capsys).splitlines()[-1]
    assert line.startswith(f"fastdistil: teacher {weak} scores 0.")
    assert line.endswith(
        "on sst2, and chance is 0.5000: there is nothing to learn from it; fine-tune it first (fastdistil "
        f"train finetune --teacher {weak} --task sst2), or add --allow-weak-teacher"
    )
    assert not (tmp_path / "run").exists()


def test_a_weak_teacher_may_be_allowed(command, weak, capsys, tmp_path):
    assert main([*command, "--teacher", str(weak), "--allow-weak-teacher"]) == 0
    assert f"teacher {weak} on sst2: accuracy 0." in said(capsys)
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    # Leave that was given while it ran is not another run.
    assert main([*command, "--teacher", str(weak), "--resume"]) == 2
    assert "there is nothing to learn from it" in said(capsys)


def test_a_teacher_without_a_head_is_sent_to_finetune(command, task_encoder, capsys, tmp_path):
    assert main([*command, "--teacher", str(task_encoder)]) == 2
    line = said(capsys).splitlines()[-1]
    assert "no trained head for sst2" in line
    assert line.endswith(
        f"fine-tune one first: fastdistil train finetune --teacher {task_encoder} --task sst2"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("beforehand", [True, False])
def test_the_teacher_teaches_in_eval_mode_what_it_says_without_dropout(
    on_task, monkeypatch, tmp_path, beforehand
):
    taught: list[tuple[Any, torch.Tensor]] = []
    asking = fastdistil.train.answers if beforehand else fastdistil.train.loop
    original = asking.tap_teacher

    def spy(model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        taps = original(model, inputs, *arguments, **keywords)
        taught.append((inputs, taps.logits.clone()))
        return taps

    monkeypatch.setattr(asking, "tap_teacher", spy)
    monkeypatch.setattr(fastdistil.train.task_run.TaskRun, "_answers_suffice", lambda *arguments: beforehand)
    config = on_task("kd", "run.steps=2", "baseline=false", f"data.cache_dir={tmp_path / 'cache'}")
    before = (Path(config.teacher) / "model.safetensors").read_bytes()
    run(config)
    assert len(taught) == (1 if beforehand else 2)
    teacher = AutoModelForSequenceClassification.from_pretrained(config.teacher)
    assert teacher.config.hidden_dropout_prob == 0.1
    for inputs, logits in taught:
        with torch.no_grad():
            torch.testing.assert_close(logits, teacher.eval()(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert (Path(config.teacher) / "model.safetensors").read_bytes() == before


def other_tokenizer(source: Path, folder: Path) -> Path:
    """The same model with two words exchanged in its vocabulary."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    a, b = (token for token, i in vocabulary.items() if i in (20, 21))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    type(tokenizer)(vocab=vocabulary).save_pretrained(str(folder))
    return folder


def test_a_student_with_another_tokenizer_than_its_teachers_is_refused(
    on_task, task_encoder, tmp_path, monkeypatch
):
    other = other_tokenizer(task_encoder, tmp_path / "other")
    config = on_task("kd", f"student.from_model={other}")
    monkeypatch.setattr(fastdistil.train.task_run, "TaskData", None)  # before the examples are read
    with pytest.raises(UserError, match=r"different tokenizers: token 20 is .* given the same token ids$"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_fewer_positions_than_its_student_is_named(on_task, task_encoder, tmp_path):
    longer = tmp_path / "longer"
    shutil.copytree(task_encoder, longer)
    config = BertConfig.from_pretrained(task_encoder, max_position_embeddings=80)
    BertModel(config, add_pooling_layer=False).save_pretrained(str(longer))
    config = on_task("kd", f"student.from_model={longer}", "task.max_length=64")
    with pytest.raises(UserError, match=f"task.max_length is 64, but {config.teacher} has only 40 positions"):
        run(config)


@pytest.mark.parametrize(
    ("recipe", "keys", "message"),
    [
        (
            "kd",
            ["student.init=random", "student.hidden_size=30", "student.num_attention_heads=4"],
            "student.hidden_size 30 is not a multiple of student.num_attention_heads 4",
        ),
        (
            "kd",
            [
                "objectives=[{name: prediction}, {name: attention_transfer}]",
                "student.init=random",
                "student.num_attention_heads=4",
            ],
            "objectives.1: .* student has 4 heads and the teacher 2: set student.num_attention_heads=2",
        ),
        (
            "kd",
            ["objectives=[{name: prediction}, {name: relations, num_heads: 5}]"],
            "num_heads must divide the widths .* got 5; these would: 1, 2, 4",
        ),
        ("pkd", ["student.num_layers=1"], "objectives.1.layers: 'skip' leaves the student's last layer out"),
        ("kd", ["student.num_layers=5"], "student.num_layers is 5, but the teacher has only 4 layers"),
        (
            "kd",
            ["student.teacher_layers=[0, 4]"],
            "student.teacher_layers has 4, but the teacher's layers are",
        ),
        ("kd", ["task.max_length=64"], "task.max_length is 64, but .* has only 40 positions"),
        ("bilstm", ["task.max_length=64"], "task.max_length is 64, but .* has only 40 positions"),
    ],
)
def test_what_does_not_fit_the_models_is_named_before_the_examples_are_read(
    on_task, recipe, keys, message, monkeypatch, tmp_path
):
    config = on_task(recipe, *keys)
    monkeypatch.setattr(fastdistil.train.task_run, "TaskData", None)
    with pytest.raises(UserError, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def broken(tasks: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the tasks' folder, to be spoiled."""
    folder = tmp_path / "broken"
    shutil.copytree(tasks, folder)
    return folder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "no file of split 'train'; those there are validation"),
        (lambda file: file.write_text('{"text": "a", "label": 1}\n'), "no column 'sentence'"),
        (lambda file: file.write_text('{"sentence": "a", "label": 2}\n'), "row 1"),
        (lambda file: file.write_text('{"sentence": "", "label": 1}\n'), "row 1"),
    ],
    ids=["missing split", "missing column", "label out of range", "empty text"],
)
def test_what_is_wrong_with_the_files_is_one_line_and_leaves_the_output_free(
    on_task, broken, tmp_path, spoil, message
):
    spoil(broken / "sst2" / "train.jsonl")
    config = on_task("finetune")
    config = config.model_copy(update={"task": config.task.model_copy(update={"data": str(broken)})})
    with pytest.raises(UserError, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_log_states_the_loss_with_its_temperature_and_means(on_task, capsys):
    run(on_task("pkd", "run.steps=1", "baseline=false"))
    assert (
        "student: loss = 0.5 · T²·KL(teacher‖student) at T=5 [mean over examples] "
        "+ 0.5 · CE at T=1 of the labels [mean over labelled examples] "
        "+ 100 · MSE of normalised hidden states [mean over the first tokens and the width, mean over "
        "layers: skip]; each mean is over the whole batch of an optimiser step"
    ) in said(capsys)


def test_the_log_counts_what_was_truncated(on_task, tasks, capsys):
    config = on_task("finetune", "task.max_length=10", "run.steps=1", task="mrpc")
    tokenizer = AutoTokenizer.from_pretrained(config.student.from_model)
    said(capsys)  # the teacher is fine-tuned here, unless an earlier test asked for it
    run(config)
    printed = said(capsys)
    for split, count in (("train", 45), ("validation", 40)):
        lengths = [len(tokenizer(*texts_of(row)).input_ids) for row in rows_of(tasks, "mrpc", split)]
        cut = sum(length > 10 for length in lengths)
        assert 0 < cut < count
        line = next(line for line in printed.splitlines() if line.startswith(f"mrpc, {split}: "))
        assert line.startswith(f"mrpc, {split}: {count} examples")
        assert line.endswith(f", {cut} truncated to 10 tokens")


def test_the_split_that_is_scored_on_is_named_as_it_is(tasks, task_encoder, task_keys, tmp_path, capsys):
    """Where a folder has no development set, its test split is what a task is scored on."""
    folder = tmp_path / "snli"
    folder.mkdir()
    for split, there in (("train", "train"), ("test", "validation")):
        pairs = rows_of(tasks, "mrpc", there)
        rows = [{"premise": p["sentence1"], "hypothesis": p["sentence2"], "label": p["label"]} for p in pairs]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"teacher": str(task_encoder), "task": "snli", "data": str(tmp_path), "output": tmp_path / "run"}
    run(load_config("finetune", [*task_keys, "run.steps=1"], **files))
    plain = json.loads((tmp_path / "run" / "results.json").read_text())
    assert plain["held_out"] == "Scores on the 40 test examples of snli."
    assert "snli, test: 40 examples" in said(capsys)


def test_a_recipe_without_distillation_cuts_its_model_first(tasks, task_encoder, task_keys, tmp_path, phases):
    keys = [*task_keys, "student.num_layers=2", "student.teacher_layers=[0, 1]", "run.steps=1"]
    files = {"teacher": str(task_encoder), "task": "sst2", "data": str(tasks), "output": tmp_path / "run"}
    (model,) = run(load_config("finetune", keys, **files)).models
    assert model.layers == 2
    source, first = load_file(task_encoder / "model.safetensors"), phases["model"]["weights"]
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(first[f"bert.{name}"], source[name])
