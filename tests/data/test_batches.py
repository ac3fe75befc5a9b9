"""The order of the data is the same however a step's batch is divided, and follows from the step alone."""

import numpy as np
import pytest

from fastdistil.data.batches import Share, StoreBatches, evaluation_batches
from fastdistil.data.token_store import TokenStore, build_token_store
from fastdistil.errors import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer, documents) -> TokenStore:
    return build_token_store(documents, tokenizer, tmp_path_factory.mktemp("batches") / "store", 32)


def samples(source: StoreBatches, step: int) -> list[tuple[int, int]]:
    """(sequence, epoch) of each row, in reading order."""
    return [
        (row, epoch)
        for batch in source.micro_batches(step)
        for row, epoch in zip(batch.sequence_index.tolist(), batch.epoch.tolist(), strict=True)
    ]


def test_ranks_and_micro_batches_divide_the_same_samples(store):
    indices = np.arange(10, 61)
    whole = StoreBatches(store, indices, Share(8), seed=3)
    accumulated = StoreBatches(store, indices, Share(8, 2), seed=3)
    ranks = [StoreBatches(store, indices, Share(8, 2, rank, 2), seed=3) for rank in range(2)]
    for step in range(15):
        expected = samples(whole, step)
        assert len(expected) == 8
        assert samples(accumulated, step) == expected
        assert samples(ranks[0], step) + samples(ranks[1], step) == expected
    assert [batch.input_ids.shape for batch in ranks[0].micro_batches(0)] == [(2, 32), (2, 32)]


def test_each_epoch_reads_each_sequence_once_in_another_order(store):
    indices = np.arange(5, 45)  # 40 sequences in steps of 16: steps span epochs
    source = StoreBatches(store, indices, Share(16), seed=0)
    read = [sample for step in range(10) for sample in samples(source, step)]
    epochs = [[row for row, epoch in read if epoch == e] for e in range(4)]
    assert all(sorted(rows) == indices.tolist() for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert source.steps_per_epoch == 2.5


def test_step_alone_says_what_is_read(store):
    indices = np.arange(40)
    straight = StoreBatches(store, indices, Share(16), seed=0)
    expected = [samples(straight, step) for step in range(8)]
    resumed = StoreBatches(store, indices, Share(16), seed=0)
    resumed.load_state_dict(straight.state_dict())
    assert [samples(resumed, step) for step in (5, 6, 7)] == expected[5:]
    assert samples(resumed, 1) == expected[1]


def test_corpus_smaller_than_a_batch_is_read_several_times_in_a_step(store):
    source = StoreBatches(store, np.arange(3), Share(8), seed=0)
    first, second = samples(source, 0), samples(source, 1)
    assert sorted(first[:3]) == [(0, 0), (1, 0), (2, 0)]
    assert sorted(first[6:] + second[:1]) == [(0, 2), (1, 2), (2, 2)]


def test_rows_are_those_of_the_store(store):
    (batch,) = StoreBatches(store, np.arange(len(store)), Share(16), seed=0).micro_batches(2)
    rows = batch.sequence_index.numpy()
    assert (batch.input_ids.numpy() == store.input_ids[rows]).all()
    assert (batch.attention_mask.sum(1).numpy() == store.lengths[rows]).all()


def test_seed_changes_the_order(store):
    indices = np.arange(40)
    orders = [samples(StoreBatches(store, indices, Share(16), seed), 0) for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_evaluation_reads_in_order_and_keeps_the_rest(store):
    indices = np.array([3, 4, 9, 12, 30])
    batches = list(evaluation_batches(store, indices, 2))
    assert [batch.sequence_index.tolist() for batch in batches] == [[3, 4], [9, 12], [30]]
    assert len(list(evaluation_batches(store, indices, 2, max_batches=1))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "batch_size must be >= 1, got 0"),
        ((30, 8, 0, 2), "batch_size 30 is not a multiple of micro_batch_size 8 x 2 processes"),
        ((3, None, 0, 2), "batch_size 3 is not a multiple"),
        ((8, 0), "micro_batch_size 0"),
    ],
)
def test_batch_that_cannot_be_divided_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Share(*arguments)


def test_nothing_to_train_on_is_refused(store):
    with pytest.raises(UserError, match="no sequence to train on"):
        StoreBatches(store, np.arange(0), Share(8), seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.arange(39), Share(16), 0), "sequences is 39, the checkpoint was made with 40"),
        ((np.arange(40), Share(8), 0), "batch_size is 8"),
        ((np.arange(40), Share(16), 1), "seed is 1"),
    ],
)
def test_resuming_with_other_data_is_refused(store, arguments, message):
    state = StoreBatches(store, np.arange(40), Share(16), 0).state_dict()
    with pytest.raises(UserError, match=message):
        StoreBatches(store, *arguments).load_state_dict(state)
