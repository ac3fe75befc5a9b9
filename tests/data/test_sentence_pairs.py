"""Pairs traced back to their text: every word in it is a token of its own, which says where it stood."""

import errno
import os
import random
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdistil.data import sentence_pairs
from fastdistil.data.batches import Share, StoreBatches, read_batch
from fastdistil.data.corpus import ListCorpus, open_corpus
from fastdistil.data.masking import Masker, mask_batch
from fastdistil.data.sentence_pairs import (
    TokenisedDocuments,
    build_pair_store,
    cached_pair_store,
    draw_pairs,
    truncate_pair,
)
from fastdistil.data.sentences import read_documents
from fastdistil.data.token_store import TokenStore, build_token_store, cached_token_store, open_token_store
from fastdistil.data.tokenizer import TokenizerFacts
from fastdistil.errors import RunError, UserError

SHARED = Path(__file__).parents[3] / "shared"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP = 2, 3
LENGTH = 40


@pytest.fixture(scope="module")
def text() -> list[list[list[str]]]:
    """300 documents of 1 to 14 sentences of 1 to 12 words."""
    draw = random.Random(0)
    return [
        [[f"{d}.{s}.{w}" for w in range(draw.randint(1, 12))] for s in range(draw.randint(1, 14))]
        for d in range(300)
    ]


@pytest.fixture(scope="module")
def corpus(text) -> ListCorpus:
    rows = ["\n".join(" ".join(sentence) for sentence in document) for document in text]
    return ListCorpus("test", rows, "fingerprint of the test's documents")


@pytest.fixture(scope="module")
def words(text) -> list[str]:
    """Token id -> word."""
    return [*SPECIAL, *(word for document in text for sentence in document for word in sentence)]


@pytest.fixture(scope="module")
def tokenizer(words) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, SPECIAL, strict=True)))


@pytest.fixture(scope="module")
def store(corpus, tokenizer, tmp_path_factory) -> TokenStore:
    return build_pair_store(corpus, tokenizer, tmp_path_factory.mktemp("pairs") / "store", LENGTH, seed=0)


Place = tuple[int, int]  # document, and where in it a word stands


@pytest.fixture(scope="module")
def segments(store, words, text) -> list[tuple[list[Place], list[Place]]]:
    """The two segments of each sequence, taken apart at [SEP] and traced back to the text."""
    place = {
        word: (d, i)
        for d, document in enumerate(text)
        for i, word in enumerate(word for sentence in document for word in sentence)
    }
    traced = []
    for row, length in zip(store.input_ids.tolist(), store.lengths, strict=True):
        assert row[0] == CLS
        assert set(row[length:]) <= {0}
        first, second, rest = " ".join(words[i] for i in row[1:length]).split("[SEP]")
        assert rest == ""
        traced.append(([place[w] for w in first.split()], [place[w] for w in second.split()]))
    return traced


def within(share: float, expected: float, trials: int) -> bool:
    return abs(share - expected) < 4.5 * (expected * (1 - expected) / trials) ** 0.5


def test_segments_are_unbroken_text_of_one_document_each(segments):
    for segment in (segment for pair in segments for segment in pair):
        (document, start), *_ = segment
        assert segment == [(document, start + i) for i in range(len(segment))]


def test_second_segment_follows_the_first_or_comes_from_another_document(store, segments, text):
    starts = {
        (d, sum(map(len, document[:s]))) for d, document in enumerate(text) for s in range(len(document))
    }
    for (first, second), label, length in zip(
        segments, store.pairs["next_sentence"], store.lengths, strict=True
    ):
        # Only a sequence that is full may have lost words at the seam, fewer than the longest sentence has.
        may_be_cut = length == LENGTH
        if label == 1:
            assert first[0][0] != second[0][0]
            assert may_be_cut or second[0] in starts
        else:
            assert first[0][0] == second[0][0]
            gap = second[0][1] - first[-1][1] - 1
            assert 0 <= gap < (12 if may_be_cut else 1)
        assert may_be_cut or first[0] in starts


def test_half_of_the_pairs_are_random(store):
    labels = store.pairs["next_sentence"]
    assert set(labels.tolist()) == {0, 1}
    assert within(labels.mean(), 0.5, len(labels))


