"""Splitting a text into words and putting others in."""

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from fastdistil.data.augment.words import STOP_WORDS, WordTokenizer, replace_words
from fastdistil.errors import UserError

TEXT = "The Teacher's soft targets, unbelievably, weren't [MASK]: 15 café students?"


def test_words_are_those_of_the_tokenizer_and_keep_their_spelling(wordpiece: BertTokenizer) -> None:
    (split,) = WordTokenizer(wordpiece).split([TEXT])
    assert [split.word(i) for i in range(len(split.spans))] == re.findall(r"\w+|[^\w\s]", TEXT)
    pieces = [wordpiece.convert_ids_to_tokens(split.ids[first:end]) for first, end in split.pieces]
    assert pieces == [wordpiece.tokenize(word) for word in re.findall(r"\w+|[^\w\s]", TEXT)]


def test_byte_level_words_do_not_own_the_space_before_them(
    roberta_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "Soft targets, fifteen per cent"
    (split,) = WordTokenizer(roberta_tokenizer).split([text])
    words = [split.word(i) for i in range(len(split.spans))]
    assert words == ["Soft", "targets", ",", "fifteen", "per", "cent"]
    tokens = [split.ids[first:end] for first, end in split.pieces]
    assert [roberta_tokenizer.decode(ids) for ids in tokens] == [
        word if word == "," else f" {word}" for word in words
    ]


def test_replaceable_are_words_of_letters_that_are_no_stop_words_and_end_within_the_tokens(
    wordpiece: BertTokenizer,
) -> None:
    (split,) = WordTokenizer(wordpiece).split([TEXT])
    words = ["Teacher", "soft", "targets", "unbelievably", "MASK", "café", "students"]
    assert [split.word(i) for i in split.replaceable(100)] == words
    first, end = split.pieces[split.replaceable(100)[4]]
    assert end - first > 1
    assert [split.word(i) for i in split.replaceable(end)] == words[:5]
    assert [split.word(i) for i in split.replaceable(end - 1)] == words[:4]


def test_stop_words_are_lower_case_words() -> None:
    assert {"the", "not", "t"} <= STOP_WORDS
    assert all(word.isalpha() and word.islower() for word in STOP_WORDS)


def test_whole_words_stay_one_token_between_spaces_and_beside_punctuation(
    wordpiece: BertTokenizer, roberta_tokenizer: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (wordpiece, roberta_tokenizer):
        found = WordTokenizer(tokenizer).whole_words()
        assert {"teacher", "student"} & found.keys()
        for word, token in found.items():
            assert tokenizer.encode(f" {word}, ", add_special_tokens=False)[0] == token
    assert not {"##s", "[MASK]", "MASK", "5"} & found.keys()


def test_a_tokenizer_without_whole_words_is_refused() -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "##a": 5, "7": 6, ".": 7}
    with pytest.raises(UserError, match="has no token that is a whole word"):
        WordTokenizer(BertTokenizer(vocab=vocabulary)).whole_words()


def test_a_tokenizer_that_does_not_mark_words_is_refused() -> None:
    special = ["<s>", "</s>", "<pad>", "<mask>", "<unk>"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*special, "a"])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("bos_token", "eos_token", "pad_token", "mask_token"), special, strict=False))
    with pytest.raises(UserError, match="does not mark whole words"):
        WordTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names)).whole_words()


@pytest.mark.parametrize(
    ("replaced", "window", "expected"),
    [
        ([], (0, 20), "It  didn't work, 5.5"),
        ([(0, "He"), (3, "fail")], (0, 20), "He  didn't fail, 5.5"),
        # Words that would run together, also two that are both put in, are kept apart.
        ([(2, "very")], (0, 20), "It  did very work, 5.5"),
        ([(1, "[MASK]"), (2, "very")], (0, 20), "It  [MASK]very work, 5.5"),
        ([(1, "does"), (2, "very")], (0, 20), "It  does very work, 5.5"),
        ([(1, "is")], (4, 10), "is n't"),
        ([(3, "fail")], (11, 16), "fail,"),
    ],
)
def test_replace_words(replaced: list[tuple[int, str]], window: tuple[int, int], expected: str) -> None:
    spans = [(0, 2), (4, 7), (7, 10), (11, 15), (15, 16), (17, 20)]
    result = replace_words("It  didn't work, 5.5", spans, replaced, start=window[0], end=window[1])
    assert result == expected
