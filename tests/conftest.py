"""Triton's interpreter where there is no GPU, and skips where a package of the training side is missing."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Triton reads this when it is imported, and any test module may be the first to do so.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# As on a machine kept for its GPU: files and folders below tests/ that cannot be imported without it.
NEEDS = {
    "data/test_corpus.py": "datasets",
    "data/test_streaming.py": "datasets",
    "data/augment": "nltk",
    "data/test_tasks.py": "pyarrow",
    "evaluate/test_task.py": "torchmetrics",
    "recipes": "pydantic",
    "recipes/golden": "scipy",
    "train": "pydantic",
}


class SkippedModule(pytest.Module):
    package: str

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        pytest.skip(f"{self.package} is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    where = module_path.relative_to(Path(__file__).parent)
    for path in (where, *where.parents):
        package = NEEDS.get(str(path))
        if package is not None and find_spec(package) is None:
            module: SkippedModule = SkippedModule.from_parent(parent, path=module_path)
            module.package = package
            return module
    return None
