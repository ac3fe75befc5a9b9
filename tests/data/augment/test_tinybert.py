"""TinyBERT's augmentation against a plain reading of its algorithm: one word, one forward pass."""

import math
import re
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
from transformers import BertTokenizer, DistilBertConfig, DistilBertForMaskedLM

from fastdistil.data.augment import tinybert as module
from fastdistil.data.augment.neighbours import Neighbours
from fastdistil.data.augment.tinybert import tinybert_augment
from fastdistil.data.augment.words import STOP_WORDS, WordTokenizer
from fastdistil.errors import UserError

TEXTS = [
    ("The student learns from the teacher's soft targets.",),
    ("Larger encoders answer questions, 15 smaller ones predict tokens!",),
    ("Masked language",),
    ("A temperature above one flattens the distribution over the vocabulary.",),
    ("The teacher learns from the student's soft targets.",),
    ("of the 15",),
    ("Distillation keeps most of the quality at half of the depth, unbelievably.",),
    ("Masked language",),
]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _augment(texts: list[tuple[str, ...]], model: Any, tokenizer: Any, **changes: Any) -> Any:
    keywords = {"neighbours": None, "copies": 20, "seed": 3, "num_candidates": 5}
    return tinybert_augment(texts, model=model, tokenizer=tokenizer, **{**keywords, **changes})


def _plain_candidates(
    text: str, index: int, model: Any, tokenizer: Any, near: Neighbours, count: int, show_original: bool
) -> set[str]:
    """Algorithm 1, lines 5 to 10, for one word, with `transformers`' own tokenizer and head."""
    words = _words(text)
    word = words[index].lower()
    pieces = [tokenizer.tokenize(word) for word in words]
    if not word.isalpha() or word in STOP_WORDS:
        return set()
    if len(pieces[index]) > 1:
        return set(near.nearest([word], count)[0])
    masked = [piece for i, own in enumerate(pieces) for piece in (["[MASK]"] if i == index else own)]
    tokens = ["[CLS]", *masked, "[SEP]"]
    segments = [0] * len(tokens)
    if show_original:
        tokens += [*tokenizer.tokenize(text), "[SEP]"]
        segments += [1] * (len(tokens) - len(segments))
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
    with torch.no_grad():
        logits = model(input_ids=ids, token_type_ids=torch.tensor([segments])).logits
    order = logits[0, tokens.index("[MASK]")].argsort(descending=True).tolist()
    ranked = [piece for piece in tokenizer.convert_ids_to_tokens(order) if piece.isalpha() and piece != word]
    return set(ranked[:count])


@pytest.mark.parametrize("show_original", [False, True])
def test_every_replacement_is_a_candidate_and_every_candidate_is_used(
    show_original: bool, model: Any, wordpiece: BertTokenizer
) -> None:
    near = Neighbours.from_embeddings(model.get_input_embeddings().weight, wordpiece)
    # 150 even draws among 5 miss one with probability 5 * 0.8^150 = 1e-14.
    changes = {"neighbours": near, "probability": 1.0, "copies": 150, "show_original": show_original}
    result = _augment(TEXTS, model, wordpiece, **changes)
    for (text,), copies in zip(TEXTS, result, strict=True):
        words = _words(text)
        replaced: list[set[str]] = [set() for _ in words]
        for (copy,) in copies:
            for i, (before, after) in enumerate(zip(words, _words(copy), strict=True)):
                if before != after:
                    replaced[i].add(after)
        expected = [
            _plain_candidates(text, i, model, wordpiece, near, 5, show_original) for i in range(len(words))
        ]
        assert replaced == expected
    assert result[5] == []  # no word of it may be replaced, and a copy equal to the text is dropped


def test_the_number_of_candidates_is_capped_by_the_whole_words(model: Any, wordpiece: BertTokenizer) -> None:
    (copies,) = _augment([("student",)], model, wordpiece, probability=1.0, copies=4000, num_candidates=1000)
    assert {text for (text,) in copies} == WordTokenizer(wordpiece).whole_words().keys() - {"student"}


def test_the_text_around_a_replaced_word_is_kept_as_written(model: Any, wordpiece: BertTokenizer) -> None:
    text = "  The STUDENT's\tcafé-like (15%)  targets… "
    (copies,) = _augment([(text,)], model, wordpiece, copies=100)
    for (copy,) in copies:
        assert re.fullmatch(r"  The \w+'s\t\w+-like \(15%\)  \w+… ", copy)


