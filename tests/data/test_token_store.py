"""The store holds exactly the tokens of a direct tokenisation, and is never read torn."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, BertTokenizer

from fastdistil.data.corpus import ListCorpus, open_corpus
from fastdistil.data.token_store import (
    Packer,
    TokenStore,
    build_token_store,
    cached_token_store,
    default_cache_dir,
    open_token_store,
)
from fastdistil.data.tokenizer import TokenizerFacts, train_wordpiece
from fastdistil.errors import RunError, UserError

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture
def corpus(documents) -> ListCorpus:
    return ListCorpus("test", documents, "fingerprint of the test's documents")


def pack(documents: list[list[int]], max_length: int) -> list[list[int]]:
    packer = Packer(begin_id=1, end_id=2, max_length=max_length)
    sequences = [sequence for document in documents for sequence in packer.add(document)]
    return sequences + packer.flush()


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([[10, 11, 12]], [[1, 10, 11, 12, 2]]),
        ([[10, 11], [20, 21]], [[1, 10, 11, 2, 20, 2], [1, 21, 2]]),
        ([[10, 11, 12, 13], [20]], [[1, 10, 11, 12, 13, 2], [1, 20, 2]]),
        # After two documents one place is left, which only another end token could take.
        ([[10], [11], [20, 21]], [[1, 10, 2, 11, 2], [1, 20, 21, 2]]),
        ([list(range(10, 19))], [[1, 10, 11, 12, 13, 2], [1, 14, 15, 16, 17, 2], [1, 18, 2]]),
        ([[], [10], []], [[1, 10, 2]]),
        ([], []),
    ],
)
def test_packing(documents, expected):
    assert pack(documents, 6) == expected


def test_sequence_must_hold_a_token():
    with pytest.raises(UserError, match="max_length must be >= 3, got 2"):
        pack([], 2)


@pytest.mark.parametrize("max_length", [32, 45])
@pytest.mark.parametrize("kind", ["tokenizer", "roberta_tokenizer"])
def test_tokens_equal_a_direct_tokenisation(request, corpus, tmp_path, kind, max_length):
    tokenizer = request.getfixturevalue(kind)
    store = build_token_store(corpus, tokenizer, tmp_path / "store", max_length)
    ids, lengths = np.array(store.input_ids), store.lengths
    real = np.arange(max_length) < lengths[:, None]

    direct = tokenizer(corpus.documents, add_special_tokens=False)["input_ids"]
    special = np.isin(ids, [tokenizer.cls_token_id, tokenizer.sep_token_id]) | ~real
    assert ids[~special].tolist() == [token for document in direct for token in document]

    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids[np.arange(len(ids)), lengths - 1] == tokenizer.sep_token_id).all()
    assert (ids[~real] == tokenizer.pad_token_id).all()
    assert (lengths[:-1] >= max_length - 1).all()
    # One end token behind each document, and one more wherever a document is cut.
    tail = ids[:, 1:] == tokenizer.sep_token_id
    assert len(direct) <= tail.sum() <= len(direct) + len(ids)
    assert (store.token_counts == np.bincount(ids[real], minlength=store.meta.vocab_size)).all()
    assert store.meta.num_tokens == lengths.sum()


def test_small_vocabularies_take_two_bytes_a_token(corpus, tokenizer, tmp_path):
    store = build_token_store(corpus, tokenizer, tmp_path / "store", 32)
    assert store.input_ids.dtype == np.uint16
    assert (tmp_path / "store" / "input_ids.bin").stat().st_size == len(store) * 32 * 2


def test_text_that_spells_a_special_token_stays_text(tokenizer, tmp_path):
    store = build_token_store(["the [MASK] of [PAD] [SEP]"], tokenizer, tmp_path / "store", 64)
    ids = store.input_ids[0, 1 : store.lengths[0] - 1]
    assert not set(ids.tolist()) & {tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id}


def test_truncation_of_the_tokenizer_neither_applies_nor_changes(documents, tmp_path):
    tokenizer = train_wordpiece(documents, 120)
    tokenizer.backend_tokenizer.enable_truncation(5)
    store = build_token_store(documents[:1], tokenizer, tmp_path / "store", 128)
    assert store.lengths[0] > 10
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5


def test_max_sequences_takes_the_first_ones(corpus, tokenizer, tmp_path):
    whole = build_token_store(corpus, tokenizer, tmp_path / "whole", 32)
    part = build_token_store(corpus, tokenizer, tmp_path / "part", 32, max_sequences=7)
    assert len(part) == 7
    assert (part.input_ids == whole.input_ids[:7]).all()


def test_progress_counts_documents_and_sequences(corpus, tokenizer, tmp_path):
    calls = []
    store = build_token_store(corpus, tokenizer, tmp_path / "s", 32, on_progress=lambda *n: calls.append(n))
    assert calls == [(150, len(store) - 1)]  # the last sequence is closed at the end


def cached(corpus, tokenizer, tmp_path, max_length=32) -> TokenStore:
    return cached_token_store(corpus, tokenizer, max_length=max_length, cache_dir=tmp_path)


def test_store_is_reused_for_the_same_corpus_tokenizer_and_length(corpus, tokenizer, tmp_path):
    first = cached(corpus, tokenizer, tmp_path)
    inode = (first.path / "input_ids.bin").stat().st_ino
    second = cached(corpus, tokenizer, tmp_path)
    assert (second.path / "input_ids.bin").stat().st_ino == inode


def test_other_corpus_tokenizer_or_length_is_another_store(corpus, documents, tokenizer, tmp_path):
    first = cached(corpus, tokenizer, tmp_path)
    others = [
        cached(ListCorpus("test", documents, "changed"), tokenizer, tmp_path),
        cached(corpus, train_wordpiece(documents, 119), tmp_path),
        cached(corpus, tokenizer, tmp_path, max_length=33),
    ]
    assert len({first.path, *(other.path for other in others)}) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no meta", "torn meta", "no counts"])
def test_torn_store_is_rebuilt(corpus, tokenizer, tmp_path, damage):
    store = cached(corpus, tokenizer, tmp_path)
    expected, path = np.array(store.input_ids), store.path
    ids = path / "input_ids.bin"
    if damage == "truncated":
        os.truncate(ids, ids.stat().st_size // 2)
    elif damage == "flipped":
        ids.write_bytes(ids.read_bytes()[:-1] + b"\x01")
    elif damage == "no meta":
        (path / "meta.json").unlink()
    elif damage == "torn meta":
        os.truncate(path / "meta.json", 40)
    else:
        (path / "token_counts.npy").unlink()
    with pytest.raises(UserError, match="token store"):
        TokenStore.open(path)
    assert (cached(corpus, tokenizer, tmp_path).input_ids == expected).all()


def test_interrupted_build_leaves_nothing(tokenizer, tmp_path):
    def documents():
        yield "The first document."
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_token_store(documents(), tokenizer, tmp_path / "store", 32)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    def save(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(RunError, match=r"no space left on the disk of .*store while preparing corpus 'test'"):
        build_token_store(corpus, tokenizer, tmp_path / "store", 32)
    assert list(tmp_path.iterdir()) == []


def test_store_that_another_process_finished_first_is_used(corpus, tokenizer, tmp_path, monkeypatch):
    ready = build_token_store(corpus, tokenizer, tmp_path / "ready", 32)
    inode = (ready.path / "input_ids.bin").stat().st_ino
    rename = Path.rename

    def other_was_faster(self, target):
        rename(ready.path, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", other_was_faster)
    store = build_token_store(corpus, tokenizer, tmp_path / "store", 32)
    assert (store.path / "input_ids.bin").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_output_folder_in_use_is_refused(corpus, tokenizer, tmp_path):
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already and is not empty"):
        build_token_store(corpus, tokenizer, tmp_path, 32)


@pytest.mark.parametrize("texts", [[], ["\u200b"]])
def test_corpus_without_text_is_refused(tokenizer, tmp_path, texts):
    with pytest.raises(UserError, match="corpus 'nothing' holds no text"):
        build_token_store(ListCorpus("nothing", texts, ""), tokenizer, tmp_path / "store", 32)


def test_split_is_disjoint_complete_and_always_the_same(corpus, tokenizer, tmp_path):
    store = cached(corpus, tokenizer, tmp_path)
    training, validation = store.split(0.1)
    assert len(validation) == round(0.1 * len(store))
    assert sorted([*training, *validation]) == list(range(len(store)))
    assert (np.diff(training) > 0).all()
    again = TokenStore.open(store.path).split(0.1)
    assert (again[1] == validation).all()


def test_split_keeps_at_least_one_sequence_on_either_side(corpus, tokenizer, tmp_path):
    store = cached(corpus, tokenizer, tmp_path)
    assert [len(part) for part in store.split(1e-6)] == [len(store) - 1, 1]
    assert [len(part) for part in store.split(0)] == [len(store), 0]
    single = build_token_store(corpus, tokenizer, tmp_path / "single", 32, max_sequences=1)
    with pytest.raises(UserError, match="gives 1 sequence of 32 tokens: too short"):
        single.split(0.5)
    with pytest.raises(UserError, match=r"validation_fraction must be in \[0, 1\), got 1"):
        store.split(1)


def test_prepared_store_must_fit_the_run(corpus, documents, tokenizer, roberta_tokenizer, tmp_path):
    path = build_token_store(corpus, tokenizer, tmp_path / "store", 32).path
    assert len(open_token_store(path, tokenizer, max_length=32)) > 0
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        open_token_store(path, roberta_tokenizer, max_length=32)
    with pytest.raises(UserError, match="has sequences of 32 tokens, max_length is 64"):
        open_token_store(path, tokenizer, max_length=64)


def test_store_of_another_format_is_refused(corpus, tokenizer, tmp_path):
    path = build_token_store(corpus, tokenizer, tmp_path / "store", 32).path
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        TokenStore.open(path)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTDISTIL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "fastdistil"
    monkeypatch.setenv("FASTDISTIL_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"


@pytest.mark.parametrize("kind", ["tokenizer", "roberta_tokenizer"])
def test_fingerprint_survives_saving_and_loading(request, tmp_path, kind):
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        TokenizerFacts.from_tokenizer(loaded).fingerprint
        == TokenizerFacts.from_tokenizer(tokenizer).fingerprint
    )


def test_tokenizer_without_a_mask_token_is_refused(tokenizer):
    bare = BertTokenizer(vocab=tokenizer.get_vocab(), mask_token=None)
    with pytest.raises(UserError, match="has no mask token"):
        TokenizerFacts.from_tokenizer(bare)


def test_wordpiece_vocabulary_is_a_function_of_the_text(documents):
    vocabularies = [train_wordpiece(documents, 150).get_vocab() for _ in range(3)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    assert len(vocabularies[0]) == 150
    assert [token for token, i in vocabularies[0].items() if i == 0] == ["[PAD]"]


def test_wordpiece_tokenizer_splits_and_lowers(documents):
    tokenizer = train_wordpiece(documents, 150)
    tokens = tokenizer.tokenize("TEACHER distilled")
    assert "".join(token.removeprefix("##") for token in tokens) == "teacherdistilled"
    assert sorted(tokenizer.all_special_ids) == list(range(5))


@pytest.mark.parametrize(
    ("texts", "size", "message"), [([], 100, "no text"), (["a"], 10, "vocab_size must be >= 64")]
)
def test_wordpiece_refuses_what_cannot_work(texts, size, message):
    with pytest.raises(UserError, match=message):
        train_wordpiece(texts, size)


@pytest.mark.skipif(not (SHARED / "data/text").is_dir(), reason="the shared text and model are not here")
def test_real_text_and_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/encoder-12x384")
    source = tmp_path / "wikitext.parquet"
    shutil.copy(SHARED / "data/text/wikitext2_raw/validation.parquet", source)
    corpus = open_corpus(str(source))
    store = cached_token_store(corpus, tokenizer, max_length=128, cache_dir=tmp_path)
    assert store.input_ids.dtype == np.uint16
    ids = np.array(store.input_ids)
    ordinary = ids[~np.isin(ids, [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id])]
    direct = tokenizer(list(corpus), add_special_tokens=False, verbose=False, split_special_tokens=True)[
        "input_ids"
    ]
    assert ordinary.tolist() == [token for document in direct for token in document]