def test_lengths_and_first_lengths_are_those_of_the_segments(store, segments):
    assert [len(first) + 2 for first, _ in segments] == store.pairs["first_length"].tolist()
    assert [len(first) + len(second) + 3 for first, second in segments] == store.lengths.tolist()
    assert store.lengths.max() == LENGTH
    real = np.arange(LENGTH) < store.lengths[:, None]
    assert (store.token_counts == np.bincount(store.input_ids[real], minlength=len(store.token_counts))).all()


def equal_sentences(sizes: list[int], length: int) -> TokenisedDocuments:
    """Documents of `sizes` sentences of `length` tokens each."""
    num_sentences = sum(sizes)
    return TokenisedDocuments(
        np.arange(num_sentences * length),
        array("q", range(0, num_sentences * length + 1, length)),
        array("q", np.cumsum([0, *sizes]).tolist()),
    )


@pytest.mark.parametrize("max_tokens", [2, 17, 64])
@pytest.mark.parametrize("short_probability", [0.0, 0.1, 1.0])
def test_no_sentence_is_lost_or_used_twice_by_its_own_document(max_tokens, short_probability):
    text = equal_sentences([1, 2, 30, 1, 7, 3, 100, 1], 5)
    pairs = list(draw_pairs(text, max_tokens, short_probability, random.Random(0)))
    used = [
        s for pair in pairs for part in (pair.first, *([] if pair.is_random else [pair.second])) for s in part
    ]
    assert used == list(range(145))
    assert {pair.is_random for pair in pairs} == ({True} if max_tokens == 2 else {True, False})


def test_first_segment_takes_each_possible_number_of_sentences_equally_often():
    pairs = list(draw_pairs(equal_sentences([20_000, 20_000], 5), 25, 0.0, random.Random(0)))
    sizes = Counter(len(pair.first) for pair in pairs)
    assert sizes.keys() == {1, 2, 3, 4}
    assert all(within(count / len(pairs), 1 / 4, len(pairs)) for count in sizes.values())
    full = sum(len(pair.first) + len(pair.second) == 5 for pair in pairs)
    assert full > 0.999 * len(pairs)  # the others are at the end of a document


def test_random_segments_come_from_every_other_document_of_the_group_and_from_anywhere_in_it():
    text = equal_sentences([10] * 7 + [5000], 5)  # too few documents for two groups
    pairs = list(draw_pairs(text, 10, 0.0, random.Random(0)))
    drawn = [pair.second.start for pair in pairs if pair.is_random and pair.first.start >= 70]
    counts = np.bincount(drawn, minlength=70)
    assert len(counts) == 70
    assert all(within(count / len(drawn), 1 / 70, len(drawn)) for count in counts)


def test_one_pair_in_ten_is_shorter():
    text = equal_sentences([20_000, 20_000], 5)
    pairs = [
        pair
        for pair in draw_pairs(text, 20, 0.1, random.Random(0))
        if pair.first.stop % 20_000 > 10 and pair.second.stop % 20_000 > 10
    ]
    shorter = np.mean([5 * (len(pair.first) + len(pair.second)) < 20 for pair in pairs])
    # Drawn from 2 to 20; from 16 on as many sentences of 5 as a full one.
    assert within(shorter, 0.1 * 14 / 19, len(pairs))


def test_pairs_make_up_for_sentences_that_nothing_follows():
    """Documents of one sentence can only open random pairs, and here as many are of two."""
    text = equal_sentences([1, 3] * 2000, 5)
    pairs = list(draw_pairs(text, 20, 0.0, random.Random(0)))
    assert np.mean([pair.is_random for pair in pairs]) == pytest.approx(0.5, abs=0.01)


def truncate_ref(first: int, second: int, max_tokens: int) -> tuple[int, int]:
    """BERT's truncate_seq_pair, on lengths."""
    while first + second > max_tokens:
        first, second = (first - 1, second) if first > second else (first, second - 1)
    return first, second


@pytest.mark.parametrize("max_tokens", [2, 9, 10])
def test_truncation_leaves_as_much_of_each_as_one_token_at_a_time(max_tokens):
    draw = random.Random(0)
    for first in range(1, 16):
        for second in range(1, 16):
            cut = truncate_pair(np.arange(first), np.arange(second), max_tokens, draw)
            assert tuple(map(len, cut)) == truncate_ref(first, second, max_tokens)
            assert all((np.diff(part) == 1).all() for part in cut)


