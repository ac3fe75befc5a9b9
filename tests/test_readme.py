"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block-{i}" for i in range(len(BLOCKS))])
def test_example_gives_a_finite_loss_and_gradients(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    loss, hidden, head = names["loss"], names["student_hidden"], names["student_head"]
    assert 0 < loss.item() < 1000  # type: ignore[attr-defined]
    assert hidden.grad.abs().sum() > 0  # type: ignore[attr-defined]
    assert head.grad.abs().sum() > 0  # type: ignore[attr-defined]


def test_there_is_an_example() -> None:
    assert BLOCKS
