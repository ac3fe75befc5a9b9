"""A comparison from its configuration to its files: what is repeated and what is not, failures, seeds."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil.compare import page, pictures, run, steps
from fastdistil.compare.costs import Cost, Measured
from fastdistil.compare.pieces import difference
from fastdistil.compare.results import Comparison, Timing, read_comparison
from fastdistil.compare.run import CompareConfig, compare
from fastdistil.compress.method import Method
from fastdistil.errors import RunError, UserError
from fastdistil.evaluate import bytes_on_disk
from fastdistil.schema import Section

GOOD, BAD = ("bright", "clever", "warm"), ("dull", "empty", "slow")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task sst2 in six words, of which three are good."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "sst2").mkdir()
    rng = random.Random(0)
    for split, count in (("train", 24), ("validation", 40)):
        lines = []
        for row in range(count):
            sentence = " ".join(rng.choices(GOOD if row % 2 else BAD, k=rng.randint(2, 6)))
            lines.append(json.dumps({"sentence": sentence, "label": row % 2}))
        (root / "sst2" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def make_teacher(folder: Path, knows: bool) -> Path:
    """A BERT of 2 layers; one that `knows` has the right answers in its word embeddings and its head."""
    from transformers import BertConfig, BertForSequenceClassification

    from fastdistil.data.tokenizer import train_wordpiece

    tokenizer = train_wordpiece([" ".join(GOOD + BAD)] * 40, 90)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    model = BertForSequenceClassification(config)
    if knows:
        fit(model, tokenizer)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def fit(model: Any, tokenizer: Any) -> None:
    texts, labels = [*GOOD, *BAD], torch.tensor([1] * 3 + [0] * 3)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher", knows=True)


class Nothing(Section):
    pass


@dataclass
class World:
    """The runner of chains and the measurement, replaced by ones that note what they are asked for."""

    teacher: Path
    data: Path
    output: Path
    made: list[tuple[str, int]] = field(default_factory=list)
    measured: list[list[str]] = field(default_factory=list)
    failures: dict[str, BaseException] = field(default_factory=dict)

    def __call__(self, *methods: str, **changed: Any) -> Comparison:
        keys = {
            "teacher": str(self.teacher),
            "task": "sst2",
            "data": str(self.data),
            "methods": list(methods),
            "output": self.output,
            "seeds": 1,
        }
        return compare(CompareConfig(**{**keys, **changed}))

    def run_chain(self, chain: Any, context: Any, seed: int = 0) -> Path:
        self.made.append((chain.name, seed))
        if chain.name in self.failures:
            raise self.failures[chain.name]
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(context.teacher)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        folder: Path = context.output / "models" / chain.name / f"seed-{seed}" / "model"
        model.save_pretrained(str(folder))
        AutoTokenizer.from_pretrained(context.teacher).save_pretrained(str(folder))
        return folder

    def measure(self, folders: Any, fingerprints: Any, setting: Any, progress: Any) -> Measured:
        self.measured.append(list(folders))
        for folder in folders.values():
            assert (folder / "model.safetensors").exists()
        timings = [Timing(1, setting.length, 1, 2.0, 3.0)]
        costs = {name: Cost(timings, 500.0, 1000 + i, 0.5) for i, name in enumerate(folders)}
        return Measured(setting.key, dict(fingerprints), costs, {}, ["Energy was made up."])


@pytest.fixture
def world(teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """`kd` and `pkd` train, `halve` and `round` do not."""
    world = World(teacher, data, tmp_path / "comparison")
    known = {
        name: Method(name, kind, f"what {name} does", None, Nothing, None, lambda *_: None, recovers=False)
        for name, kind in (("halve", "pruning"), ("round", "quantisation"))
    }
    monkeypatch.setattr(steps, "methods", lambda: known)
    monkeypatch.setattr(steps, "_recipes", lambda: ["kd", "pkd"])
    monkeypatch.setattr(steps, "find_method", known.__getitem__)
    monkeypatch.setattr(run, "run_chain", world.run_chain)
    monkeypatch.setattr(run, "chain_record", lambda chain, context, seed: run_record(chain.name, 10.0 + seed))
    monkeypatch.setattr(run, "measure_costs", world.measure)
    monkeypatch.setattr(pictures, "draw", lambda comparison, folder: [])
    monkeypatch.setattr(page, "write_page", lambda folder, comparison: folder)
    return world


def run_record(name: str, seconds: float) -> Any:
    from fastdistil.compare.chain import Record

    return Record(name, seconds, [f"{name} has a note"] if name == "round" else [])


def rows(comparison: Comparison) -> dict[str, Any]:
    return {row.method: row for row in comparison.rows}


def test_a_row_for_the_teacher_and_each_method_with_all_that_was_found(world):
    comparison = world("kd", "halve+round")
    assert [row.method for row in comparison.rows] == ["teacher", "kd", "halve+round"]
    assert [row.kind for row in comparison.rows] == ["teacher", "distillation", "chain"]
    assert comparison.reference.score > 0.9
    assert comparison.reference.disk_bytes == bytes_on_disk(world.teacher)
    row = rows(comparison)["halve+round"]
    assert row.folder == "models/halve+round/seed-0/model"
    assert row.description == "what halve does; then what round does"
    assert row.parameters == comparison.reference.parameters
    assert (row.sequences_per_second, row.peak_bytes, row.joules, row.seconds) == (500.0, 1002, 0.5, 10.0)
    assert comparison.held_out == "Scores on the 40 validation examples of sst2."
    assert comparison.machine["torch"] == torch.__version__
    assert read_comparison(world.output) == comparison
    assert (world.output / "results.md").read_text().startswith("# sst2")


def test_scores_are_those_of_each_seed_and_the_deviation_is_over_them(world):
    comparison = world("kd", "halve", seeds=3)
    assert world.made == [("kd", 0), ("kd", 1), ("kd", 2), ("halve", 0)]
    row = rows(comparison)["kd"]
    assert len(row.scores) == 3
    assert len({score["accuracy"] for score in row.scores}) > 1
    assert row.deviation > 0
    assert row.seconds == pytest.approx(11.0)
    assert rows(comparison)["halve"].deviation is None
    assert comparison.seeds == [0, 1, 2]


def test_what_is_finished_is_not_repeated(world):
    first = world("kd", "halve", seeds=2)
    before = (list(world.made), list(world.measured))
    again = world("kd", "halve", seeds=2)
    assert (world.made, world.measured) == before
    assert again.rows == first.rows


def test_an_interrupted_comparison_goes_on_where_it_stopped(world):
    world.failures["round"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world("halve", "round", "kd")
    partial = read_comparison(world.output)
    assert [row.method for row in partial.rows] == ["teacher", "halve"]
    assert partial.rows[1].score is not None
    assert world.measured == []

    world.failures.clear()
    comparison = world("halve", "round", "kd")
    assert world.made == [("halve", 0), ("round", 0), ("round", 0), ("kd", 0)]
    assert [row.error for row in comparison.rows] == [None] * 4
    assert world.measured == [["teacher", "halve", "round", "kd"]]


def test_another_method_or_seed_is_added_and_all_are_measured_together_again(world):
    world("halve")
    world("halve", "kd")
    world("halve", "kd", seeds=2)
    assert world.made == [("halve", 0), ("kd", 0), ("kd", 1)]
    # The second seed is not measured.
    assert world.measured == [["teacher", "halve"], ["teacher", "halve", "kd"]]


def test_fewer_methods_need_no_measuring(world):
    world("halve", "kd")
    comparison = world("kd")
    assert [row.method for row in comparison.rows] == ["teacher", "kd"]
    assert len(world.measured) == 1
    assert rows(comparison)["kd"].peak_bytes == 1002


def test_a_model_that_is_gone_is_made_again(world):
    world("halve")
    (world.output / "models").rename(world.output / "moved")
    world("halve")
    assert world.made == [("halve", 0)] * 2
    assert len(world.measured) == 2


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UserError("a rank of 99 is larger\nthan the matrix"), "a rank of 99 is larger than the matrix"),
        (RunError("the loss is not finite"), "the loss is not finite"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_method_that_fails_is_a_row_with_its_error_and_the_others_go_on(world, error, shown):
    world.failures["halve"] = error
    comparison = world("halve", "kd")
    failed, fine = comparison.rows[1:]
    assert (failed.error, failed.score, failed.timings) == (shown, None, [])
    assert fine.error is None
    assert fine.score is not None
    assert world.measured == [["teacher", "kd"]]
    assert read_comparison(world.output).rows[1].error == shown
    tracebacks = list(world.output.glob("rows/halve/*.traceback.txt"))
    assert len(tracebacks) == (0 if isinstance(error, UserError | RunError) else 1)


def test_a_method_that_failed_is_tried_again(world):
    world.failures["halve"] = UserError("not today")
    world("halve", "kd")
    world.failures.clear()
    comparison = world("halve", "kd")
    assert world.made == [("halve", 0), ("kd", 0), ("halve", 0)]
    assert comparison.rows[1].error is None


def test_a_seed_that_fails_ends_its_method(world):
    original = world.run_chain

    def second_fails(chain: Any, context: Any, seed: int = 0) -> Path:
        if seed == 1:
            world.made.append((chain.name, seed))
            raise RunError("the loss is not finite")
        return original(chain, context, seed)

    run.run_chain = second_fails  # put back by the fixture's monkeypatch
    row = rows(world("kd", seeds=3))["kd"]
    assert world.made == [("kd", 0), ("kd", 1)]
    assert row.error == "the loss is not finite"
    assert len(row.scores) == 1
    assert row.timings == []


def test_a_model_that_cannot_be_measured_is_a_row_with_its_error(world, monkeypatch):
    def measure(folders: Any, *others: Any) -> Measured:
        whole = world.measure(folders, *others)
        del whole.costs["halve"]
        return Measured(whole.key, whole.models, whole.costs, {"halve": "out of memory"}, [])

    monkeypatch.setattr(run, "measure_costs", measure)
    comparison = world("halve", "kd")
    assert rows(comparison)["halve"].error == "out of memory"
    assert rows(comparison)["kd"].error is None


def test_a_measurement_that_failed_is_tried_again(world, monkeypatch):
    original = run.measure_costs

    def measure(folders: Any, *others: Any) -> Measured:
        whole = original(folders, *others)
        del whole.costs["halve"]
        return Measured(whole.key, whole.models, whole.costs, {"halve": "out of memory"}, [])

    monkeypatch.setattr(run, "measure_costs", measure)
    assert rows(world("halve"))["halve"].error == "out of memory"
    monkeypatch.setattr(run, "measure_costs", original)
    row = rows(world("halve"))["halve"]
    assert (row.error, len(row.timings)) == (None, 1)
    assert world.made == [("halve", 0)]


def test_a_wrong_key_of_a_training_is_told_before_anything_is_made(world):
    with pytest.raises(UserError, match=r"unknown key run\.epoch: did you mean run\.epochs\?"):
        world("halve", "kd", overrides=["kd.run.epoch=2"])
    assert not world.made
    assert not world.output.exists()


def test_results_are_written_after_every_row(world, monkeypatch):
    written: list[list[str]] = []
    original = run.write_comparison

    def note(folder: Path, comparison: Comparison) -> None:
        written.append([row.method for row in comparison.rows])
        original(folder, comparison)

    monkeypatch.setattr(run, "write_comparison", note)
    world("halve", "kd")
    whole = ["teacher", "halve", "kd"]
    assert written == [whole[:1], whole[:2], whole, whole]


def test_the_command_of_a_row_makes_its_model_again(world):
    world.teacher = world.teacher.rename(world.teacher.with_name("the teacher"))
    try:
        comparison = world("kd", "halve", overrides=["kd.run.epochs=2"])
    finally:
        world.teacher.rename(world.teacher.with_name("teacher"))
    folder, data = world.teacher, world.data
    assert rows(comparison)["kd"].command == (
        f"fastdistil compress '{folder}' --method kd --task sst2 --data {data} --set kd.run.epochs=2 "
        "--seed 0 --output kd"
    )
    assert rows(comparison)["halve"].command == (
        f"fastdistil compress '{folder}' --method halve --task sst2 --data {data} --seed 0 --output halve"
    )
    assert rows(comparison)["teacher"].command == (
        f"fastdistil evaluate '{folder}' --task sst2 --data {data}"
    )


def test_the_command_of_a_row_learns_from_a_weak_teacher_where_the_comparison_does(world):
    command = rows(world("kd", allow_weak_teacher=True))["kd"].command
    assert "--allow-weak-teacher" in command.split()


def test_notes_of_methods_and_of_the_measurement_are_kept(world):
    comparison = world("round", "kd")
    assert comparison.notes == ["round: round has a note", "Energy was made up."]
    assert world("round", "kd").notes == comparison.notes


def test_another_comparison_in_the_folder_is_named(world, data, tmp_path):
    world("halve")
    elsewhere = tmp_path / "data"
    elsewhere.symlink_to(data)
    with pytest.raises(UserError, match=rf"another comparison: data was '{data}', is '{elsewhere}'"):
        world("halve", data=str(elsewhere))
    with pytest.raises(UserError, match="another comparison: max_length was 32, is 16"):
        world("halve", max_length=16)
    assert world.made == [("halve", 0)]


def test_a_comparison_goes_on_whatever_the_spelling_of_its_paths(world, monkeypatch):
    first = world("halve")
    again = world("halve", teacher=f"{world.teacher}/", data=f"{world.data.parent}/./{world.data.name}")
    assert world.made == [("halve", 0)]
    assert again.rows == first.rows
    monkeypatch.setenv("HOME", str(world.output.parent))
    monkeypatch.chdir(world.teacher.parent)
    relative = {"teacher": f"./{world.teacher.name}/", "output": Path("~/relative")}
    world("halve", **relative)
    kept = json.loads((world.output.parent / "relative" / "compare.json").read_text())
    assert kept["teacher"]["source"] == world.teacher.name
    assert kept["data"] == str(world.data)


def test_a_chain_in_a_file_may_not_have_the_name_of_the_teachers_row(world, tmp_path):
    file = tmp_path / "teacher.yaml"
    file.write_text("steps: [{method: halve}]\n")
    message = f"{file}: the row of the teacher itself has that name; rename the file"
    with pytest.raises(UserError, match=re.escape(message)):
        world(str(file))
    assert not world.output.exists()


def test_another_teacher_in_the_folder_is_named(world, tmp_path):
    world("halve")
    before, other = world.teacher, make_teacher(tmp_path / "other", knows=True)
    world.teacher = other
    with pytest.raises(UserError, match=rf"teacher\.source was '{before}', is '{other}'"):
        world("halve")


def test_a_method_made_with_other_options_is_named_before_anything_is_made(world):
    world("kd", overrides=["kd.run.epochs=2"])
    with pytest.raises(UserError, match=r"kd was made otherwise: steps\.0\.options\.run\.epochs was 2, is 3"):
        world("halve", "kd", overrides=["kd.run.epochs=3"])
    assert world.made == [("kd", 0)]


def test_a_folder_of_something_else_is_left_alone(world, tmp_path):
    world.output.mkdir()
    (world.output / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no comparison"):
        world("halve")
    assert [file.name for file in world.output.iterdir()] == ["thesis.txt"]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        world("halve", output=file)


def test_a_teacher_at_chance_is_refused_and_leaves_the_folder_free(world, tmp_path):
    world.teacher = make_teacher(tmp_path / "ignorant", knows=False)
    with pytest.raises(UserError, match=r"chance is 0\.5000: .*fastdistil train finetune --teacher"):
        world("halve")
    assert not world.output.exists()
    assert len(world("halve", allow_weak_teacher=True).rows) == 2


def test_an_unknown_method_is_told_before_anything_is_loaded(world):
    with pytest.raises(UserError, match="unknown method 'halv': did you mean halve"):
        world("halv", teacher="nowhere")


def test_more_tokens_than_positions(world):
    with pytest.raises(UserError, match=r"max_length is 64, but .* has only 32 positions"):
        world("halve", max_length=64)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": [1, 2]}, {"a": [1, 2]}, None),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a.1 was 2, is 3"),
        ({"a": [1, 2]}, {"a": [1]}, "a was [1, 2], is [1]"),
        ({"a": 1}, {"a": 1, "b": 2}, "b was None, is 2"),
    ],
)
def test_the_first_difference_is_named_by_its_key(old, new, expected):
    assert difference(old, new) == expected


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_in_the_middle_nothing_that_is_finished_is_done_again(teacher, data, tmp_path):
    output = tmp_path / "killed"
    methods = "bf16,prune-ffn:0.5,low-rank:0.5,prune-layers:1+bf16"
    command = [
        *(sys.executable, "-m", "fastdistil", "compare", str(teacher), "--task", "sst2"),
        *("--data", str(data), "--methods", methods, "--output", str(output)),
        *("--set", "prune-ffn.recover=false", "--set", "low-rank.recover=false"),
        *("--set", "prune-layers.recover=false"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def times() -> dict[Path, int]:
        files = [*output.glob("models/*/*/step.json"), *output.glob("rows/*/*.json")]
        return {file: file.stat().st_mtime_ns for file in files}

    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: (output / "rows" / "prune-ffn-0.5" / "seed-0.json").exists(), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = times()
    assert len(finished) >= 5
    assert len(read_comparison(output).rows) >= 2

    subprocess.run(command, env=environment, check=True, capture_output=True)
    first, comparison = times(), read_comparison(output)
    assert {file: first[file] for file in finished} == finished
    assert [row.error for row in comparison.rows] == [None] * 5
    assert all(len(row.timings) == 2 and row.peak_bytes for row in comparison.rows)
    assert comparison.smaller(comparison.rows[1]) > 1.5

    measured = (output / "timings.json").read_bytes()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert times() == first
    assert (output / "timings.json").read_bytes() == measured
