"""The folder kernels/ at the top: reached as `fastdistil.kernels`, never taken for the package `kernels`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_link_resolves_to_kernels() -> None:
    assert (ROOT / "fastdistil" / "kernels").resolve() == ROOT / "kernels"


def test_the_link_is_committed_as_a_link() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "fastdistil/kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["120000"]


def test_no_conftest_at_the_top() -> None:
    # It would put the checkout, and with it kernels/, on the path of every test.
    assert not (ROOT / "conftest.py").exists()


def test_transformers_does_not_take_kernels_for_the_hub_package() -> None:
    script = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    # The checkout is first on the path, as it is for a script that is started in it.
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    try:
        import kernels as hub_package  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        installed = False
    else:
        installed = getattr(hub_package, "__file__", None) is not None
    assert run.stdout.strip() == str(installed)
