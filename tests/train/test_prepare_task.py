"""Which examples are trained on, and which are held out of them."""

import numpy as np
import pytest

from fastdistil.data.noise import permutation
from fastdistil.data.tasks import Examples
from fastdistil.train.prepare_task import split_examples
from fastdistil.train.sections import TaskConfig

# As IMDb's: the file is sorted by its labels.
SORTED = Examples([(f"text {row}",) for row in range(100)], np.repeat([0, 1], 50))


def split(**keys) -> tuple[list[int], list[int] | None]:
    """The rows."""
    trained, held_out = split_examples(SORTED, TaskConfig(name="imdb", **keys))
    for part in (trained, held_out):
        if part is not None:
            assert part.labels.tolist() == [int(row >= 50) for row in rows(part)]
    return rows(trained), None if held_out is None else rows(held_out)


def rows(examples: Examples) -> list[int]:
    return [int(text.split()[1]) for (text,) in examples.texts]


@pytest.mark.parametrize("limit", [None, 100, 1000])
def test_all_examples_are_in_the_order_of_the_file(limit):
    assert split(max_examples=limit) == (list(range(100)), None)


def test_so_many_examples_are_the_first_of_a_fixed_permutation():
    trained, held_out = split(max_examples=20)
    assert held_out is None
    assert trained == sorted(permutation(100, 0, 0)[:20].tolist())
    assert {row >= 50 for row in trained} == {False, True}
    assert set(trained) < set(split(max_examples=40)[0])


@pytest.mark.parametrize("limit", [None, 40])
def test_the_first_of_the_permutation_are_held_out(limit):
    """And its last ones, which methods that are not trained look at, are never among them."""
    order = permutation(100, 0, 0).tolist()
    trained, held_out = split(max_examples=limit, validation_fraction=0.1)
    count = (limit or 100) // 10
    assert held_out == order[:count]
    assert trained == order[count:limit]
    assert set(held_out).isdisjoint(trained)
    assert set(held_out).isdisjoint(order[-16:])


def test_one_example_at_least_is_held_out():
    trained, held_out = split(max_examples=3, validation_fraction=0.1)
    assert (len(trained), len(held_out)) == (2, 1)