def test_a_word_is_replaced_with_the_probability() -> None:
    # Word vectors for every word, so that all are replaced by others. 30 words: no copy is like another.
    letters = "abcdefghij"
    words = [f"{a}{b}{c}zz" for a in letters for b in letters for c in letters[:3]]
    near = Neighbours(words, torch.randn(300, 8, generator=torch.Generator().manual_seed(0)))
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "zz": 5}
    texts = [(" ".join(words[i : i + 30]),) for i in range(0, 300, 30)]
    result = _augment(texts, None, BertTokenizer(vocab=vocabulary), neighbours=near, copies=50)
    trials = sum(map(len, result)) * 30
    assert trials == 10 * 50 * 30
    replaced = sum(
        before != after
        for (text,), copies in zip(texts, result, strict=True)
        for (copy,) in copies
        for before, after in zip(text.split(), copy.split(), strict=True)
    )
    assert abs(replaced / trials - 0.4) < 4 * math.sqrt(0.4 * 0.6 / trials)


def test_copies_do_not_depend_on_chunks_batches_or_the_examples_behind(
    model: Any, wordpiece: BertTokenizer, shrink_chunks: Callable[[Any], None]
) -> None:
    whole = _augment(TEXTS, model, wordpiece)
    assert _augment(TEXTS, model, wordpiece) == whole
    assert _augment(TEXTS[:4], model, wordpiece) == whole[:4]
    shrink_chunks(module)
    assert _augment(TEXTS, model, wordpiece, max_tokens=20) == whole
    assert _augment(TEXTS, model, wordpiece, seed=4) != whole


def test_the_first_copies_are_the_same_whatever_their_number(model: Any, wordpiece: BertTokenizer) -> None:
    many, few = (_augment(TEXTS, model, wordpiece, copies=copies) for copies in (20, 7))
    assert all(long[: len(short)] == short for long, short in zip(many, few, strict=True))


def test_copies_are_different_from_each_other_and_from_the_example(
    model: Any, wordpiece: BertTokenizer
) -> None:
    result = _augment(TEXTS, model, wordpiece, copies=200, num_candidates=2)
    assert len(result[2]) == 8  # two words, each itself or one of two, less the example
    assert len(set(result[2])) == 8
    assert TEXTS[2] not in result[2]


def test_copies_change_the_sentences_of_an_example_in_turn(model: Any, wordpiece: BertTokenizer) -> None:
    pairs = [(first, second) for (first,), (second,) in zip(TEXTS[:2], TEXTS[3:5], strict=True)]
    result = _augment(pairs, model, wordpiece, copies=6, probability=1.0)
    for pair, copies in zip(pairs, result, strict=True):
        assert [copy[0] != pair[0] for copy in copies] == [True, False] * 3
        assert [copy[1] != pair[1] for copy in copies] == [False, True] * 3


