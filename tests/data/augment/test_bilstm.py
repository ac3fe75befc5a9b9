"""Distilled BiLSTM's augmentation: what each rule does, and how often."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("textblob")

from textblob.taggers import PatternTagger

from fastdistil.data.augment import bilstm as module
from fastdistil.data.augment.bilstm import bilstm_augment

LETTERS = "bcdfghjklm"
# 1,000 words of letters that the tagger does not know, and that differ: all nouns.
NOUNS = [f"{a}o{b}o{c}o" for a in LETTERS for b in LETTERS for c in LETTERS]
# 50 sentences of 20 words, no two alike.
SENTENCES = [(" ".join(NOUNS[i : i + 20]),) for i in range(0, 1000, 20)]


def _augment(texts: list[tuple[str, ...]], **changes: Any) -> list[list[tuple[str, ...]]]:
    keywords: dict[str, Any] = {"mask_token": "[MASK]", "copies": 20, "seed": 7}
    rules = {"mask_probability": 0.0, "pos_probability": 0.0, "ngram_probability": 0.0}
    return bilstm_augment(texts, **{**keywords, **rules, **changes})


def _near(count: int, trials: int, probability: float) -> bool:
    """Within four standard deviations of a binomial draw."""
    return abs(count - trials * probability) < 4 * math.sqrt(trials * probability * (1 - probability))


def test_masking_alone_masks_every_word_and_nothing_else() -> None:
    texts = [("A dog, it  barked.",), ("No!",)]
    assert _augment(texts, mask_probability=1.0) == [
        [("[MASK] [MASK][MASK] [MASK]  [MASK][MASK]",)],
        [("[MASK][MASK]",)],
    ]


def test_words_are_masked_or_replaced_with_their_probabilities_and_never_both() -> None:
    result = _augment(SENTENCES, mask_probability=0.1, pos_probability=0.2)
    masked = replaced = trials = 0
    for (text,), copies in zip(SENTENCES, result, strict=True):
        for (copy,) in copies:
            for before, after in zip(text.split(), copy.split(), strict=True):
                trials += 1
                masked += after == "[MASK]"
                replaced += after not in (before, "[MASK]")
    # Copies without any change, 0.7^20 of them, are dropped; a noun replaced by itself is one in 1,000.
    assert trials > 0.995 * 50 * 20 * 20
    assert _near(masked, trials, 0.1 / (1 - 0.7**20))
    assert _near(replaced, trials, 0.2 * 0.999 / (1 - 0.7**20))


def test_a_word_is_replaced_by_words_of_its_part_of_speech() -> None:
    texts = [
        ("the quick dog quickly ate a red bone",),
        ("a slow cat slowly drank the white milk",),
        ("she saw his small houses and their old gardens",),
        ("he likes big cars or long rivers",),
    ]
    tags: dict[str, set[str]] = {}
    tagger = PatternTagger()
    for (text,) in texts:
        for word, tag in tagger.tag(text, tokenize=False):
            tags.setdefault(tag, set()).add(word)
    result = _augment(texts, pos_probability=1.0, copies=200)
    seen: dict[str, set[str]] = {}
    for (text,), copies in zip(texts, result, strict=True):
        for (copy,) in copies:
            tagged = tagger.tag(text, tokenize=False)
            for (_, tag), after in zip(tagged, copy.split(), strict=True):
                seen.setdefault(tag, set()).add(after)
    assert len(tags) >= 8
    assert seen == tags


def test_replacements_follow_the_counts_of_the_words_in_the_texts() -> None:
    nouns = NOUNS[:1] * 15 + NOUNS[1:2] * 5
    texts = [(" ".join(nouns[i:] + nouns[:i]),) for i in range(20)]
    result = _augment(texts, pos_probability=1.0)
    words = [word for copies in result for (copy,) in copies for word in copy.split()]
    assert len(words) > 0.97 * 20 * 20 * 20  # a copy of 20 words is seldom like another
    assert _near(words.count(NOUNS[0]), len(words), 0.75)


def test_an_ngram_is_one_to_five_words_from_anywhere_in_the_sentence() -> None:
    texts = [(" ".join(NOUNS[i : i + 8]),) for i in range(0, 1000, 8)]
    sizes: Counter[int] = Counter()
    starts: Counter[int] = Counter()
    total = 0
    for (text,), copies in zip(texts, _augment(texts, ngram_probability=1.0, copies=3), strict=True):
        words = text.split()
        for (copy,) in copies:
            ngram = copy.split()
            start = words.index(ngram[0])
            assert words[start : start + len(ngram)] == ngram
            sizes[len(ngram)] += 1
            starts[start] += len(ngram) == 1
            total += 1
    assert total > 350  # a few of the three copies are equal
    assert sizes.keys() == {1, 2, 3, 4, 5}
    assert all(_near(count, total, 0.2) for count in sizes.values())
    assert starts.keys() == set(range(8))  # the last word too


def test_an_ngram_is_drawn_with_its_probability_after_the_words_are_changed() -> None:
    result = _augment(SENTENCES, mask_probability=0.5, ngram_probability=0.25)
    lengths = [len(copy.split()) for copies in result for (copy,) in copies]
    short = sum(length <= 5 for length in lengths)
    # Many of the short ones are equal, "[MASK]" above all, so there are fewer.
    assert 0.15 * 1000 < short < 0.25 * 1000
    assert all(length == 20 for length in lengths if length > 5)
    assert any("[MASK]" in copy.split() for copies in result for (copy,) in copies if len(copy.split()) == 5)


def test_a_sentence_shorter_than_the_ngram_is_kept_whole() -> None:
    result = _augment([("good",), ("a movie",)], ngram_probability=1.0)
    assert result[0] == []
    assert sorted(result[1]) == [("a",), ("movie",)]


def test_copies_of_a_pair_augment_the_first_the_second_and_both_in_a_cycle() -> None:
    pairs = [(first, second) for (first,), (second,) in zip(SENTENCES[:5], SENTENCES[5:10], strict=True)]
    for pair, copies in zip(pairs, _augment(pairs, mask_probability=0.5, copies=9), strict=True):
        assert [copy[0] != pair[0] for copy in copies] == [True, False, True] * 3
        assert [copy[1] != pair[1] for copy in copies] == [False, True, True] * 3


def test_ngrams_of_a_pair_are_taken_of_the_augmented_sentences_alone() -> None:
    pairs = [(first, second) for (first,), (second,) in zip(SENTENCES[:5], SENTENCES[5:10], strict=True)]
    for copies in _augment(pairs, ngram_probability=1.0, copies=3):
        lengths = [[len(text.split()) <= 5 for text in copy] for copy in copies]
        assert lengths == [[True, False], [False, True], [True, True]]


def test_equal_copies_are_dropped_over_the_whole_corpus() -> None:
    texts = [("good movie",), ("good film",), ("movie",)]
    result = _augment(texts, ngram_probability=1.0, copies=50)
    assert result == [[("good",)], [("film",)], []]  # "movie" is an example itself


def test_copies_do_not_depend_on_chunks_or_the_examples_behind(
    shrink_chunks: Callable[[Any], None],
) -> None:
    rules = {"mask_probability": 0.1, "ngram_probability": 0.25}
    whole = _augment(SENTENCES, pos_probability=0.1, **rules)
    assert _augment(SENTENCES, pos_probability=0.1, **rules) == whole
    assert _augment(SENTENCES, pos_probability=0.1, seed=8, **rules) != whole
    # What a word may be replaced by hangs on all texts, everything else on none behind.
    assert _augment(SENTENCES[:10], **rules) == _augment(SENTENCES, **rules)[:10]
    shrink_chunks(module)
    assert _augment(SENTENCES, pos_probability=0.1, **rules) == whole


def test_the_first_copies_are_the_same_whatever_their_number() -> None:
    rules = {"mask_probability": 0.1, "pos_probability": 0.1}
    many, few = (_augment(SENTENCES, copies=copies, **rules) for copies in (20, 7))
    assert all(long[: len(short)] == short for long, short in zip(many, few, strict=True))


def test_a_sentence_without_words_stays() -> None:
    assert _augment([(" ", "a dog")], mask_probability=1.0) == [[(" ", "[MASK] [MASK]")]]
    assert _augment([(" ", "a dog")], ngram_probability=1.0) == [[(" ", "a"), (" ", "dog")]]
    assert _augment([], copies=3) == []


def test_progress_counts_examples(shrink_chunks: Callable[[Any], None]) -> None:
    shrink_chunks(module)
    calls: list[tuple[int, int]] = []
    _augment(SENTENCES[:7], on_progress=lambda *call: calls.append(call))
    assert calls == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": 0}, "copies must be >= 1, got 0"),
        ({"mask_probability": -0.1}, "must be in .*got -0.1"),
        ({"mask_probability": 0.6, "pos_probability": 0.5}, r"must be in \[0, 1\], got 0.6, 0.5, 0.0"),
        ({"ngram_probability": 1.1}, "got 0.0, 0.0, 1.1"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _augment(SENTENCES, **changes)


def test_real_sentences_and_pairs(sst2: list[tuple[str, ...]], mrpc: list[tuple[str, ...]]) -> None:
    for texts, copies in ((sst2, 20), (mrpc, 10)):
        result = bilstm_augment(texts, mask_token="[MASK]", copies=copies, seed=0)
        everything = [copy for made in result for copy in made]
        assert len(set(everything)) == len(everything)
        assert not set(everything) & set(texts)
        # Phrases of a word or two have few different copies.
        assert 0.6 * copies * len(texts) < len(everything) <= copies * len(texts)
        assert all(text.strip() for copy in everything for text in copy)
