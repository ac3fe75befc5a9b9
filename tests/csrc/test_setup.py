"""FASTDISTIL_EXT: what a build without a compiler does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _build(out: Path, mode: str, compiler: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FASTDISTIL_EXT": mode, "CXX": compiler}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(out),
        "--build-temp",
        str(out),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _lines_of_ours(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("fastdistil:")]


def test_auto_without_a_compiler_says_so_in_one_line_and_goes_on(tmp_path: Path) -> None:
    build = _build(tmp_path, "auto", "no-such-compiler")
    assert build.returncode == 0, build.stderr
    assert _lines_of_ours(build.stderr) == [
        "fastdistil: installing without the C++ extension: no C++ compiler (no-such-compiler)"
    ]
    assert list(tmp_path.rglob("_C*")) == []


def test_auto_with_a_compiler_that_fails_goes_on(tmp_path: Path) -> None:
    build = _build(tmp_path, "auto", "false")
    assert build.returncode == 0, build.stderr
    (line,) = _lines_of_ours(build.stderr)
    assert "it did not compile" in line


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C++ compiler (no-such-compiler)"), ("false", "false")]
)
def test_demanding_the_extension_without_a_compiler_fails_with_the_reason(
    tmp_path: Path, compiler: str, reason: str
) -> None:
    build = _build(tmp_path, "1", compiler)
    assert build.returncode != 0
    assert reason in build.stderr


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    build = _build(tmp_path, "yes", "c++")
    assert build.returncode != 0
    assert "FASTDISTIL_EXT must be auto, 0 or 1, got yes" in build.stderr
