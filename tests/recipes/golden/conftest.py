"""What the golden values are computed from: numbers drawn by NumPy's frozen generator, in float64, as taps.

A golden test computes each term of a recipe twice: by the objectives that the recipe's sections make, and in
plain NumPy, one token after the other, from the paper's formula. Both must agree with each other and with the
value that stands in the test, so that a change of both is seen too.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from fastdistil.data.masking import MaskedBatch
from fastdistil.models.attention import AttentionStates
from fastdistil.models.taps import Taps
from fastdistil.objectives import Objective
from fastdistil.train.build import make_objectives
from fastdistil.train.objective_config import ObjectiveConfig

LENGTHS = (5, 3, 4)  # of the three sequences, padded to 5


class VocabularyTaps(Taps):
    """Of a model whose masked-language-model head is one matrix product."""

    def vocabulary_operands(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = self.last_hidden.flatten(0, 1)
        return hidden if rows is None else hidden[rows], self.model.weight, self.model.bias


@pytest.fixture
def draw() -> Callable[..., np.ndarray]:
    """`draw(seed, *shape)`: standard normal; NumPy promises the same numbers in every version."""
    return lambda seed, *shape: np.random.RandomState(seed).standard_normal(shape)


@pytest.fixture
def tokens() -> list[tuple[int, int]]:
    """(sequence, position) of all tokens but padding."""
    return [(n, i) for n, length in enumerate(LENGTHS) for i in range(length)]


@pytest.fixture
def text() -> MaskedBatch:
    """Five masked tokens, of which the last sequence has one; the second segment follows in the first alone.

    The place that the last sequence leaves unused points at a token that is not masked.
    """
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    positions = torch.tensor([[1, 3], [0, 2], [1, 2]])
    position_labels = torch.tensor([[4, 0], [6, 2], [5, -100]])
    ids = torch.zeros(3, 5, dtype=torch.int64)
    labels = torch.full((3, 5), -100).scatter(1, positions, position_labels)
    following = torch.tensor([0, 1, 1])
    return MaskedBatch(ids, mask, labels, positions, position_labels, None, following)


@pytest.fixture
def model() -> Callable[..., Any]:
    """The sizes and the family that `make_objectives` asks of a model."""

    def make(num_layers: int = 1, hidden_size: int = 4, num_heads: int = 1) -> Any:
        sizes = {"num_hidden_layers": num_layers, "hidden_size": hidden_size}
        config = SimpleNamespace(model_type="bert", num_attention_heads=num_heads, **sizes)
        return SimpleNamespace(config=config)

    return make


@pytest.fixture
def build(model: Callable[..., Any]) -> Callable[..., list[Objective]]:
    """The objectives of a recipe's sections, in float64."""
    adapter: TypeAdapter[Any] = TypeAdapter(list[ObjectiveConfig])

    def make(sections: Sequence[Mapping[str, Any]], student: Any = None, teacher: Any = None) -> list[Any]:
        objectives = make_objectives(adapter.validate_python(sections), student or model(), teacher)
        for objective in objectives:
            if isinstance(objective, torch.nn.Module):
                objective.double()
        return objectives

    return make


@pytest.fixture
def taps() -> Callable[..., Taps]:
    """Taps of arrays; `attention` holds a layer's queries, keys and values (B, H, L, d)."""

    def make(
        *,
        last_hidden: np.ndarray | None = None,
        vocabulary: tuple[np.ndarray, np.ndarray] | None = None,
        attention: Mapping[int, Sequence[np.ndarray]] | None = None,
        hidden: Mapping[int, np.ndarray] | None = None,
        **others: Any,
    ) -> Taps:
        kind = Taps
        if vocabulary is not None:
            kind = VocabularyTaps
            others["model"] = SimpleNamespace(weight=_tensor(vocabulary[0]), bias=_tensor(vocabulary[1]))
        others.setdefault("model", None)
        states = {
            layer: AttentionStates(*map(_tensor, arrays), scale=None, window=None)
            for layer, arrays in (attention or {}).items()
        }
        return kind(
            _tensor(np.empty(0) if last_hidden is None else last_hidden),
            attention=states,
            hidden={layer: _tensor(array) for layer, array in (hidden or {}).items()},
            **{name: _tensor(x) if isinstance(x, np.ndarray) else x for name, x in others.items()},
        )

    return make


@pytest.fixture
def check() -> Callable[..., None]:
    """The objectives' terms are those of the formula and of the pinned values, and the loss their sum.

    `expected` is term -> (weight, from the formula, pinned).
    """

    def compare(
        objectives: Sequence[Objective],
        student: Taps,
        teacher: Taps | None,
        batch: Any,
        expected: Mapping[str, tuple[float, float, float]],
    ) -> None:
        means, loss = {}, 0.0
        for objective in objectives:
            counts = objective.counts(batch)
            result = objective.loss(student, teacher, batch, counts)
            means |= {term: (total / counts[term]).item() for term, total in result.sums.items()}
            loss += result.loss.item()
        formulas = {term: formula for term, (_, formula, _) in expected.items()}
        assert means == pytest.approx(formulas, rel=1e-9)
        pinned = {term: value for term, (_, _, value) in expected.items()}
        assert formulas == pytest.approx(pinned, rel=1e-9)
        # Weights are divided by counts in float32.
        assert loss == pytest.approx(sum(weight * mean for weight, mean, _ in expected.values()), rel=1e-6)

    return compare


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
