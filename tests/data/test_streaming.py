"""A stream reads every token once an epoch, divides like a store, and resumes exactly."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch

from fastdistil.data.batches import Share, TokenBatch
from fastdistil.data.corpus import Corpus, ListCorpus, StreamedDataset
from fastdistil.data.streaming import StreamBatches, sample_token_counts
from fastdistil.errors import UserError

L = 32


@pytest.fixture(params=["list", "dataset"])
def corpus(request, documents) -> Corpus:
    if request.param == "list":
        return ListCorpus("list", documents, "")
    stream = datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset(num_shards=4)
    return StreamedDataset("dataset", stream, "text", "")


def open_stream(corpus, tokenizer, share=None, seed=0, block=3000) -> StreamBatches:
    return StreamBatches(corpus, tokenizer, L, share or Share(8), seed, characters_per_block=block)


def rows(batches: list[TokenBatch]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [
        (int(index), int(epoch), tuple(ids[mask].tolist()))
        for batch in batches
        for index, epoch, ids, mask in zip(
            batch.sequence_index, batch.epoch, batch.input_ids, batch.attention_mask, strict=True
        )
    ]


def test_ranks_and_micro_batches_divide_the_same_samples(corpus, tokenizer):
    whole = open_stream(corpus, tokenizer)
    accumulated = open_stream(corpus, tokenizer, Share(8, 2))
    ranks = [open_stream(corpus, tokenizer, Share(8, 2, rank, 2)) for rank in range(2)]
    for step in range(40):
        expected = rows(list(whole.micro_batches(step)))
        assert rows(list(accumulated.micro_batches(step))) == expected
        divided = [row for source in ranks for row in rows(list(source.micro_batches(step)))]
        assert divided == expected


def test_every_token_of_an_epoch_is_read_once(documents, tokenizer):
    source = open_stream(ListCorpus("list", documents, ""), tokenizer)
    read = [row for step in range(160) for row in rows(list(source.micro_batches(step)))]
    assert {epoch for _, epoch, _ in read} == {0, 1}
    first = sorted(row for row in read if row[1] == 0)
    assert [index for index, _, _ in first] == list(range(len(first)))
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    tokens = [token for _, _, ids in first for token in ids if token not in special]
    direct = [token for ids in tokenizer(documents, add_special_tokens=False)["input_ids"] for token in ids]
    # The sequence left open at the end is finished by the next epoch.
    assert len(direct) - L < len(tokens) <= len(direct)
    assert tokens == direct[: len(tokens)]


def test_blocks_are_shuffled_by_the_seed(documents, tokenizer):
    corpus = ListCorpus("list", documents, "")
    first, second = (
        rows(list(open_stream(corpus, tokenizer, seed=seed).micro_batches(0))) for seed in (0, 1)
    )
    assert first != second
    assert [index for index, _, _ in first] != sorted(index for index, _, _ in first)


@pytest.mark.parametrize("block", [500, 3000, 10**6])
def test_resumes_exactly_at_any_step(corpus, tokenizer, block):
    straight = open_stream(corpus, tokenizer, block=block)
    states, expected = [json.loads(json.dumps(straight.state_dict()))], []
    for step in range(45):
        expected.append(rows(list(straight.micro_batches(step))))
        states.append(json.loads(json.dumps(straight.state_dict())))
    for step in (0, 1, 2, 7, 19, 20, 33, 44):
        resumed = open_stream(corpus, tokenizer, block=block)
        resumed.load_state_dict(states[step])
        following = [rows(list(resumed.micro_batches(s))) for s in range(step, min(step + 3, 45))]
        assert following == expected[step : step + 3]


def test_state_of_rank_0_serves_every_rank(corpus, tokenizer):
    ranks = [open_stream(corpus, tokenizer, Share(8, 4, rank, 2)) for rank in range(2)]
    for step in range(12):
        for source in ranks:
            list(source.micro_batches(step))
    state = ranks[0].state_dict()
    expected = rows(list(ranks[1].micro_batches(12)))
    resumed = open_stream(corpus, tokenizer, Share(8, 4, 1, 2))
    resumed.load_state_dict(state)
    assert rows(list(resumed.micro_batches(12))) == expected


def test_corpus_shorter_than_a_sequence_is_read_until_it_fills_one(tokenizer):
    source = open_stream(ListCorpus("short", ["The student."], ""), tokenizer, Share(2))
    (batch,) = source.micro_batches(0)
    assert batch.attention_mask.sum() >= 2 * (L - 1)
    assert batch.epoch.tolist() != [0, 0]


@pytest.mark.parametrize("texts", [[], ["\u200b"]])
def test_corpus_without_text_is_refused(tokenizer, texts):
    source = open_stream(ListCorpus("nothing", texts, ""), tokenizer)
    with pytest.raises(UserError, match="corpus 'nothing' holds no text"):
        list(source.micro_batches(0))


def test_resuming_with_another_batch_size_is_refused(corpus, tokenizer):
    state = open_stream(corpus, tokenizer).state_dict()
    with pytest.raises(UserError, match="batch_size is 16, the checkpoint was made with 8"):
        open_stream(corpus, tokenizer, Share(16)).load_state_dict(state)


def test_sampled_counts_are_those_of_the_first_documents(corpus, documents, tokenizer):
    taken, size = [], 0
    for document in documents:
        taken.append(document)
        size += len(document)
        if size >= 2000:
            break
    ids = tokenizer(taken, add_special_tokens=False)["input_ids"]
    expected = Counter(token for row in ids for token in row)
    counts = sample_token_counts(corpus, tokenizer, characters=2000)
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == dict(expected)
    assert counts.dtype == np.int64
    assert len(counts) == len(tokenizer)


def test_padding_is_masked(documents, tokenizer):
    source = open_stream(ListCorpus("list", documents, ""), tokenizer)
    for step in range(20):
        (batch,) = source.micro_batches(step)
        assert ((batch.input_ids == tokenizer.pad_token_id) == ~batch.attention_mask).all()
        assert (batch.attention_mask.sum(1) >= L - 1).all()
        assert batch.input_ids.dtype == torch.int64