def test_truncation_takes_front_and_back_tokens_with_equal_chances():
    draw = random.Random(0)
    fronts = [truncate_pair(np.arange(9), np.arange(2), 8, draw)[0][0] for _ in range(20_000)]
    shares = np.bincount(fronts, minlength=4) / 20_000
    assert all(within(s, e / 8, 20_000) for s, e in zip(shares, (1, 3, 3, 1), strict=True))


def test_token_types_and_labels_reach_the_batch(store):
    rows = np.arange(len(store))
    batch = read_batch(store, rows)
    seps_before = torch.cumsum(batch.input_ids == SEP, 1) - (batch.input_ids == SEP).long()
    assert (batch.token_type_ids == (seps_before == 1).long()).all()
    assert batch.next_sentence.tolist() == store.pairs["next_sentence"].tolist()
    (micro,) = StoreBatches(store, rows, Share(64), seed=0).micro_batches(0)
    assert (micro.token_type_ids == batch.token_type_ids[micro.sequence_index]).all()
    assert (micro.next_sentence == batch.next_sentence[micro.sequence_index]).all()


def test_masks_fall_on_both_segments_and_never_on_special_tokens(store, tokenizer):
    batch = read_batch(store, np.arange(len(store)))
    masked = mask_batch(Masker(TokenizerFacts.from_tokenizer(tokenizer), seed=0), batch)
    picked = masked.labels != -100
    assert not (picked & (batch.input_ids < len(SPECIAL))).any()
    ordinary = batch.input_ids >= len(SPECIAL)
    for segment in (0, 1):
        inside = ordinary & (batch.token_type_ids == segment)
        share = (picked & inside).sum() / inside.sum()
        assert within(share.item(), 0.16, int(inside.sum()))  # 15 % of all tokens, [CLS] and [SEP] counted
    assert (masked.inputs["token_type_ids"] == batch.token_type_ids).all()
    assert (masked.next_sentence == batch.next_sentence).all()


def test_held_out_documents_are_in_no_training_pair(store, segments):
    training, validation = store.split(0.1)
    assert sorted([*training, *validation]) == list(range(len(store)))
    assert len(validation) == pytest.approx(0.1 * len(store), rel=0.2)
    documents = [
        {place[0] for row in rows for part in segments[row] for place in part}
        for rows in (training, validation)
    ]
    assert not documents[0] & documents[1]
    assert len(documents[0] | documents[1]) == 300


def test_same_seed_gives_the_same_store_and_another_seed_another_one(store, corpus, tokenizer, tmp_path):
    again = build_pair_store(corpus, tokenizer, tmp_path / "again", LENGTH, seed=0)
    other = build_pair_store(corpus, tokenizer, tmp_path / "other", LENGTH, seed=1)
    assert again.meta.sha256 == store.meta.sha256
    assert other.meta.sha256["input_ids.bin"] != store.meta.sha256["input_ids.bin"]


def test_reopened_store_is_equal(store):
    again = TokenStore.open(store.path)
    assert again.meta == store.meta
    assert (again.input_ids == store.input_ids).all()
    assert (again.pairs == store.pairs).all()


def test_damaged_labels_are_found(corpus, tokenizer, tmp_path):
    path = build_pair_store(corpus, tokenizer, tmp_path / "store", LENGTH, seed=0).path
    pairs = path / "pairs.npy"
    pairs.write_bytes(pairs.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match=r"is damaged \(pairs\.npy\)"):
        TokenStore.open(path)


def test_cache_keeps_a_store_for_each_kind_of_pairs(corpus, tokenizer, tmp_path):
    def cached(**changed) -> TokenStore:
        arguments = {"max_length": LENGTH, "seed": 0, "cache_dir": tmp_path}
        return cached_pair_store(corpus, tokenizer, **{**arguments, **changed})

    first = cached()
    inode = (first.path / "pairs.npy").stat().st_ino
    assert (cached().path / "pairs.npy").stat().st_ino == inode
    others = [cached(seed=1), cached(max_length=41), cached(short_probability=0.2), cached(max_sequences=9)]
    packed = cached_token_store(corpus, tokenizer, max_length=LENGTH, cache_dir=tmp_path)
    assert len({store.path for store in (first, packed, *others)}) == 6


