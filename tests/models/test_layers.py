"""Layer mappings, against the layers that the papers name."""

import pytest

from fastdistil.errors import UserError
from fastdistil.models.layers import layer_pairs


@pytest.mark.parametrize(
    ("mapping", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, [3, 6, 9, 12]),  # TinyBERT4
        ("uniform", 6, 12, [2, 4, 6, 8, 10, 12]),  # TinyBERT6
        ("uniform", 5, 12, [2, 4, 7, 9, 12]),
        ("uniform", 3, 3, [1, 2, 3]),
        ("skip", 6, 12, [2, 4, 6, 8, 10]),  # PKD-Skip
        ("last", 6, 12, [7, 8, 9, 10, 11]),  # PKD-Last
        ("skip", 3, 12, [4, 8]),
        ("first", 4, 12, [1, 2, 3, 4]),
    ],
)
def test_mappings_pair_the_layers_of_the_papers(mapping, student, teacher, expected):
    pairs = layer_pairs(mapping, student, teacher)
    assert [ours + 1 for ours, _ in pairs] == list(range(1, len(expected) + 1))
    assert [theirs + 1 for _, theirs in pairs] == expected


def test_a_list_of_pairs_is_taken_as_it_is():
    assert layer_pairs([[1, 11], [0, 3]], 2, 12) == ((1, 11), (0, 3))


@pytest.mark.parametrize(
    ("mapping", "depths", "message"),
    [
        ([[0, 12]], (6, 12), "layers: the teacher has no layer 12, its layers are 0 to 11"),
        ([[6, 1]], (6, 12), "layers: the student has no layer 6, its layers are 0 to 5"),
        ([[-1, 1]], (6, 12), "the student has no layer -1"),
        ([], (6, 12), "names no layers"),
        ("middle", (6, 12), "one of uniform, skip, last, first, top or a list of pairs, got 'middle'"),
        ("uniform", (13, 12), "student's 13 layers with another of the teacher, which has only 12"),
        ("skip", (1, 12), r"leaves the student's last layer out, and it has no other: give \[\[0, 11\]\]"),
    ],
)
def test_layers_that_are_not_there_are_named(mapping, depths, message):
    with pytest.raises(UserError, match=message):
        layer_pairs(mapping, *depths)
