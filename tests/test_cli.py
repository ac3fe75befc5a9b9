"""The command line: exit codes, and one line for every mistake."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastdistil
from fastdistil.cli import main
from fastdistil.errors import RunError, UserError
from fastdistil.ops import implementations


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


def test_recipes_lists_each_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    names = [line for line in printed.splitlines() if line and not line.startswith(" ")]
    assert {"distilbert", "mlm", "quickstart"} <= set(names)
    assert "Sanh et al. 2019, DistilBERT, a distilled version of BERT" in printed


def test_doctor_tells_the_implementation_of_each_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"fastdistil {fastdistil.__version__}" in lines
    for row in implementations():
        reason = f" because {row.reason}" if row.reason else ""
        assert f"{row.op} {row.device} {row.implementation}{reason}" in lines


def test_help_loads_none_of_the_training_stack() -> None:
    script = (
        "import json, sys; from fastdistil.cli import main; code = main(['train', '--help']); "
        "print(json.dumps([code, sorted({'accelerate', 'datasets', 'transformers'} & set(sys.modules))]))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "--corpus" in output
    assert json.loads(output.splitlines()[-1]) == [0, []]