class Reads:
    """Counts the sequences and the masked rows that a model is asked for."""

    def __init__(self, model: Any) -> None:
        self.sequences: list[tuple[int, ...]] = []
        self.rows = 0
        self.lengths: list[int] = []
        self._hooks = [
            model.base_model.register_forward_pre_hook(self._read, with_kwargs=True),
            model.cls.predictions.transform.register_forward_pre_hook(self._predict),
        ]

    def _read(self, module: Any, args: Any, keywords: dict[str, torch.Tensor]) -> None:
        ids = keywords["input_ids"]
        self.sequences += map(tuple, ids.tolist())
        self.lengths.append(ids.numel())

    def _predict(self, module: Any, args: tuple[torch.Tensor]) -> None:
        self.rows += args[0].shape[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def test_equal_masked_sentences_are_read_once_and_only_their_masks_reach_the_vocabulary(
    model: Any, wordpiece: BertTokenizer
) -> None:
    texts = [("the soft student",), ("the soft teacher",), ("the soft student",)]
    with Reads(model) as reads:
        _augment(texts, model, wordpiece, probability=1.0)
    tokens = [wordpiece.convert_ids_to_tokens(ids) for ids in reads.sequences]
    assert sorted(" ".join(sequence[1:-1]) for sequence in tokens) == [
        "the [MASK] student",
        "the [MASK] teacher",
        "the soft [MASK]",
    ]
    assert reads.rows == 3


def test_only_words_that_a_copy_replaces_are_read(model: Any, wordpiece: BertTokenizer) -> None:
    texts = [(f"{text} {number}",) for number in range(20) for (text,) in TEXTS]
    with Reads(model) as reads:
        result = _augment(texts, model, wordpiece, copies=1, probability=0.1)
    replaced = sum(
        before != after
        for (text,), copies in zip(texts, result, strict=True)
        for (copy,) in copies
        for before, after in zip(_words(text), _words(copy), strict=True)
    )
    assert 0 < reads.rows == replaced


def test_a_pass_reads_no_more_than_the_token_budget(model: Any, wordpiece: BertTokenizer) -> None:
    with Reads(model) as reads:
        _augment(TEXTS, model, wordpiece, max_tokens=64)
    assert max(reads.lengths) <= 64 < sum(reads.lengths)


@pytest.mark.parametrize(("show_original", "limit"), [(False, 62), (True, 30)])
def test_words_beyond_what_the_model_reads_stay(
    show_original: bool, limit: int, model: Any, wordpiece: BertTokenizer
) -> None:
    text = " ".join(["student"] * 70)
    (copies,) = _augment([(text,)], model, wordpiece, probability=1.0, copies=1, show_original=show_original)
    replaced = [word != "student" for word in copies[0][0].split()]
    assert replaced == [True] * limit + [False] * (70 - limit)
    (copies,) = _augment([(text,)], model, wordpiece, probability=1.0, copies=1, max_length=12)
    assert [word != "student" for word in copies[0][0].split()] == [True] * 10 + [False] * 60


def test_a_model_without_token_types_is_read_too(wordpiece: BertTokenizer) -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(wordpiece), dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    result = _augment(TEXTS, DistilBertForMaskedLM(config), wordpiece, show_original=True)
    assert all(result[:4])


def test_dropout_is_off_and_the_mode_is_put_back(model: Any, wordpiece: BertTokenizer) -> None:
    expected = _augment(TEXTS, model, wordpiece)
    model.train()
    try:
        assert _augment(TEXTS, model, wordpiece) == expected
        assert model.training
    finally:
        model.eval()


def test_progress_counts_examples(
    model: Any, wordpiece: BertTokenizer, shrink_chunks: Callable[[Any], None]
) -> None:
    shrink_chunks(module)
    calls: list[tuple[int, int]] = []
    _augment(TEXTS, model, wordpiece, on_progress=lambda *call: calls.append(call))
    assert calls == [(3, 8), (6, 8), (8, 8)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": 0}, "copies and num_candidates must be >= 1, got 0 and 5"),
        ({"num_candidates": 0}, "got 20 and 0"),
        ({"probability": 0.0}, r"probability must be in \(0, 1\], got 0.0"),
        ({"probability": 1.5}, "got 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(
    changes: dict[str, Any], message: str, model: Any, wordpiece: BertTokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        _augment(TEXTS, model, wordpiece, **changes)


def test_nothing_to_take_candidates_from_is_refused(model: Any, wordpiece: BertTokenizer) -> None:
    with pytest.raises(ValueError, match="needs a masked language model, word vectors, or both"):
        _augment(TEXTS, None, wordpiece)
    foreign = Neighbours(["chat", "chien"], torch.eye(2))
    for candidate in (model, None):
        with pytest.raises(UserError, match="the word vectors have none of the words of the texts"):
            _augment(TEXTS, candidate, wordpiece, neighbours=foreign)
    assert _augment([], model, wordpiece) == []


def test_real_sentences_get_words_of_the_real_embeddings(
    sst2: list[tuple[str, ...]], encoder: tuple[Any, Any]
) -> None:
    model, tokenizer = encoder
    near = Neighbours.from_embeddings(model.get_input_embeddings().weight, tokenizer)
    texts = sst2[:300]
    result = _augment(texts, None, tokenizer, neighbours=near, copies=20, num_candidates=15)
    assert sum(map(len, result)) > 0.7 * 20 * len(texts)  # phrases of one word have few different copies
    for (text,), copies in zip(texts, result, strict=True):
        for (copy,) in copies:
            # What a copy means to the model is what was put in: as many words, of which stop words stay.
            before, after = (tokenizer.backend_tokenizer.encode(t).word_ids for t in (text, copy))
            assert before[-2] == after[-2]
            assert [word for word in text.split() if word in STOP_WORDS] == [
                new for word, new in zip(text.split(), copy.split(), strict=True) if word in STOP_WORDS
            ]
