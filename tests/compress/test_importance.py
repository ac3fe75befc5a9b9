"""What importance is measured on where an example is a choice: the sequences of all its options."""

from typing import Any

import pytest
import torch

from fastdistil.compress.blocks import find_blocks
from fastdistil.compress.importance import Group, importances
from fastdistil.compress.method import Calibration
from fastdistil.compress.reconstruct import output_moments
from fastdistil.compress.spaces import dim_importance, find_spaces
from fastdistil.data.task_batches import TaskBatch


@pytest.fixture
def model(build: Any) -> Any:
    return build("bert", "MultipleChoice")


@pytest.fixture
def sequences(batches: list[TaskBatch]) -> Calibration:
    """Four sequences that the encoder reads, (4, L)."""
    return Calibration(batches[:1], lambda model, batch: model.base_model(**batch.inputs)[0].mean())


def _choices(batch: TaskBatch, options: int) -> Calibration:
    """The same four sequences, as (4 / C, C, L); the loss of an example is the sum over its options."""
    shape = (-1, options)
    batch = TaskBatch(
        batch.input_ids.unflatten(0, shape),
        batch.attention_mask.unflatten(0, shape),
        batch.token_type_ids.unflatten(0, shape),
        torch.zeros(4 // options, dtype=torch.int64),
    )
    return Calibration([batch], lambda model, batch: model(**batch.inputs).logits.sum(1).mean())


@pytest.mark.parametrize("group", ["heads", "neurons"])
def test_activations_are_those_of_the_sequences(model: Any, sequences: Calibration, group: Group) -> None:
    blocks = find_blocks(model)
    expected = importances(model, blocks, group, "activation", sequences)
    found = importances(model, blocks, group, "activation", _choices(sequences.batches[0], 2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_moments_are_those_of_the_sequences(model: Any, sequences: Calibration) -> None:
    blocks = find_blocks(model)
    expected = output_moments(model, blocks, sequences)
    found = output_moments(model, blocks, _choices(sequences.batches[0], 2))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=1e-4, atol=1e-6)


def test_taylor_of_a_dimension_adds_up_the_options(model: Any, sequences: Calibration) -> None:
    """One option an example is a sequence by itself; of two, an example's loss has both."""
    space = find_spaces(model, find_blocks(model))[0]
    one, two = (
        dim_importance(space, "taylor", model, _choices(sequences.batches[0], options)) for options in (1, 2)
    )
    assert (one > 0).all()
    torch.testing.assert_close(two, 2 * one, rtol=1e-4, atol=1e-9)


def test_activation_of_a_dimension_is_that_of_the_sequences(model: Any, sequences: Calibration) -> None:
    space = find_spaces(model, find_blocks(model))[0]
    one, two = (
        dim_importance(space, "activation", model, _choices(sequences.batches[0], options))
        for options in (1, 2)
    )
    torch.testing.assert_close(two, one, rtol=1e-6, atol=0)
