"""The quickstart makes its own teacher, the same every time, and compares every method on it."""

from pathlib import Path

import pytest
import torch

from fastdistil.compare import quickstart
from fastdistil.compare.quickstart import METHODS, compare_quickstart, make_teacher, quickstart_config
from fastdistil.compare.steps import parse_chain, parse_chains
from fastdistil.data import task_files
from fastdistil.data.machine_task import LIBRARIES
from fastdistil.data.task_files import Table
from fastdistil.errors import UserError


def test_methods_and_their_budget_are_known():
    config = quickstart_config(Path("runs/quick"))
    chains = parse_chains(config.methods, config.overrides)
    kinds = {chain.kind for chain in chains}
    assert kinds >= {"distillation", "pruning", "quantisation", "low rank", "sharing", "clustering", "chain"}
    recovering = next(chain for chain in chains if chain.name == "prune-ffn:0.5").steps[0].recover
    assert recovering["task.max_examples"] == 6400
    distilling = next(chain for chain in chains if chain.name == "kd:3-layers").steps[0].options
    assert distilling["run.epochs"] == 1


def test_methods_that_do_not_train_have_no_budget():
    assert quickstart_config(Path("runs/quick"), ["bf16"]).overrides == []


def test_an_override_of_the_user_goes_last():
    config = quickstart_config(Path("runs/quick"), ["prune-ffn"], ["prune-ffn.recover.run.epochs=3"])
    assert parse_chain("prune-ffn", config.overrides).steps[0].recover["run.epochs"] == 3


def test_the_teacher_is_made_beside_the_comparison(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(quickstart, "make_teacher", lambda folder: calls.append(folder))
    monkeypatch.setattr(quickstart, "compare", lambda config: calls.append(config))
    compare_quickstart(tmp_path / "quick", seeds=2)
    assert calls[0] == tmp_path / "quick-teacher"
    assert calls[1].teacher == str(tmp_path / "quick-teacher" / "model")
    assert calls[1].task == "libraries"
    assert calls[1].output == tmp_path / "quick"
    assert calls[1].methods == list(METHODS)
    assert calls[1].seeds == 2
    assert calls[1].rounds == 5
    compare_quickstart(tmp_path / "quick", rounds=2)
    assert calls[3].rounds == 2


@pytest.mark.parametrize("output", [".", "..", "inner/.."])
def test_the_folder_of_a_comparison_may_be_the_one_where_it_is_run(monkeypatch, tmp_path, output):
    (tmp_path / "quick" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "quick" / "inner" if output == ".." else tmp_path / "quick")
    assert quickstart_config(Path(output)).teacher == str(tmp_path / "quick-teacher" / "model")


def test_the_home_folder_is_spelled_out(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(quickstart, "make_teacher", folders.append)
    monkeypatch.setattr(quickstart, "compare", lambda config: folders.append(config.output))
    compare_quickstart(Path("~/quick"))
    assert folders == [tmp_path / "quick-teacher", tmp_path / "quick"]


def table(split: str) -> Table:
    words = ("array", "column", "graph", "figure", "tensor", "symbol", "token", "file")
    count = 12 if split == "train" else 4
    rows = [
        (f"The {words[i]} number {n} of them.", library)
        for n in range(count)
        for i, library in enumerate(LIBRARIES)
    ]
    return Table(
        "rows", ("sentence", "label"), {"sentence": [r[0] for r in rows], "label": [r[1] for r in rows]}
    )


@pytest.fixture
def tiny(monkeypatch):
    """A task and a teacher that are trained in a moment."""
    from fastdistil.data import machine_task

    monkeypatch.setattr(machine_task, "library_table", table)
    assert task_files.read_hub("machine", "libraries", "train", set()) == table("train")
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    monkeypatch.setattr(quickstart, "_SIZES", quickstart._SIZES | sizes)
    monkeypatch.setattr(quickstart, "_VOCAB_SIZE", 100)
    monkeypatch.setattr(
        quickstart,
        "_TEACHER",
        ("run.epochs=2", "run.batch_size=24", "run.log_every=4", "task.max_length=16", "run.precision=fp32"),
    )


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_the_teacher_can_be_compressed_and_is_made_once(tiny, tmp_path):
    from fastdistil.data.tasks import find_task
    from fastdistil.models.task import load_task_model

    folder = tmp_path / "quick-teacher"
    make_teacher(folder)
    model, tokenizer = load_task_model(folder / "model", find_task("libraries"), new_head=False)
    assert [model.config.id2label[i] for i in range(8)] == list(LIBRARIES)
    assert model.config.max_position_embeddings == 128
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quick-teacher"]
    before = (folder / "results.json").stat().st_mtime_ns
    make_teacher(folder)
    assert (folder / "results.json").stat().st_mtime_ns == before


def test_an_interrupted_teacher_goes_on(tiny, tmp_path, monkeypatch):
    from fastdistil.train.task_run import TaskRun

    def interrupt(self):
        raise KeyboardInterrupt

    folder = tmp_path / "quick-teacher"
    with monkeypatch.context() as patch:
        patch.setattr(TaskRun, "_report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_teacher(folder)
    trained = weights(folder / "model")
    make_teacher(folder)
    assert (folder / "results.json").exists()
    assert all(torch.equal(value, trained[name]) for name, value in weights(folder / "model").items())


def test_the_start_is_the_same_every_time(tiny, tmp_path):
    torch.manual_seed(7)
    quickstart._make_start(tmp_path / "a")
    torch.manual_seed(8)
    quickstart._make_start(tmp_path / "b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == (tmp_path / "b" / "tokenizer.json").read_text()


def test_a_run_without_what_it_began_with_is_refused(tmp_path):
    folder = tmp_path / "quick-teacher"
    folder.mkdir()
    (folder / "config.yaml").write_text("recipe: finetune")
    with pytest.raises(
        UserError, match=r"is another run, or .*quick-teacher-start, which it began with, is gone"
    ):
        make_teacher(folder)


@pytest.mark.slow
def test_every_method_runs(tiny, tmp_path, monkeypatch):
    from fastdistil.compare import costs

    monkeypatch.setattr(costs, "measure_peak_memory", lambda folder, **keywords: 1)
    monkeypatch.setattr(quickstart, "_ROUNDS", 1)
    monkeypatch.setattr(quickstart, "_BUDGET", ("train.run.epochs=1", "train.run.batch_size=32"))
    monkeypatch.setattr(quickstart, "_TEACHER", (*quickstart._TEACHER, "run.epochs=30", "optimizer.lr=3e-3"))
    comparison = compare_quickstart(tmp_path / "quick")
    assert [row.method for row in comparison.rows] == ["teacher", *METHODS]
    assert {row.method: row.error for row in comparison.rows if row.error} == {}
    assert all(row.timings and row.scores for row in comparison.rows)
    assert (tmp_path / "quick" / "report.html").is_file()