def test_max_sequences_reads_no_more_of_the_corpus_than_it_needs(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sentence_pairs, "_SENTENCES_PER_BATCH", 16)
    read = []

    def documents():
        for row in corpus:
            read.append(row)
            yield row

    store = build_pair_store(documents(), tokenizer, tmp_path / "store", LENGTH, seed=0, max_sequences=10)
    assert len(store) == len(store.pairs) == 10
    assert 2 <= len(read) < 50


def test_nothing_is_left_of_a_build_that_fails(corpus, tokenizer, tmp_path, monkeypatch):
    def interrupted():
        yield "One.\nTwo."
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_pair_store(interrupted(), tokenizer, tmp_path / "store", LENGTH, seed=0)

    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sentence_pairs, "TemporaryFile", full)
    with pytest.raises(RunError, match=r"no space left on the disk of .*store while preparing corpus 'test'"):
        build_pair_store(corpus, tokenizer, tmp_path / "store", LENGTH, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "corpus 'bad' holds no text"),
        (["", " \n "], "corpus 'bad' holds no text"),
        (["one\ntwo\nthree"], "is a single document, and a random second .* empty lines"),
        (["one", "two", "three"], "no document of two sentences.* or name the document column"),
    ],
)
def test_corpus_without_pairs_is_refused(tokenizer, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        build_pair_store(ListCorpus("bad", rows, ""), tokenizer, tmp_path / "store", LENGTH, seed=0)


def test_sequence_must_hold_a_token_of_each_segment(corpus, tokenizer, tmp_path):
    with pytest.raises(UserError, match="max_length of sentence pairs must be >= 5, got 4"):
        build_pair_store(corpus, tokenizer, tmp_path / "store", 4, seed=0)
    shortest = build_pair_store(corpus, tokenizer, tmp_path / "store", 5, seed=0)
    assert (shortest.lengths == 5).all()


def test_too_few_documents_to_hold_some_out_are_refused(tokenizer, tmp_path):
    rows = ["1.0.0 1.0.1\n1.1.0", "2.0.0\n2.1.0", "3.0.0\n3.1.0"]
    store = build_pair_store(rows, tokenizer, tmp_path / "store", LENGTH, seed=0)
    assert len(store.split(0)[0]) == len(store)
    with pytest.raises(UserError, match="gives sentence pairs of 1 group of documents: too short"):
        store.split(0.1)


def test_run_that_needs_pairs_refuses_packed_text(store, corpus, tokenizer, tmp_path):
    packed = build_token_store(corpus, tokenizer, tmp_path / "packed", LENGTH)
    assert len(open_token_store(store.path, tokenizer, max_length=LENGTH, pairs=True)) == len(store)
    with pytest.raises(UserError, match="holds packed text, no sentence pairs"):
        open_token_store(packed.path, tokenizer, max_length=LENGTH, pairs=True)


@pytest.mark.skipif(not (SHARED / "data/text").is_dir(), reason="the shared text and model are not here")
def test_real_pairs_are_found_in_their_documents(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/encoder-12x384")
    corpus = open_corpus(str(SHARED / "data/text/enwik8/validation.parquet"))
    store = build_pair_store(corpus, tokenizer, tmp_path / "s", 128, seed=0, document_column="title")
    documents = [" ".join(sentences) for sentences in read_documents(corpus, "title")]
    whole = [
        f" {' '.join(map(str, ids))} " for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]
    ]
    sep = tokenizer.sep_token_id

    def homes(tokens: list[int]) -> set[int]:
        return {i for i, document in enumerate(whole) if f" {' '.join(map(str, tokens))} " in document}

    for row in range(0, len(store), 29):
        ids = store.input_ids[row, 1 : store.lengths[row] - 1].tolist()
        first, second = ids[: ids.index(sep)], ids[ids.index(sep) + 1 :]
        if store.lengths[row] < 128 and store.pairs["next_sentence"][row] == 0:
            assert homes(first + second)
        assert homes(first)
        assert homes(second)
        if store.pairs["next_sentence"][row] == 1:
            assert homes(first) != homes(second)
    assert within(store.pairs["next_sentence"].mean(), 0.5, len(store))
    assert store.lengths.mean() > 110
