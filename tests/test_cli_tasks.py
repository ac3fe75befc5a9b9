"""The command line on tasks, pairs of sentences and recipes."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml

from fastdistil.cli import main
from fastdistil.recipes import RecipeInfo, list_recipes, load_recipe

transformers = pytest.importorskip("transformers")

WORDS = [*(f"w{i}" for i in range(40)), "."]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models, one for SST-2 and one for pretraining, and the files of two tasks and of some text."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate([*SPECIAL, *WORDS])})
    for name, head in (("classifier", "SequenceClassification"), ("pretrained", "PreTraining")):
        getattr(transformers, f"BertFor{head}")(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for task, columns in (("sst2", ["sentence"]), ("mrpc", ["sentence1", "sentence2"])):
        (root / "data" / task).mkdir(parents=True)
        rows = [{**dict.fromkeys(columns, f"w{i} w{i + 1}"), "label": i % 2} for i in range(20)]
        (root / "data" / task / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [{"title": f"t{i // 4}", "text": f"w{i % 40} w{3 * i % 40} ."} for i in range(80)]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    names = ["classifier", "pretrained", "data", "text.jsonl"]
    return {name.removesuffix(".jsonl"): str(root / name) for name in names}


@pytest.fixture(autouse=True)
def one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pass costs is measured in its own tests."""
    from fastdistil.evaluate import Latency, summary

    latency = [Latency(b, 16, 1, 1.0, 2.0, 30) for b in (1, 8)]
    monkeypatch.setattr(summary, "measure_latency", lambda models, length: dict.fromkeys(models, latency))
    monkeypatch.setattr(summary, "measure_peak_memory", lambda folder, **shape: 5_000_000)


