"""The table at the end of a run."""

import io

import pytest
from rich.console import Console

from fastdistil.train.report import BEFORE, ModelResult, console_table


def result(name: str, scores: dict[str, float], *, retained: float | None = None) -> ModelResult:
    return ModelResult(
        name=name,
        path=None,
        layers=12,
        hidden_size=384,
        parameters=33_360_770,
        scores=scores,
        retained=retained,
        latency_ms=85.36,
        latency_p95_ms=92.2,
        threads=2,
        train_steps=460,
        train_tokens=1_230_000,
        train_seconds=1036.6,
    )


@pytest.mark.parametrize(
    ("scores", "cells"),
    [
        ({"accuracy": 0.8505, "f1": 0.8946}, ["85.05%", "89.46%"]),
        (
            {"loss": 4.7228, "accuracy": 0.2948, "next_sentence_accuracy": 0.75},
            ["4.7228", "29.48%", "75.00%"],
        ),
        ({"attention": 74.8375, "hidden": 0.9225, "embeddings": 0.1526}, ["74.8375", "0.9225", "0.1526"]),
    ],
)
def test_no_cell_is_cut_on_a_console_of_80_columns(scores, cells):
    console = Console(file=io.StringIO(), width=80)
    retained = 0.982 if "f1" in scores else None
    console.print(console_table([result(name, scores, retained=retained) for name in (BEFORE, "student")]))
    text = console.file.getvalue()
    assert "…" not in text
    for cell in ("12 × 384", "33.36 M", *cells, "85.4 ms", "1.23 M", "1,037 s"):
        assert text.count(cell) == 2, cell
