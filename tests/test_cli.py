"""The command line: exit codes, and one line for every mistake."""

import errno
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdistil
from fastdistil.cli import main
from fastdistil.errors import RunError, UserError
from fastdistil.ops import implementations


def test_nothing_is_said_of_what_torchao_cannot_load() -> None:
    pytest.importorskip("torchao")
    code = "from fastdistil.cli import main; main(['--version']); import torchao"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastdistil {fastdistil.__version__}\n"
    assert done.stderr == ""


def _fails_with(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    """The exit code and the one line on stderr."""
    code = main(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return code, line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "fastdistil: Missing command; see fastdistil --help"),
        (["trian"], "fastdistil: No such command 'trian'. Did you mean 'train'?; see fastdistil --help"),
        (["train", "--teacer", "x"], "--teacher"),
        (["train", "x", "--resume=1"], "--resume"),
        (["prepare", "x"], "--tokenizer"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    code, printed = _fails_with(capsys, arguments)
    assert code == 2
    assert line in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["distilbrt"], "fastdistil: unknown recipe 'distilbrt': did you mean distilbert?"),
        (["distilbert", "--set", "run.stepz=3"], "unknown key run.stepz: did you mean run.steps?"),
        (["distilbert", "--set", "run.steps"], "'run.steps'"),
        (["distilbert", "--set", "objectives.0.temperature=0"], "objectives.0.temperature: "),
        (["distilbert", "--teacher", "x"], "--corpus"),
        (["distilbert", "--corpus", "x"], "--teacher"),
        (["minilm", "--corpus", "x"], "recipe minilm needs a teacher: --teacher ID_OR_DIR"),
        (
            ["minilm", "--teacher", "t", "--corpus", "x", "--set", "objectives.0.num_head=3"],
            "unknown key objectives.0.num_head: did you mean objectives.0.num_heads?",
        ),
        (["kd", "--teacher", "t"], "recipe kd needs a task: --task NAME (sst2, mrpc, ...)"),
        (["kd", "--task", "sst2"], "recipe kd needs a teacher: --teacher ID_OR_DIR"),
        (["kd", "--teacher", "t", "--task", "sst"], "unknown task 'sst'; did you mean 'sst2'?"),
        (
            ["kd:small", "--teacher", "t", "--task", "sst2"],
            "recipe kd has the variants 3-layers, alpha-0.2, alpha-0.7, not 'small'",
        ),
        (["mlm", "--teacher", "t", "--corpus", "c", "--task", "sst2"], "recipe mlm reads text, not a task"),
        (
            ["tinybert-task", "--teacher", "t", "--task", "sst2", "--set", "stages.1.run.epoch=3"],
            "unknown key stages.1.run.epoch: did you mean stages.1.run.epochs?",
        ),
        (["kd", "--teacher", "t", "--task", "sst2", "--seeds", "1"], "'--seeds'"),
    ],
)
def test_a_bad_recipe_or_key_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    pytest.importorskip("pydantic")
    code, printed = _fails_with(capsys, ["train", *arguments])
    assert code == 2
    assert line in printed


