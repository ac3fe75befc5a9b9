"""Nearest words by cosine, and word vectors from files and models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from fastdistil.data.augment import neighbours as module
from fastdistil.data.augment.neighbours import Neighbours, top_columns
from fastdistil.data.augment.words import WordTokenizer
from fastdistil.errors import UserError

Write = Callable[[str, list[str]], Path]
WORDS = [f"word{chr(97 + i)}" for i in range(20)]


def _cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(unit @ unit.T)


@pytest.mark.parametrize("scores", [1 << 24, 50])  # one block of rows, and blocks of two
def test_nearest_are_those_of_the_largest_cosine_without_the_word(
    scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_SCORES", scores)
    vectors = np.random.default_rng(0).normal(size=(20, 5)) * np.arange(1, 21)[:, None]
    expected = [[WORDS[i] for i in np.argsort(-row)[1:5]] for row in _cosines(vectors)]
    assert Neighbours(WORDS, torch.from_numpy(vectors)).nearest(WORDS, 4) == expected


def test_fewer_words_than_asked_for_give_all_the_others() -> None:
    near = Neighbours(WORDS[:3], torch.eye(3) + 0.1)
    assert sorted(near.nearest(["wordb"], 15)[0]) == ["worda", "wordc"]


def test_case_of_the_word_is_looked_up_as_written_then_lowered_and_given_back() -> None:
    near = Neighbours(
        ["paris", "london", "Rome", "rome"], torch.tensor([[1, 0.1], [1, 0.2], [0, 1], [0, 0.9]])
    )
    assert near.nearest(["paris", "Paris", "PARIS", "Rome"], 1) == [
        ["london"],
        ["London"],
        ["london"],
        ["rome"],
    ]


def test_a_word_without_a_vector_has_no_neighbours() -> None:
    near = Neighbours(["a", "b"], torch.eye(2))
    assert near.knows("A")
    assert not near.knows("c")
    assert near.nearest(["c", "a"], 3) == [[], ["b"]]
    assert near.nearest([], 3) == []


def test_top_columns_adds_the_bias() -> None:
    rows, table = torch.eye(2), torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    assert top_columns(rows, table, torch.tensor([9.0, 0, 0]), 2) == [[0, 2], [0, 2]]
    assert top_columns(rows, table, None, 5) == [[2, 1, 0], [2, 1, 0]]


def test_file_gives_the_words_of_letters_and_their_vectors(write_lines: Write) -> None:
    lines = ["good 1 0", ". 1 0", "great 0.9 0.1", "a b 1 0", "2019 1 0", "bad -1e0 0", "good 0 1"]
    near = Neighbours.from_file(write_lines("vectors.txt", lines))
    assert near.nearest(["good", "bad", "2019"], 5) == [["great", "bad"], ["great", "good"], []]


def test_file_is_read_up_to_the_number_of_words(write_lines: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WORDS", 2)
    near = Neighbours.from_file(write_lines("vectors.txt", ["one 1 0", "two 0 1", "not a vector"]))
    assert near.knows("two")
    assert not near.knows("not")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a 1 2", "b 1"], "line 2: not a word and 2 numbers"),
        (["a 1 2", "b 1 x"], "line 2: could not convert string to float: 'x'"),
        (["a 1 2", "b 1 nan"], "line 2: a number that is not finite"),
        (["a 1 2", ""], "line 2: not a word"),
        (["alone"], "line 1: not a word and its numbers"),
        ([". 1 2", "7 1 2"], "the file has no word in it"),
    ],
)
def test_a_bad_file_is_named_with_the_line(lines: list[str], message: str, write_lines: Write) -> None:
    path = write_lines("vectors.txt", lines)
    with pytest.raises(UserError, match=message) as raised:
        Neighbours.from_file(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_text_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"a 1 2\n\xff\xfe 1 2\n")
    with pytest.raises(UserError, match="binary, line 2: not UTF-8 text"):
        Neighbours.from_file(tmp_path / "binary")
    with pytest.raises(UserError, match=r"no-such-file'.*there is no such file"):
        Neighbours.from_file(tmp_path / "no-such-file")


def test_embeddings_of_whole_words_and_the_mean_of_pieces_of_others(wordpiece: BertTokenizer) -> None:
    weight = torch.randn(len(wordpiece), 7, generator=torch.Generator().manual_seed(0))
    near = Neighbours.from_embeddings(torch.nn.Parameter(weight), wordpiece)
    table = WordTokenizer(wordpiece).whole_words()
    words, ids = list(table), list(table.values())

    pieces = wordpiece.encode("unsoftest", add_special_tokens=False)
    assert len(pieces) > 1
    assert "unsoftest" not in table
    queries = {"student": weight[table["student"]], "unsoftest": weight[pieces].mean(0)}
    for query, vector in queries.items():
        cosines = torch.nn.functional.cosine_similarity(weight[ids], vector[None])
        expected = [words[i] for i in cosines.argsort(descending=True) if words[i] != query][:6]
        assert near.nearest([query], 6) == [expected]
    assert not near.knows("東")  # the unknown token is no piece of a word


def test_real_embeddings_put_films_near_films(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    near = Neighbours.from_embeddings(model.get_input_embeddings().weight, tokenizer)
    film, good = near.nearest(["film", "good"], 15)
    assert {"films", "movie", "movies"} <= set(film)
    assert {"great", "excellent"} <= set(good)
