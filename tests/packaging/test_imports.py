"""Imports run one way, and `import fastdistil` costs little more than `import torch`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A module may import from its own rank and from those below.
RANKS = [
    {"kernels", "errors", "schema", "paths", "wording", "_C"},
    {"ops"},
    {"functional", "nn"},
    {"objectives", "models", "data", "compress", "evaluate", "export", "recipes"},
    {"train"},
    {"compare"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
HEAVY = (
    "accelerate",
    "datasets",
    "executorch",
    "nltk",
    "onnx",
    "onnxruntime",
    "pyarrow",
    "pydantic",
    "rich",
    "textblob",
    "tokenizers",
    "torchao",
    "torchmetrics",
    "transformers",
    "triton",
    "typer",
    "yaml",
)

SOURCES = sorted(
    path
    for folder in (ROOT / "fastdistil", ROOT / "kernels")
    for path in folder.rglob("*.py")
    if path != ROOT / "fastdistil" / "__init__.py" and "kernels" not in path.parent.relative_to(folder).parts
)


def _imports(path: Path) -> Iterator[str]:
    """Dotted names that the file imports, at the top or inside functions, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _part(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(ROOT / "fastdistil").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    ours = [name.split(".") for name in _imports(path) if name.split(".")[0] == "fastdistil"]
    # The names that the package itself gives are those of functional and nn.
    imported = {names[1] if len(names) > 1 and names[1] in RANK else "functional" for names in ours}
    rank = RANK[_part(path)]
    assert {part for part in imported if RANK[part] > rank} == set()


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if _part(path) == "kernels"], ids=lambda path: path.name
)
def test_kernels_import_torch_and_triton_alone(path: Path) -> None:
    tops = {name.split(".")[0] for name in _imports(path)}
    ours = {name for name in _imports(path) if name.split(".")[0] == "fastdistil"}
    assert tops - sys.stdlib_module_names <= {"torch", "triton", "fastdistil"}
    assert all(name.startswith("fastdistil.kernels") for name in ours)


def _python(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    # What torch itself imports is not ours to answer for.
    script = (
        "import sys, torch; before = set(sys.modules); import fastdistil; "
        f"print(*sorted(set({HEAVY!r}) & (set(sys.modules) - before)))"
    )
    assert _python(script).split() == []


def test_importing_the_package_adds_at_most_a_fifth_to_torch() -> None:
    script = (
        "from time import perf_counter as now; "
        "start = now(); import torch; middle = now(); import fastdistil; end = now(); "
        "print((end - middle) / (middle - start))"
    )
    # Up to three tries: other work on the machine can only add to one.
    assert any(float(_python(script)) <= 0.2 for _ in range(3))
