"""A wheel built from the sdist, installed as pure Python into an empty folder, and used there."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("fastdistil", "kernels", "csrc", "tests")
MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "fastdistil").rglob("*.py"))
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
RECIPES = sorted(path.name for path in (ROOT / "fastdistil" / "recipes").glob("*.yaml"))
PAGE = [f"fastdistil/compare/page{end}" for end in (".css", ".js", "_template.html")]


class Built(NamedTuple):
    sdist_files: set[str]
    wheel_files: set[str]
    site: Path


def _run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "FASTDISTIL_EXT": "0"}
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    tree = tmp_path_factory.mktemp("tree")
    out = tmp_path_factory.mktemp("dist")
    site = tmp_path_factory.mktemp("site")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)

    build_sdist = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    _run(sys.executable, "-c", build_sdist, cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
        sdist.extractall(out, filter="data")
    unpacked = out / archive.name.removesuffix(".tar.gz")

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = ("--no-deps", "--no-index", "--no-build-isolation")
    _run(*pip, "wheel", *options, "--wheel-dir", str(out), str(unpacked), cwd=out)
    (wheel,) = out.glob("*.whl")
    _run(*pip, "install", *options, "--target", str(site), str(wheel), cwd=out)
    return Built(files, set(zipfile.ZipFile(wheel).namelist()), site)


def test_the_sdist_holds_all_that_a_build_needs(built: Built) -> None:
    native = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu"}]
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "constraints.txt", "Makefile"}
    wanted |= {str(path.relative_to(ROOT)) for path in native}
    wanted |= {f"kernels/{name}" for name in KERNELS}
    wanted |= {f"fastdistil/recipes/{name}" for name in RECIPES}
    wanted |= set(PAGE)
    assert wanted - built.sdist_files == set()


def test_the_wheel_holds_all_modules_kernels_recipes_and_the_page(built: Built) -> None:
    wanted = {*MODULES, *(f"fastdistil/kernels/{name}" for name in KERNELS)}
    wanted |= {f"fastdistil/recipes/{name}" for name in RECIPES}
    wanted |= {"fastdistil/py.typed", *PAGE}
    assert KERNELS
    assert RECIPES
    assert wanted - built.wheel_files == set()


def test_the_wheel_installs_one_top_level_package(built: Built) -> None:
    # A top-level `kernels` in site-packages would be taken for the Hugging Face package of that name.
    tops = {name.partition("/")[0] for name in built.wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastdistil"}


def test_without_the_extension_nothing_is_compiled(built: Built) -> None:
    assert [name for name in built.wheel_files if name.endswith((".so", ".cpp", ".h"))] == []


def test_a_pure_python_install_computes_the_loss(built: Built) -> None:
    script = f"""
import json, sys
sys.path.insert(0, {str(built.site)!r})
# The finder of an editable install would give the extension of the checkout.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
import torch
import fastdistil
from fastdistil.ops import implementations
student = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
teacher = torch.tensor([[3.0, 1.0, 0.5]])
loss = fastdistil.kd_loss(student, teacher, temperature=2.0)
(3 * loss).backward()
cpu = [row.implementation for row in implementations() if row.device == "cpu"]
print(json.dumps([fastdistil.__file__, cpu, loss.item(), student.grad[0].tolist()]))
"""
    module, implementations, loss, gradient = json.loads(
        _run(sys.executable, "-P", "-c", script, cwd=built.site)
    )
    student = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[3.0, 1.0, 0.5]], dtype=torch.float64)
    log_p, log_q = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    expected = 4 * (log_q.exp() * (log_q - log_p)).sum()
    (3 * expected).backward()
    assert student.grad is not None

    assert Path(module).is_relative_to(built.site)
    assert not any("C++" in name for name in implementations)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert gradient == pytest.approx(student.grad[0].tolist(), rel=1e-5)