@pytest.fixture
def run_that(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the run behind `fastdistil train` by one that raises."""
    pytest.importorskip("pydantic")
    run_module = pytest.importorskip("fastdistil.train.run")

    def install(error: BaseException) -> None:
        def run(config: Any, resume: bool = False) -> None:
            raise error

        monkeypatch.setattr(run_module, "run", run)

    return install


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("corpus is empty:\n  a.txt"), 2, "fastdistil: corpus is empty: a.txt"),
        (RunError("loss is not finite at step 3"), 1, "fastdistil: loss is not finite at step 3"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            1,
            "fastdistil: No space left on device: runs/x",
        ),
        (KeyError("k"), 1, "fastdistil: KeyError: 'k' (--debug shows where)"),
    ],
)
def test_an_error_of_the_run_is_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], run_that: Any, error: Exception, code: int, line: str
) -> None:
    run_that(error)
    assert _fails_with(capsys, ["train", "quickstart"]) == (code, line)


def test_an_interrupted_run_says_how_to_resume_and_exits_130(
    capsys: pytest.CaptureFixture[str], run_that: Any
) -> None:
    run_that(KeyboardInterrupt())
    arguments = ["train", "quickstart", "--set", "run.steps=3", "--output", "a b"]
    expected = (
        130,
        "fastdistil: interrupted; resume with: "
        "fastdistil train quickstart --set run.steps=3 --output 'a b' --resume",
    )
    assert _fails_with(capsys, arguments) == expected
    assert _fails_with(capsys, [*arguments, "--resume"]) == expected


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], run_that: Any) -> None:
    run_that(UserError("corpus is empty"))
    assert main(["train", "quickstart", "--debug"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("fastdistil: corpus is empty\n")


def test_train_hands_its_options_to_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    run_module = pytest.importorskip("fastdistil.train.run")
    calls = []
    monkeypatch.setattr(run_module, "run", lambda config, resume: calls.append((config, resume)))
    options = ["--teacher", "t", "--corpus", "c", "--output", str(tmp_path), "--resume"]
    assert main(["train", "distilbert", *options, "--set", "seed=7", "--set", "optimizer.lr=1e-3"]) == 0
    ((config, resume),) = calls
    assert resume
    assert (config.teacher, config.data.corpus, config.output) == ("t", "c", tmp_path)
    assert (config.seed, config.optimizer.lr) == (7, 1e-3)


def test_train_hands_the_options_of_a_task_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydantic")
    run_module = pytest.importorskip("fastdistil.train.run")
    calls = []
    monkeypatch.setattr(run_module, "run", lambda config, resume: calls.append((config, resume)))
    arguments = ["train", "pkd:last", "--teacher", "t", "--task", "MRPC", "--data", "d"]
    assert main([*arguments, "--allow-weak-teacher", "--set", "run.epochs=2"]) == 0
    assert main(arguments) == 0
    (first, _), (second, _) = calls
    assert (first.task.name, first.task.data, first.teacher) == ("mrpc", "d", "t")
    assert (first.objectives[1].layers, first.run.epochs) == ("last", 2)
    assert str(first.output) == "runs/pkd-last-mrpc"
    assert (first.allow_weak_teacher, second.allow_weak_teacher) == (True, False)


def test_seeds_are_a_run_for_each_and_resume_as_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pydantic")
    seeds_module = pytest.importorskip("fastdistil.train.seeds")
    calls = []

    def run_seeds(config: Any, count: int, resume: bool) -> None:
        calls.append((config.seed, count, resume))
        if not resume:
            raise KeyboardInterrupt

    monkeypatch.setattr(seeds_module, "run_seeds", run_seeds)
    arguments = ["train", "kd", "--teacher", "t", "--task", "rte", "--seeds", "3", "--set", "seed=5"]
    code, line = _fails_with(capsys, arguments)
    assert code == 130
    again = line.removeprefix("fastdistil: interrupted; resume with: fastdistil ")
    assert main(shlex.split(again)) == 0
    assert calls == [(5, 3, False), (5, 3, True)]


def test_recipes_lists_each_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    names = [line for line in printed.splitlines() if line and not line.startswith(" ")]
    assert {"distilbert", "minilm", "mlm", "quickstart"} <= set(names)
    assert "Sanh et al. 2019, DistilBERT, a distilled version of BERT" in printed


def test_every_key_that_set_takes_is_listed_with_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--keys"]) == 0
    printed = capsys.readouterr().out
    groups = {lines[0]: " ".join(" ".join(lines[1:]).split()) for lines in _paragraphs(printed)}
    assert "lr peak learning rate (> 0; default 0.0005)" in groups["optimizer.KEY"]
    assert "name which of them (adamw, adadelta; default adamw)" in groups["optimizer.KEY"]
    assert "betas of AdamW (default [0.9, 0.98])" in groups["optimizer.KEY"]
    assert "num_layers transformer layers; null: half of the teacher's (≥ 1)" in groups["student.KEY"]
    assert (
        "whole_word pick all pieces of a word together (true, false; default false)" in groups["masking.KEY"]
    )
    assert "dropout probability, hidden and attention (≥ 0 and < 1; default 0.1)" in groups["new_teacher.KEY"]
    assert "task_weight" in groups["objectives.N.KEY where name is prediction"]
    assert "teacher, data, masking, augment, objectives, optimizer, schedule, run." in groups["stages.N.KEY"]
    code, line = _fails_with(capsys, ["recipes", "kd", "--keys"])
    assert (code, line) == (2, "fastdistil: --keys lists those of every recipe: leave out kd, or --keys")


def test_a_key_is_told_what_it_means() -> None:
    from fastdistil.train.config import load_config
    from fastdistil.train.keys import key_groups

    named = {
        group.name.removesuffix("KEY") + key.name: key.description
        for group in key_groups()
        for key in group.keys
    }
    assert [name for name, description in named.items() if not description or description[0] == "("] == []
    # A key of the documentation that no recipe took would be one that was renamed.
    plain = load_config("pkd", ["student.num_layers=3"], teacher="t", task="mrpc").model_dump()
    sections = ("student", "task", "data", "optimizer", "schedule", "run")
    of_the_run = {f"{section}.{key}" for section in sections for key in plain[section]}
    assert of_the_run - {"student.bilstm", "student.mobilebert"} <= set(named)


def _paragraphs(printed: str) -> list[list[str]]:
    return [paragraph.splitlines() for paragraph in printed.strip().split("\n\n")]


def test_doctor_tells_the_implementation_of_each_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"fastdistil {fastdistil.__version__}" in lines
    for row in implementations():
        reason = f" because {row.reason}" if row.reason else ""
        assert f"{row.op} {row.device} {row.implementation}{reason}" in lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English of this project, a paragraph a line."""
    texts = [path.read_text() for path in sorted(Path(fastdistil.__file__).parent.glob("*.py"))]
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("\n".join(" ".join(text.split()) for text in texts))
    return file


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT with a masked-language-model head and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    from fastdistil.data.tokenizer import train_wordpiece

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_wordpiece(corpus.read_text().splitlines(), 400)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    transformers.BertForMaskedLM(config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads of a busy machine wait for each other, at a model of this size for most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_path_may_start_in_the_home_folder(
    capsys: pytest.CaptureFixture[str],
    corpus: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No shell expands what stands behind a "="."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "corpus.txt").symlink_to(corpus)
    prepare = ["prepare", "~/corpus.txt", "--tokenizer=~/model", "--output=~/a/store", "--max-length=32"]
    assert main(prepare) == 0
    assert (tmp_path / "a" / "store" / "meta.json").is_file()
    assert main([*prepare[:3], "--output=~/a/pairs", "--max-length=32", "--pairs"]) == 0
    assert main(["evaluate", "~/model", "--corpus=~/a/store", "--max-length=32"]) == 0
    assert "held-out text" in capsys.readouterr().out
    assert not Path("~").exists()


@pytest.mark.usefixtures("one_thread")
def test_prepare_then_evaluate(
    capsys: pytest.CaptureFixture[str], corpus: Path, model: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    prepare = ["prepare", str(corpus), "--tokenizer", str(model), "--output", store, "--max-length", "32"]
    assert main(prepare) == 0
    sequences = capsys.readouterr().out.split()[1]

    assert main(["evaluate", str(model), "--corpus", store]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {label: value.strip() for label, value in (line.split("  ", 1) for line in lines)}
    assert told["held-out text"].endswith(f"of {sequences} sequences")
    # Random weights of a small scale: nearly uniform over the vocabulary of 400.
    loss = float(told["loss"].split()[0])
    assert loss == pytest.approx(math.log(400), rel=0.05)
    assert float(told["perplexity"]) == pytest.approx(math.exp(loss), rel=1e-3)
    # 32 positions are all that the model has.
    latencies = [line for line in lines if line.startswith("latency, cpu")]
    assert [line.split(" at ")[1] for line in latencies] == [
        "1 × 32 tokens, 1 threads",
        "8 × 32 tokens, 1 threads",
    ]

    assert main(["evaluate", str(model), "--corpus", store, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert f"{plain['text']['loss']:.4f} nats a token" == told["loss"]
    assert plain["text"]["perplexity"] == math.exp(plain["text"]["loss"])
    assert (
        f"{plain['text']['tokens']:,} masked tokens of {plain['text']['sequences']:,} sequences"
        == told["held-out text"]
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prepare", "{empty}", "--tokenizer", "{model}", "--output", "{new}"], "{empty}"),
        (["prepare", "{corpus}", "--tokenizer", "{empty}", "--output", "{new}"], "{empty}"),
        (["prepare", "{corpus}", "--tokenizer", "{model}", "--output", "{model}"], "{model}"),
        (["evaluate", "{new}"], "{new}"),
        (["evaluate", "{model}", "--corpus", "{new}"], "{new}"),
        (["evaluate", "{model}", "--max-length", "33"], "32 positions"),
    ],
)
def test_a_bad_path_is_named(
    capsys: pytest.CaptureFixture[str],
    corpus: Path,
    model: Path,
    tmp_path: Path,
    arguments: list[str],
    line: str,
) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    paths = {"corpus": corpus, "model": model, "empty": empty, "new": tmp_path / "new"}
    code, printed = _fails_with(capsys, [argument.format(**paths) for argument in arguments])
    assert code == 2
    assert line.format(**paths) in printed
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("objectives.0.num_heads=5", "num_heads must divide the widths of the states"),
        ("objectives.0.teacher_layer=2", "objectives.0.teacher_layer: the teacher has no layer 2"),
        ("objectives=[{name: hidden, layers: [[0, 9]]}]", "objectives.0.layers: the teacher has no layer 9"),
        ("student.num_layers=3", "student.num_layers is 3, but the teacher has only 2 layers"),
    ],
)
def test_objectives_that_do_not_fit_the_models_are_one_line(
    capsys: pytest.CaptureFixture[str], corpus: Path, model: Path, tmp_path: Path, setting: str, line: str
) -> None:
    pytest.importorskip("pydantic")
    arguments = ["train", "minilm", "--teacher", str(model), "--corpus", str(corpus)]
    arguments += ["--output", str(tmp_path / "run"), "--set", "data.max_length=32"]
    settings = ["student.num_layers=1", "objectives.0.num_heads=4", "run.precision=fp32", setting]
    code, printed = _fails_with(capsys, [*arguments, *(a for s in settings for a in ("--set", s))])
    assert code == 2
    assert line in printed


def test_ctrl_c_saves_and_the_printed_command_resumes(corpus: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    output = tmp_path / "run"
    command = [sys.executable, "-m", "fastdistil", "train", "mlm", "--teacher", str(model)]
    command += ["--corpus", str(corpus), "--output", str(output)]
    settings = {
        "data.max_length": 32,
        "run.batch_size": 2,
        "run.eval_every": 1000,
        "run.head_warmup_steps": 0,
        "run.log_every": 1,
        "run.steps": 400,
    }
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    metrics = output / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert list(output.glob("checkpoints/*/checkpoint-*"))

    said = errors.splitlines()[-1].removeprefix("fastdistil: interrupted; resume with: fastdistil ")
    resumed = subprocess.run(
        [sys.executable, "-m", "fastdistil", *shlex.split(said)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert max(steps) == 400
    assert len(list(output.glob("*/model.safetensors"))) == 1


def test_help_loads_none_of_the_training_stack() -> None:
    script = (
        "import json, sys; from fastdistil.cli import main; code = main(['train', '--help']); "
        "print(json.dumps([code, sorted({'accelerate', 'datasets', 'transformers'} & set(sys.modules))]))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "--corpus" in output
    assert json.loads(output.splitlines()[-1]) == [0, []]