def test_evaluate_a_task(capsys: pytest.CaptureFixture[str], folders: dict[str, str]) -> None:
    task = ["--task", "SST-2", "--data", folders["data"], "--max-length", "8"]
    assert main(["evaluate", folders["classifier"], *task]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    told = {label: value.strip() for label, value in told.items()}
    assert list(told) == [
        "model",
        "parameters",
        "size on disk",
        "task",
        "truncated",
        "accuracy",
        "chance",
        "latency, cpu",
        "peak memory, cpu",
    ]
    assert told["task"] == "sst2, 20 examples of split validation"
    assert told["truncated"] == "0 of 20 texts, to 8 tokens"
    assert told["chance"] == "50.00%"
    assert told["peak memory, cpu"] == "5.0 MB at 8 × 16 tokens"

    assert main(["evaluate", folders["classifier"], *task, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["model"] == folders["classifier"]
    assert f"{plain['parameters'] / 1e6:.2f} M" == told["parameters"]
    assert plain["task"]["name"] == "sst2"
    assert plain["task"]["examples"] == 20
    assert f"{plain['task']['scores']['accuracy']:.2%}" == told["accuracy"]
    assert plain["task"]["mean"] == plain["task"]["scores"]["accuracy"]
    assert [one["batch_size"] for one in plain["latency"]["cpu"]] == [1, 8]
    assert plain["peak_bytes"] == {"cpu": 5_000_000}


def test_prepare_pairs_then_evaluate_both_of_berts_tasks(
    capsys: pytest.CaptureFixture[str], folders: dict[str, str], tmp_path: Path
) -> None:
    from fastdistil.data.token_store import TokenStore

    def prepare(name: str, *more: str) -> TokenStore:
        arguments = ["prepare", folders["text"], "--tokenizer", folders["pretrained"], "--max-length", "16"]
        pairs = ["--pairs", "--document-column", "title"]
        assert main([*arguments, *pairs, *more, "--output", str(tmp_path / name)]) == 0
        return TokenStore.open(tmp_path / name)

    store = prepare("store")
    printed = capsys.readouterr().out
    tokens = store.meta.num_tokens
    assert printed == f"{tmp_path / 'store'}: {len(store)} sentence pairs of 16, {tokens} tokens\n"
    assert set(store.pairs["next_sentence"]) == {0, 1}
    again, other = (prepare(f"seed-{seed}", "--seed", str(seed)) for seed in (0, 1))
    assert again.meta.sha256 == store.meta.sha256
    assert other.meta.sha256 != store.meta.sha256
    capsys.readouterr()

    corpus = ["--corpus", str(tmp_path / "store"), "--max-length", "16"]
    assert main(["evaluate", folders["pretrained"], *corpus]) == 0
    printed = capsys.readouterr().out
    assert "next-sentence accuracy  " in printed
    assert f"of {len(store)} sequences" in printed


PREPARE = ["prepare", "{text}", "--tokenizer", "{pretrained}", "--output", "{data}/new"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evaluate", "{classifier}", "--task", "sts2"], "unknown task 'sts2'; did you mean"),
        (["evaluate", "{classifier}", "--data", "{data}"], "--data is for --task"),
        (
            ["evaluate", "{classifier}", "--task", "sst2", "--max-sequences", "9"],
            "--max-sequences is for --cor",
        ),
        (
            ["evaluate", "{classifier}", "--task", "sst2", "--text-column", "a"],
            "--text-column is for --corpus",
        ),
        (
            ["evaluate", "{classifier}", "--task", "sst2", "--corpus", "{text}"],
            "--task and --corpus exclude each other",
        ),
        (["evaluate", "{classifier}", "--task", "rte", "--data", "{data}"], "{data}: no .parquet"),
        (
            ["evaluate", "{classifier}", "--task", "sst2", "--data", "{data}/no"],
            "{data}/no: there is no such",
        ),
        (
            ["evaluate", "{classifier}", "--task", "sst2", "--data", "{data}", "--split", "test"],
            "no file of split 'test'; those there are validation",
        ),
        (
            ["evaluate", "{pretrained}", "--task", "sst2", "--data", "{data}"],
            "fine-tune one first: fastdistil train finetune --teacher {pretrained} --task sst2",
        ),
        (
            [*PREPARE, "--seed", "0"],
            "--seed is for --pairs: add it, or leave --seed out",
        ),
        (
            [*PREPARE, "--document-column", "title"],
            "--document-column is for --pairs",
        ),
        (
            [*PREPARE, "--pairs", "--document-column", "author"],
            "'author'",
        ),
        (["recipes", "pdk"], "unknown recipe 'pdk': did you mean pkd?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], folders: dict[str, str], arguments: list[str], line: str
) -> None:
    assert main([argument.format(**folders) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (printed,) = captured.err.splitlines()
    assert line.format(**folders) in printed
    assert not (Path(folders["data"]) / "new").exists()


def test_recipes_lists_what_each_is_checked_against_and_whether_it_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = "benchmarks/results/somewhere/new.md"
    new = RecipeInfo("new", "What it does.", "A 2020, B", None, "its code", ("a", "b"), results)
    old = RecipeInfo("old", "What it did. " * 20, "A 2019, B", "equation 1", None, (), None)
    monkeypatch.setattr("fastdistil.recipes.list_recipes", lambda: [new, old])
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "new\n"
        "    What it does.\n"
        "    paper            A 2020, B\n"
        "    checked against  its code\n"
        "    variants         new:a, new:b\n"
        f"    status           measured here: {results}\n"
        "\n"
        "old\n"
    )
    assert printed.endswith(
        "    paper            A 2019, B\n"
        "    equations        equation 1\n"
        "    status           not measured here\n"
    )


def test_the_list_of_recipes_fits_100_columns_and_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in "".join(lines)
    names = [line for line in lines if line and not line.startswith(" ")]
    assert names == [info.name for info in list_recipes()]
    assert sum(line.startswith("    status  ") for line in lines) == len(names)


def test_a_recipe_is_shown_with_its_grid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "pkd"]) == 0
    printed = capsys.readouterr().out
    file = resources.files("fastdistil.recipes") / "pkd.yaml"
    assert printed == file.read_text(encoding="utf-8").strip() + "\n"
    assert yaml.safe_load(printed) == load_recipe("pkd")
    assert "objectives.1.weight: [10, 100, 500, 1000]" in printed
