"""Lets the benchmark files import the helpers beside them, and prints what they measured at the end."""

import sys
from pathlib import Path
from typing import Any

import pytest

# pytest's importlib mode adds nothing to sys.path.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The largest cases need more than the limit that a hanging test has, the more on a busy machine."""
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            item.add_marker(pytest.mark.timeout(1200))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    import records

    for record in records.made:
        terminalreporter.write_line(records.describe(record))
    folders = sorted({str(records.results_dir() / records.folder_name(record)) for record in records.written})
    for folder in folders:
        terminalreporter.write_line(
            f"\nappended to {folder}/results.jsonl; table and picture: plot.py {folder}"
        )
