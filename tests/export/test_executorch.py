"""ExecuTorch files answer what PyTorch answers, within their bounds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil.compress.store import load
from fastdistil.errors import UserError

pytest.importorskip("executorch.runtime")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bert: Any, tokenizer: Any) -> Path:
    from fastdistil.export.executorch import export_executorch

    return export_executorch(
        bert, tokenizer, tmp_path_factory.mktemp("executorch") / "model", max_batch=4, max_length=32
    )


# The bounds; an odd length; more texts than the file takes at once, with a rest.
@pytest.mark.parametrize("shape", [(1, 3), (4, 32), (3, 13), (9, 8)])
def test_logits_equal_pytorch(
    folder: Path, bert: Any, inputs: Callable[..., Any], shape: tuple[int, int]
) -> None:
    given = inputs(*shape)
    with torch.inference_mode():
        expected = bert(**given).logits
    torch.testing.assert_close(load(folder)(**given).logits, expected, atol=1e-5, rtol=0)


def test_saved_and_loaded_again_it_is_bit_equal(
    folder: Path, inputs: Callable[..., Any], tmp_path: Path
) -> None:
    model, given = load(folder), inputs(3, 13)
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(load(tmp_path / "copy")(**given).logits, model(**given).logits)


def test_a_text_beyond_the_bound(folder: Path, inputs: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="texts of at most 32 tokens, got 33"):
        load(folder)(**inputs(1, 33))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_batch": 0}, "max_batch must be >= 1, got 0"),
        ({"max_length": 2}, "max_length must be >= 3, got 2"),
    ],
)
def test_bounds_out_of_range(
    bounds: dict[str, int], message: str, bert: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from fastdistil.export.executorch import export_executorch

    with pytest.raises(UserError, match=message):
        export_executorch(bert, tokenizer, tmp_path / "model", **bounds)
    assert not list(tmp_path.iterdir())
