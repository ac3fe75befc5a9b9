"""`compress`, `compare` and `export` on the command line: what they make, and one line for what is wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdistil.cli import main
from fastdistil.compress.store import load

pytest.importorskip("transformers")
pytest.importorskip("pydantic")


def _fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_compress_prints_what_changed(
    capsys: pytest.CaptureFixture[str], task_encoder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "small"
    assert main(["compress", str(task_encoder), "--method", "prune-ffn:0.5", "--output", str(output)]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["made by"].strip() == "prune-ffn:0.5"
    assert "× smaller" in told["size on disk"]
    assert load(output / "model").config.intermediate_size == 24


def test_the_home_folder_is_spelled_out_where_no_shell_does(
    task_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["compress", str(task_encoder), "--method", "bf16", "--output=~/small"]) == 0
    assert (tmp_path / "small" / "model").is_dir()
    assert not (tmp_path / "~").exists()

    (tmp_path / "found").touch()
    target = ["--target-speedup", "2", "--task", "sst2", "--output=~/found"]
    assert main(["compress", str(task_encoder), *target]) == 2
    assert f"output {tmp_path}/found is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give --method NAME, or a target"),
        (["--method", "int8", "--target-speedup", "3"], "give --method NAME, or a target"),
        (["--method", "int8", "--candidates", "2"], "--candidates is for --target-speedup or --target-size"),
        (["--target-speedup", "3"], "a search needs --task NAME"),
        (["--method", "prune-fnn"], "unknown method 'prune-fnn': did you mean prune-ffn?"),
        (["--method", "prune-ffn:1.5"], "prune-ffn.ratio: input should be less than 1, got 1.5"),
        (["--method", "prune-ffn", "--set", "prune-ffn.ratoi=0.5"], "did you mean ratio?"),
        (["--method", "low-rank", "--set", "low-rank.rank=999", "--set", "low-rank.ratio=null"], "rank"),
        (["--method", "cluster:0"], "cluster.bits: input should be greater than"),
        (["--method", "kd"], "kd trains a student for a task: add --task NAME"),
        (["--method", "bf16+prune-ffn"], "bf16+prune-ffn: bf16 must be the last step"),
        (["--method", "onnx+prune-ffn"], "onnx must be the last step"),
        (["--method", "int8", "--data", "tasks"], "--data is for --task"),
        (["--method", "int8", "--allow-weak-teacher"], "--allow-weak-teacher is for --task"),
    ],
)
def test_a_mistake_in_compress_is_one_line(
    capsys: pytest.CaptureFixture[str],
    task_encoder: Path,
    tmp_path: Path,
    arguments: list[str],
    line: str,
) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert line in _fails(capsys, ["compress", str(task_encoder), *arguments, *output])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model"], "compare needs --task NAME (sst2, mrpc, ...), or the teacher `quickstart`"),
        (["quickstart", "--task", "sst2"], "--task is for another teacher than quickstart"),
        (["quickstart", "--allow-weak-teacher"], "--allow-weak-teacher is for another teacher"),
        (["model", "--task", "sst3"], "sst3"),
        (["model", "--task", "sst2", "--methods", "kd,kd"], "method kd is given twice"),
        (["model", "--task", "sst2", "--methods", "kdd"], "unknown method 'kdd': did you mean kd?"),
    ],
)
def test_a_mistake_in_compare_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], line: str
) -> None:
    assert line in _fails(capsys, ["compare", *arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_default_methods_are_all_known() -> None:
    from fastdistil.compare.defaults import DEFAULT_METHODS
    from fastdistil.compare.steps import parse_chains

    kinds = {chain.kind for chain in parse_chains(DEFAULT_METHODS)}
    assert kinds == {
        "distillation",
        "pruning",
        "quantisation",
        "low rank",
        "sharing",
        "clustering",
        "runtime",
        "chain",
    }


def test_export_writes_a_verified_folder(
    capsys: pytest.CaptureFixture[str], finetuned: Callable[[str], Path], tasks: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    output = tmp_path / "onnx"
    arguments = ["--task", "sst2", "--data", str(tasks), "--opset", "20", "--output", str(output)]
    assert main(["export", str(finetuned("sst2")), *arguments]) == 0
    told = capsys.readouterr().out
    assert "error" in told
    assert (output / "model.onnx").is_file()
    (score,) = re.findall(r"accuracy +(\d+\.\d+% -> \d+\.\d+%)", told)
    card = (output / "README.md").read_text()
    assert f"| accuracy | {score} |" in card
    model, options = finetuned("sst2"), f"--opset 20 --task sst2 --data {tasks} --output {output}"
    assert f"fastdistil export {model} --format onnx {options}\n" in card
    before, after = score.split(" -> ")
    assert before == after  # ONNX in float32 answers the same
    int8 = ["--format", "onnx-int8", "--opset", "20", "--output", str(tmp_path / "int8")]
    assert "opset is that of the model in" in _fails(capsys, ["export", str(output), *int8])


def test_a_comparison_of_which_nothing_could_be_made_fails(
    capsys: pytest.CaptureFixture[str], finetuned: Callable[[str], Path], tasks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = [
        "--task",
        "sst2",
        "--data",
        str(tasks),
        "--methods",
        "prune-layers:99",
        "--output",
        str(output),
        "--rounds",
        "1",
    ]
    assert main(["compare", str(finetuned("sst2")), *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "no method could be made: prune-layers:99: prune-layers: num_layers is 99" in last
    assert (output / "report.html").is_file()
    assert json.loads((output / "timings.json").read_text())["key"]["rounds"] == 1


def test_an_unknown_format_is_one_line(
    capsys: pytest.CaptureFixture[str], task_encoder: Path, tmp_path: Path
) -> None:
    line = _fails(
        capsys, ["export", str(task_encoder), "--format", "tflite", "--output", str(tmp_path / "out")]
    )
    assert "tflite" in line
    assert "onnx-int8" in line


def test_methods_are_listed_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    from fastdistil.compress.registry import methods

    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == list(methods())
    assert main(["methods", "prune-movement"]) == 0
    told = capsys.readouterr().out
    assert "sparsity" in told
    assert "steps  " not in told
    assert "did you mean cluster?" in _fails(capsys, ["methods", "clster"])
