"""Which examples a step reads follows from the step alone, each once an epoch, under the budget of tokens."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fastdistil.data.task_batches import TaskBatches, epoch_batches, read_task_batch
from fastdistil.data.task_encoding import EncodedTask
from fastdistil.data.tasks import find_task
from fastdistil.errors import UserError

PAD = 3


def encoded(name: str = "sst2", n: int = 103, *, max_length: int = 64, labels=None) -> EncodedTask:
    """Random sequences of 3 to `max_length` tokens, none of them the padding token."""
    task, random = find_task(name), np.random.default_rng(0)
    sequences = n * (task.num_labels if task.kind == "choice" else 1)
    lengths = random.integers(3, max_length + 1, sequences)
    offsets = np.concatenate([[0], lengths.cumsum()])
    return EncodedTask(
        task,
        random.integers(4, 1000, offsets[-1], dtype=np.int32),
        random.integers(0, 2, offsets[-1], dtype=np.int8),
        offsets,
        np.arange(n) if labels is None else labels,
        PAD,
        max_length,
        truncated=0,
    )


def batches(
    data: EncodedTask, *, batch_size: int = 8, max_tokens: int = 10**6, seed: int = 0, **more
) -> TaskBatches:
    return TaskBatches(data, batch_size=batch_size, max_tokens=max_tokens, seed=seed, **more)


def read(source: TaskBatches, step: int) -> list[int]:
    """The labels of a step, which say which examples they are of."""
    return [label for batch in source.micro_batches(step) for label in batch.labels.tolist()]


@pytest.mark.parametrize(
    "batch_size", [1, 8, 103, 200]
)  # one row, an odd rest, exactly one step, less than one
def test_every_example_is_read_once_an_epoch_in_another_order(batch_size):
    source = batches(encoded(), batch_size=batch_size)
    steps = source.steps_per_epoch
    assert steps == -(-103 // batch_size)
    epochs = [[read(source, step) for step in range(e * steps, (e + 1) * steps)] for e in range(3)]
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == list(range(103))
        assert sorted(len(rows) for rows in epoch)[1:] == [batch_size] * (steps - 1)
    if steps > 1:
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_divide_the_same_examples(world_size):
    data = encoded()
    whole = batches(data, max_tokens=200)
    ranks = [batches(data, max_tokens=200, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(30):
        parts = [read(rank, step) for rank in ranks]
        assert sorted(row for part in parts for row in part) == sorted(read(whole, step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_no_rank_is_without_an_example():
    data = encoded(n=9)  # steps of 4, 4 and 1
    ranks = [batches(data, batch_size=4, rank=r, world_size=4) for r in range(4)]
    parts = [[read(rank, step) for rank in ranks] for step in range(3)]
    (last,) = [part for part in parts if len({tuple(rows) for rows in part}) == 1]
    assert [len(rows) for rows in last] == [1] * 4
    others = [row for part in parts if part is not last for rows in part for row in rows]
    assert sorted([*others, last[0][0]]) == list(range(9))
    # Two examples for three ranks: the third begins again.
    data = encoded(n=2)
    parts = [read(batches(data, batch_size=2, rank=r, world_size=3), 0) for r in range(3)]
    assert [len(rows) for rows in parts] == [1, 1, 1]
    assert parts[2] == parts[0] != parts[1]


@pytest.mark.parametrize("max_tokens", [1, 64, 200, 1000])
def test_micro_batches_keep_to_the_budget(max_tokens):
    source = batches(encoded(), batch_size=16, max_tokens=max_tokens)
    for step in range(7):
        parts = list(source.micro_batches(step))
        for batch in parts:
            assert batch.input_ids.numel() <= max_tokens or len(batch.labels) == 1
        # In order, and no part could have taken the next one's first example.
        assert [label for batch in parts for label in batch.labels.tolist()] == source.rows(step).tolist()
        for one, other in pairwise(parts):
            longest = max(one.input_ids.shape[1], padded(int(other.attention_mask[0].sum())))
            assert (len(one.labels) + 1) * longest > max_tokens


def padded(length: int) -> int:
    return -(-length // 8) * 8


def test_rows_are_the_examples_padded_to_a_multiple_of_eight():
    data = encoded()
    for batch in batches(data, max_tokens=300).micro_batches(3):
        lengths = []
        for row, label in enumerate(batch.labels.tolist()):
            begin, end = data.offsets[label : label + 2]
            lengths.append(end - begin)
            assert batch.input_ids[row, : end - begin].tolist() == data.input_ids[begin:end].tolist()
            assert (
                batch.token_type_ids[row, : end - begin].tolist() == data.token_type_ids[begin:end].tolist()
            )
            assert batch.attention_mask[row].sum() == end - begin
        assert (batch.input_ids[~batch.attention_mask] == PAD).all()
        assert (batch.token_type_ids[~batch.attention_mask] == 0).all()
        assert batch.input_ids.shape[1] == padded(max(lengths))
        assert {batch.input_ids.dtype, batch.token_type_ids.dtype} == {torch.int64}
        assert batch.attention_mask.dtype == torch.bool


def test_padding_stops_at_the_longest_that_the_model_may_read():
    data = encoded(max_length=21)
    assert (
        max(batch.input_ids.shape[1] for step in range(13) for batch in batches(data).micro_batches(step))
        == 21
    )


def test_a_batch_holds_texts_of_similar_length():
    lengths = np.random.default_rng(1).integers(3, 129, 10_000)

    def padding(parts: list[np.ndarray]) -> float:
        return 1 - lengths.sum() / sum(len(part) * lengths[part].max() for part in parts)

    grouped = epoch_batches(lengths, 32, seed=0, epoch=0)
    shuffled = np.array_split(np.random.default_rng(0).permutation(10_000), len(grouped))
    assert padding(shuffled) > 0.4
    assert padding(grouped) < 0.04
    # And the order of the batches says nothing of their length.
    means = [lengths[part].mean() for part in grouped]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15


def test_the_step_alone_says_what_is_read():
    data = encoded()
    straight = batches(data)
    expected = [read(straight, step) for step in range(30)]
    resumed = batches(data)
    resumed.load_state_dict(straight.state_dict())
    assert [read(resumed, step) for step in range(20, 30)] == expected[20:]
    assert read(resumed, 1) == expected[1]


def test_the_seed_changes_the_order():
    assert read(batches(encoded(), seed=0), 0) != read(batches(encoded(), seed=1), 0)


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        (encoded(n=50), {}, "examples is 50, the checkpoint was made with 103"),
        (encoded(labels=np.zeros(103)), {}, "sha256 is .*, the checkpoint was made with"),
        (encoded(), {"batch_size": 9}, "batch_size is 9, the checkpoint was made with 8"),
        (encoded(), {"seed": 1}, "seed is 1, the checkpoint was made with 0"),
    ],
)
def test_resuming_with_other_data_is_refused(data, change, message):
    state = batches(encoded()).state_dict()
    with pytest.raises(UserError, match=message):
        batches(data, **change).load_state_dict(state)


def test_another_budget_or_number_of_processes_may_resume():
    state = batches(encoded()).state_dict()
    batches(encoded(), max_tokens=128, rank=1, world_size=2).load_state_dict(state)


def test_choices_stay_together():
    data = encoded("dream", 20)
    (batch,) = batches(data, batch_size=4).micro_batches(1)
    assert batch.num_choices == 3
    assert batch.input_ids.shape[0] == 12
    inputs = batch.inputs
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(value.shape[:2] == (4, 3) for value in inputs.values())
    for row, label in enumerate(batch.labels.tolist()):
        for option in range(3):
            begin, end = data.offsets[3 * label + option : 3 * label + option + 2]
            tokens = inputs["input_ids"][row, option, : end - begin]
            assert tokens.tolist() == data.input_ids[begin:end].tolist()


def test_the_budget_counts_all_options():
    for batch in batches(encoded("dream", 20), batch_size=20, max_tokens=500).micro_batches(0):
        assert batch.input_ids.numel() <= 500 or len(batch.labels) == 1


@pytest.mark.parametrize(
    ("task", "labels", "dtype"),
    [
        ("sst2", np.array([1, -100]), torch.int64),
        ("stsb", np.array([2.5, np.nan], np.float32), torch.float32),
        ("squad", np.array([[1, 2], [0, 0]]), torch.int64),
    ],
)
def test_labels_keep_their_kind(task, labels, dtype):
    batch = read_task_batch(encoded(task, 2, labels=labels), np.array([1, 0]))
    assert batch.labels.dtype == dtype
    np.testing.assert_array_equal(batch.labels.numpy(), labels[::-1])
    assert batch.inputs["input_ids"].shape == batch.input_ids.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_come_on_the_device():
    (batch,) = batches(encoded(), device="cuda").micro_batches(0)
    assert batch.input_ids.device.type == batch.labels.device.type == "cuda"
    assert batch.num_choices == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        batches(encoded(), **arguments)
