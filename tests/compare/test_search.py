"""A search measures structures, trains few of those that meet the target, and says what could be met."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from fastdistil.compare import search
from fastdistil.compare.results import Timing
from fastdistil.compare.search import Measured, Target, candidate_chains, compress_for_target, parse_size
from fastdistil.data.noise import permutation
from fastdistil.errors import RunError, UserError

WORDS = ["a", "fine", "dull", "film", "plot", "scene", "quite", "very", "not", "and"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20MB", 20_000_000),
        ("1.5 GB", 1_500_000_000),
        ("900k", 900_000),
        ("4KiB", 4096),
        ("2 mib", 2 * 2**20),
        ("20971520", 20_971_520),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "20 apples", "-3MB", "1,5MB", "20MBit"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(
        UserError, match=r"^a size is a number and a unit \(kB, MB, GB, KiB, MiB, GiB\), got '"
    ):
        parse_size(text)


def test_a_size_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"^a size must be at least a byte, got '0.1'$"):
        parse_size("0.1")


@pytest.mark.parametrize("speedup", [1.0, -2.0, float("nan")])
def test_a_target_speedup_that_is_no_gain_is_refused(speedup):
    with pytest.raises(UserError, match=r"^--target-speedup must be > 1, got"):
        Target(speedup, None)


def test_a_search_without_a_target_is_refused():
    with pytest.raises(
        UserError, match=r"^a search needs a target: --target-speedup, --target-size or both$"
    ):
        Target(None, None)


@pytest.mark.parametrize(
    ("target", "share"),
    [
        (Target(4.0, None), 0.75),
        (Target(None, 5_000_000), 0.5),
        (Target(2.0, 5_000_000), 0.5),
        (Target(3.0, 10**8), 1),
    ],
)
def test_of_two_targets_the_one_met_less_counts(target, share):
    assert target.share(Measured(10_000_000, 3.0)) == share


def test_candidates_of_twelve_layers():
    assert candidate_chains(12, 384) == [
        "bf16",
        "onnx-int8",
        "onnx-int8:4",
        "prune-ffn:0.5+onnx-int8",
        "prune-layers:8+onnx-int8",
        "prune-heads:0.5+prune-ffn:0.5+onnx-int8",
        "prune-layers:6+onnx-int8",
        "prune-layers:6+onnx-int8:4",
        "prune-layers:6+factorize-embeddings:96+onnx-int8",
        "prune-layers:6+prune-ffn:0.5+onnx-int8",
        "prune-layers:4+onnx-int8",
        "prune-layers:4+factorize-embeddings:96+onnx-int8",
        "prune-layers:3+onnx-int8",
        "prune-layers:3+factorize-embeddings:96+onnx-int8",
        "prune-layers:6+prune-heads:0.5+prune-ffn:0.5+onnx-int8",
        "prune-layers:4+prune-ffn:0.5+onnx-int8",
        "prune-layers:6+prune-heads:0.5+prune-ffn:0.75+onnx-int8",
        "prune-layers:3+prune-ffn:0.5+onnx-int8",
        "prune-layers:3+prune-heads:0.5+prune-ffn:0.5+onnx-int8",
        "prune-layers:2+prune-ffn:0.5+onnx-int8",
        "prune-layers:2+factorize-embeddings:96+prune-heads:0.5+prune-ffn:0.75+onnx-int8",
        "prune-layers:1+factorize-embeddings:96+prune-heads:0.5+prune-ffn:0.75+onnx-int8",
        "prune-layers:1+factorize-embeddings:96+prune-heads:0.5+prune-ffn:0.75+onnx-int8:4",
    ]


def test_candidates_of_a_shallow_model_are_different_and_keep_fewer_layers_than_it_has():
    for depth in (1, 2, 3):
        chains = candidate_chains(depth, 128)
        assert len(chains) == len(set(chains))
        assert not [chain for chain in chains if f"prune-layers:{depth}+" in chain]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A BERT of 4 layers × 32 with a head for sst2, random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from fastdistil.data.tokenizer import train_wordpiece

    tokenizer = train_wordpiece([" ".join(WORDS)] * 3, 80)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher") / "sst2"
    BertForSequenceClassification(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 60), ("validation", 20)):
        rows = [{"sentence": " ".join(rng.choices(WORDS, k=6)), "label": i % 2} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Fakes:
    """Chains that are made at once: their speed, bytes and score are invented."""

    def __init__(self) -> None:
        names = candidate_chains(4, 32)
        self.speedups = {name: 1.5 + i for i, name in enumerate(names)}
        self.sizes = {name: 1000 - 10 * i for i, name in enumerate(names)}
        self.scores = {name: 0.9 - 0.01 * i for i, name in enumerate(names)}
        self.failing: set[str] = set()
        self.failing_structures: set[str] = set()
        self.structures: list[str] = []
        self.trained: list[str] = []
        self.timed: list[list[str]] = []

    def run_chain(self, chain, context, seed=0, *, train=True):
        (self.trained if train else self.structures).append(chain.name)
        if chain.name in (self.failing if train else self.failing_structures):
            raise RuntimeError("it broke\nin many lines")
        folder = context.output / ("models" if train else "structures") / chain.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(bytes(self.sizes[chain.name]))
        return folder

    def measure(self, models, **keywords):
        self.timed.append(list(models))
        assert keywords["threads"] == keywords["batch_sizes"] == [1]
        return {name: [Timing(1, 24, 1, 30 / self.speedups.get(name, 1), 0)] for name in models}


@pytest.fixture
def fakes(monkeypatch) -> Fakes:
    fakes = Fakes()
    monkeypatch.setattr(search, "run_chain", fakes.run_chain)
    monkeypatch.setattr(search, "measure", fakes.measure)
    monkeypatch.setattr(search._Search, "_score", lambda self, folder: fakes.scores[folder.name])
    record = type("Record", (), {"notes": ["a note of a step"]})
    monkeypatch.setattr(search, "chain_record", lambda chain, context, seed: record)

    def finish(source, made, chain, output, task, data, notes, command):
        fakes.command = command
        return chain.name, notes

    monkeypatch.setattr(search, "finish_single", finish)
    return fakes


@pytest.fixture
def find(fakes, teacher, data, tmp_path):
    def find(speedup=None, size=None, **keywords):
        keywords = {"say": lambda text: None, **keywords}
        return compress_for_target(
            str(teacher), "sst2", str(data), tmp_path / "out", speedup, size, **keywords
        )

    return find


def test_the_mildest_that_meet_the_target_are_trained(find, fakes):
    find(4.0)
    met = [name for name, speedup in fakes.speedups.items() if speedup >= 4]
    assert list(dict.fromkeys(fakes.trained)) == met[:3]


def test_candidates_sets_how_many_are_trained(find, fakes):
    find(4.0, candidates=2)
    assert len(set(fakes.trained)) == 2


def test_the_best_score_is_chosen_not_the_mildest_chain(find, fakes):
    third = candidate_chains(4, 32)[2]
    fakes.scores[third] = 0.95
    assert find(1.2)[0] == third


def test_of_equal_scores_the_mildest_is_chosen(find, fakes):
    fakes.scores = dict.fromkeys(fakes.scores, 0.8)
    assert find(1.2)[0] == "bf16"


def test_only_what_is_small_enough_is_trained(find, fakes):
    find(None, "955")
    assert [fakes.sizes[name] <= 955 for name in fakes.trained] == [True] * len(fakes.trained)
    assert fakes.sizes[fakes.trained[0]] == 950


def test_both_targets_are_met(find, fakes):
    find(2.0, "955", candidates=1)
    name = fakes.trained[0]
    assert fakes.speedups[name] >= 2
    assert fakes.sizes[name] <= 955


def test_all_structures_are_timed_together_beside_the_teacher(find, fakes):
    find(4.0)
    assert fakes.timed == [["teacher", *candidate_chains(4, 32)]]


def test_a_target_that_no_chain_meets_names_the_nearest_and_keeps_the_measurements(find, fakes, tmp_path):
    last = candidate_chains(4, 32)[-1]
    with pytest.raises(UserError) as caught:
        find(100.0)
    assert "\n" not in str(caught.value)
    assert f" 100× faster on this machine; the nearest is {last}: {fakes.speedups[last]:.1f}× faster" in str(
        caught.value
    )
    assert not fakes.trained
    kept = json.loads((tmp_path / "out" / "search.json").read_text())["measured"]
    assert kept[last]["speedup"] == pytest.approx(fakes.speedups[last])


def test_the_nearest_to_two_targets_misses_neither_by_much(find, fakes):
    names = candidate_chains(4, 32)
    fakes.speedups = dict.fromkeys(names, 2.0) | {names[0]: 40.0, names[1]: 9.0}
    fakes.sizes = dict.fromkeys(names, 500) | {names[0]: 10_000, names[1]: 110}
    with pytest.raises(
        UserError, match=rf" 10× faster and at most 0.0001 MB .* the nearest is {names[1]}: 9.0×"
    ):
        find(10.0, "100")


def test_a_second_search_measures_nothing_again(find, fakes):
    with pytest.raises(UserError, match="the nearest is"):
        find(100.0)
    structures = len(fakes.structures)
    find(4.0)
    assert len(fakes.timed) == 1
    assert len(fakes.structures) == structures


def test_a_search_of_another_length_of_recovery_measures_again(find, fakes):
    find(4.0)
    find(4.0, overrides=["recover.run.epochs=2"])
    assert len(fakes.timed) == 2


def test_a_structure_that_cannot_be_made_is_left_out(find, fakes, tmp_path):
    fakes.failing_structures = {"onnx-int8"}
    find(1.2)
    assert "onnx-int8" not in fakes.timed[0]
    assert json.loads((tmp_path / "out" / "search.json").read_text())["errors"] == {
        "onnx-int8": "RuntimeError: it broke in many lines"
    }


def test_a_chain_that_fails_in_training_is_replaced_by_the_next(find, fakes):
    names = candidate_chains(4, 32)
    fakes.failing = {names[0]}
    chosen, _ = find(1.2, candidates=2)
    assert chosen == names[1]
    assert list(dict.fromkeys(fakes.trained)) == names[:3]


def test_all_failing_is_one_line(find, fakes):
    fakes.failing = set(candidate_chains(4, 32))
    with pytest.raises(
        RunError, match=r"^none of the \d+ chains .* could be made: bf16: RuntimeError: it broke in many"
    ):
        find(1.2)


def test_structures_are_removed_once_they_are_measured(find, tmp_path):
    find(4.0)
    assert not (tmp_path / "out" / "structures").exists()
    assert (tmp_path / "out" / "models").exists()


def test_the_result_says_how_it_was_chosen(find):
    chosen, notes = find(4.0, candidates=1)
    assert notes[0].startswith("chosen for 4× faster among")
    assert notes[1:] == [f"{chosen}: accuracy 0.8700 on held-out training examples", "a note of a step"]


def test_the_card_tells_the_command_of_the_search(find, fakes):
    find(4.0, candidates=1)
    assert "--target-speedup 4.0 --candidates 1 --task sst2" in fakes.command


def test_held_out_examples_are_those_that_training_leaves_out(teacher, data, tmp_path):
    from fastdistil.data.tasks import find_task, read_examples

    found = search._Search(str(teacher), "sst2", str(data), tmp_path / "out", (), 0, print, False)
    train = read_examples(find_task("sst2"), str(data), "train")
    rows = permutation(60, 0, 0).numpy()[:6]
    assert found.held_out.texts == [train.texts[row] for row in rows]
    assert np.array_equal(found.held_out.labels, train.labels[rows])
    assert found.context.validation_fraction == 0.1


def test_steps_must_train_on_the_same_examples(find):
    with pytest.raises(UserError, match=r"^a search needs the same task.max_examples for all steps"):
        find(4.0, overrides=["prune-ffn.recover.task.max_examples=20"])


def test_a_folder_of_something_else_is_refused(find, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"is not empty and holds no search: choose another --output$"):
        find(4.0)


@pytest.mark.slow
def test_a_real_search(teacher, data, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    texts = ["bf16", "onnx-int8", "prune-layers:2+prune-ffn:0.5+onnx-int8"]
    monkeypatch.setattr(search, "candidate_chains", lambda num_layers, hidden_size: texts)
    result = compress_for_target(
        str(teacher),
        "sst2",
        str(data),
        tmp_path / "out",
        None,
        "1MB",
        overrides=["recover.run.batch_size=16", "recover.allow_weak_teacher=true"],
        say=lambda text: None,
    )
    state = json.loads((tmp_path / "out" / "search.json").read_text())
    assert state["errors"] == {}
    assert list(state["scores"]) == texts
    assert state["scores"][result.chain] == max(state["scores"].values())
    assert result.after.disk_bytes == state["measured"][result.chain]["disk_bytes"]
    assert (result.path / "config.json").is_file()
