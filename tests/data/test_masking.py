"""Masking: exact counts, the published distributions, and the same result however sequences are grouped."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdistil.data.masking import Masker, _top_words, num_picks
from fastdistil.data.tokenizer import TokenizerFacts

PAD, UNK, CLS, SEP, MASK = range(5)
V = 100


@pytest.fixture
def plain_facts() -> TokenizerFacts:
    """100 tokens, the first 5 special, from 60 on continuations."""
    return TokenizerFacts(V, CLS, SEP, PAD, MASK, (PAD, UNK, CLS, SEP, MASK), np.arange(V) >= 60, "plain")


def sequences(lengths: list[int], width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[CLS] ordinary tokens [SEP] [PAD]...: input_ids (B, L) and attention_mask (B, L)."""
    ids = torch.randint(5, V, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = CLS
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1] = SEP
        row[length:] = PAD
    return ids, torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def within(observed: float | Tensor, expected: float | Tensor, trials: int) -> bool:
    """Whether shares of `trials` draws lie within 4.5 standard deviations of their expectations."""
    observed, expected = torch.as_tensor(observed), torch.as_tensor(expected)
    return bool(((observed - expected).abs() < 4.5 * (expected * (1 - expected) / trials).sqrt()).all())


@pytest.mark.parametrize("width", [128, 37])
def test_full_sequences_get_exactly_k_picks(plain_facts, width):
    ids, attention_mask = sequences([width] * 64, width)
    batch = Masker(plain_facts, seed=0).mask(ids, attention_mask, torch.arange(64), 0)
    k = num_picks(0.15, width)
    assert k == math.floor(0.15 * width + 0.5)
    assert ((batch.labels != -100).sum(1) == k).all()
    assert batch.positions.shape == (64, k)


def test_padded_sequences_get_the_picks_of_their_own_length(plain_facts):
    lengths = [128, 100, 50, 20, 7, 3]
    ids, attention_mask = sequences(lengths, 128)
    batch = Masker(plain_facts, seed=0).mask(ids, attention_mask, torch.arange(6), 0)
    assert (batch.labels != -100).sum(1).tolist() == [19, 15, 8, 3, 1, 1]
    assert (batch.position_labels != -100).sum(1).tolist() == [19, 15, 8, 3, 1, 1]


def test_sequence_of_special_tokens_gets_no_pick(plain_facts):
    ids = torch.tensor([[CLS, UNK, SEP, PAD, PAD, PAD, PAD, PAD]])
    batch = Masker(plain_facts, seed=0).mask(ids, ids != PAD, torch.arange(1), 0)
    assert (batch.labels == -100).all()
    assert batch.input_ids.tolist() == ids.tolist()


def test_special_tokens_and_padding_are_never_picked_nor_drawn(plain_facts):
    ids, attention_mask = sequences([30, 16] * 500, 30)
    ids[:, 5] = UNK
    batch = Masker(plain_facts, seed=0, mask=0, random=1, keep=0).mask(
        ids, attention_mask, torch.arange(1000), 0
    )
    special = ids < 5
    assert (batch.labels[special] == -100).all()
    assert (batch.input_ids[special] == ids[special]).all()
    assert (batch.input_ids[~special] >= 5).all()


def test_labels_and_positions_agree(plain_facts):
    ids, attention_mask = sequences([40, 17, 5], 40)
    original = ids.clone()
    batch = Masker(plain_facts, seed=3).mask(ids, attention_mask, torch.arange(3), 0)
    picked = batch.labels != -100
    assert (ids == original).all()
    assert (batch.labels[picked] == ids[picked]).all()
    assert (batch.input_ids[~picked] == ids[~picked]).all()
    assert (batch.position_labels == batch.labels.gather(1, batch.positions)).all()
    for row in range(3):
        used = batch.positions[row][batch.position_labels[row] != -100]
        assert used.tolist() == picked[row].nonzero().squeeze(1).tolist()
        assert len(set(batch.positions[row].tolist())) == batch.positions.shape[1]


def test_every_position_is_picked_equally_often(plain_facts):
    ids, attention_mask = sequences([20] * 20_000, 20)
    batch = Masker(plain_facts, seed=0).mask(ids, attention_mask, torch.arange(20_000), 0)
    share = (batch.labels != -100).float().mean(0)
    assert within(share[1:19], torch.full((18,), 3 / 18), 20_000)


def test_rarity_smoothing_has_the_inclusion_probabilities_of_weighted_draws_without_replacement(plain_facts):
    counts = np.ones(V, np.int64)
    counts[10:22] = [1, 2, 5, 10, 30, 100, 300, 1000, 3000, 10_000, 50_000, 0]
    row = torch.tensor([CLS, *range(10, 22), SEP])
    n = 40_000
    masker = Masker(plain_facts, seed=0, smoothing=0.7, token_counts=counts)
    batch = masker.mask(row.expand(n, -1), torch.ones(n, 14, dtype=torch.bool), torch.arange(n), 0)
    assert masker.num_picks(14) == 2

    weight = torch.tensor(counts[10:22]).clamp(min=1).double() ** -0.7
    p = weight / weight.sum()
    # First draw i, or first j and then i among the others.
    second = (p / (1 - p)).sum() - p / (1 - p)
    expected = p + p * second
    assert expected.sum() == pytest.approx(2)
    assert within((batch.labels != -100).double().mean(0)[1:13], expected, n)


def test_picks_become_mask_random_or_stay_in_the_given_shares(plain_facts):
    n = 5000
    ids, attention_mask = sequences([64] * n, 64)
    batch = Masker(plain_facts, seed=1).mask(ids, attention_mask, torch.arange(n), 0)
    picked = batch.labels != -100
    shown, label = batch.input_ids[picked], batch.labels[picked]
    draws = len(shown)
    assert draws == n * 10
    assert within((shown == MASK).double().mean(), 0.8, draws)
    # A random token is the original itself once in V - 5 draws.
    assert within((shown == label).double().mean(), 0.1 + 0.1 / (V - 5), draws)
    other = shown[(shown != MASK) & (shown != label)]
    frequency = torch.bincount(other, minlength=V)[5:].double()
    chi_square = ((frequency - frequency.mean()) ** 2 / frequency.mean()).sum()
    assert 40 < chi_square < 94 + 4.5 * (2 * 94) ** 0.5  # 94 degrees of freedom


def test_replacement_is_independent_of_the_pick(plain_facts):
    """The same shares at the most and the least likely token: one noise for both would couple them."""
    counts = np.ones(V, np.int64)
    counts[10] = 10_000
    row = torch.tensor([CLS, 10, 11, 12, 13, SEP])
    n = 60_000
    masker = Masker(plain_facts, seed=0, probability=0.34, smoothing=0.7, token_counts=counts)
    batch = masker.mask(row.expand(n, -1), torch.ones(n, 6, dtype=torch.bool), torch.arange(n), 0)
    for position in (1, 2):
        shown = batch.input_ids[batch.labels[:, position] != -100, position]
        assert within((shown == MASK).double().mean(), 0.8, len(shown))


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.7}, {"whole_word": True}])
def test_result_does_not_depend_on_grouping(plain_facts, options):
    ids, attention_mask = sequences([33, 20, 9, 33, 31, 12], 33)
    index, epoch = torch.tensor([5, 900, 17, 2, 40_000, 8]), torch.tensor([0, 0, 1, 1, 2, 3])
    masker = Masker(plain_facts, seed=0, token_counts=np.arange(V), **options)
    together = masker.mask(ids, attention_mask, index, epoch)
    for rows in ([4, 1], [0], [5, 3, 2]):
        apart = masker.mask(ids[rows], attention_mask[rows], index[rows], epoch[rows])
        for field in dataclasses.fields(apart)[:5]:  # the others are the batch's own
            assert (getattr(apart, field.name) == getattr(together, field.name)[rows]).all(), field.name


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1)])
def test_other_seeds_and_epochs_pick_independently(plain_facts, seed, epoch):
    n = 2000
    ids, attention_mask = sequences([22] * n, 22)  # 3 picks among 20
    first = Masker(plain_facts, seed=0).mask(ids, attention_mask, torch.arange(n), 0)
    second = Masker(plain_facts, seed=seed).mask(ids, attention_mask, torch.arange(n), epoch)
    both = ((first.labels != -100) & (second.labels != -100)).sum() / (20 * n)
    assert within(both, (3 / 20) ** 2, 20 * n)


def greedy_words_ref(
    score: list[float], ordinary: list[bool], continuation: list[bool], budget: int
) -> list[bool]:
    """BERT's create_pretraining_data: words in order, each taken whole if it still fits."""
    words: list[list[int]] = []
    for position in range(len(score)):
        if ordinary[position] and continuation[position]:
            words[-1].append(position)
        elif ordinary[position]:
            words.append([position])
    picked = [False] * len(score)
    for word in sorted(words, key=lambda word: -score[word[0]]):
        if sum(picked) + len(word) <= budget:
            for position in word:
                picked[position] = True
    return picked


@pytest.mark.parametrize("budget", [1, 2, 6, 19])
def test_whole_words_equal_the_sequential_algorithm(budget):
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.rand(200, 40, generator=generator) > 0.1
    # A word continues only right behind another piece of it.
    behind_ordinary = torch.nn.functional.pad(ordinary, (1, 0))[:, :40]
    continuation = ordinary & behind_ordinary & (torch.rand(200, 40, generator=generator) < 0.4)
    score = torch.randn(200, 40, generator=generator)
    picked = _top_words(score, ordinary, continuation, torch.full((200, 1), budget))
    for row in range(200):
        expected = greedy_words_ref(
            score[row].tolist(), ordinary[row].tolist(), continuation[row].tolist(), budget
        )
        assert picked[row].tolist() == expected


def test_whole_word_picks_all_pieces_or_none(tokenizer, facts, documents):
    encoded = tokenizer(documents, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    ids, attention_mask = encoded["input_ids"], encoded["attention_mask"]
    masker = Masker(facts, seed=0, whole_word=True)
    batch = masker.mask(ids, attention_mask, torch.arange(len(ids)), 0)
    pieces = 0
    for row, labels in zip(ids.tolist(), batch.labels.tolist(), strict=True):
        for position, token in enumerate(tokenizer.convert_ids_to_tokens(row)):
            if token.startswith("##"):
                assert (labels[position] == -100) == (labels[position - 1] == -100)
                pieces += labels[position] != -100
    assert pieces > 100
    budget = (attention_mask.sum(1) * 0.15 + 0.5).floor()
    used = (batch.labels != -100).sum(1)
    assert (used <= budget).all()
    assert used.sum() > 0.9 * budget.sum()


def test_word_that_was_cut_behind_a_special_token_is_whole_and_within_the_budget(plain_facts):
    """[CLS] and the [SEP] between two segments are followed by pieces that continue a word."""
    row = torch.tensor([CLS, 61, 62, 63, SEP, 64, 65, 66, 67, 10, 11, 12, 13, 14, 15, SEP])
    n = 2000
    masker = Masker(plain_facts, seed=0, probability=0.2, whole_word=True)
    batch = masker.mask(row.expand(n, -1), torch.ones(n, 16, dtype=torch.bool), torch.arange(n), 0)
    picked = batch.labels != -100
    assert masker.num_picks(16) == 3
    assert (picked.sum(1) == 3).all()
    assert (batch.position_labels != -100).all()
    first = picked[:, 1:4]
    assert (first.all(1) == first.any(1)).all()
    assert within(first.any(1).double().mean(), 1 / 7, n)  # drawn first of seven words that fit; later none
    assert not picked[:, 5:9].any()  # four pieces never fit


def test_words_of_byte_level_bpe_are_known(roberta_tokenizer):
    facts = TokenizerFacts.from_tokenizer(roberta_tokenizer)
    ids = roberta_tokenizer("Distillation keeps quality.", add_special_tokens=False)["input_ids"]
    starts = ~facts.continuation[ids]
    assert starts.sum() == 3  # the full stop belongs to its word
    assert starts[0]


def test_traces_into_one_graph(plain_facts):
    """No data-dependent shape and no read of a value on the host: either would break the graph."""
    ids, attention_mask = sequences([40, 21], 40)
    masker = Masker(plain_facts, seed=0, whole_word=True, smoothing=0.7, token_counts=np.arange(V))
    arguments = (ids, attention_mask, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    eager = masker.mask(*arguments)
    compiled = torch.compile(masker.mask, backend="eager", fullgraph=True)(*arguments)
    assert (compiled.input_ids == eager.input_ids).all()
    assert (compiled.labels == eager.labels).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 0.0}, "probability must be in"),
        ({"mask": 0.9}, "add up to 1"),
        ({"mask": 1.2, "random": -0.2, "keep": 0.0}, "add up to 1"),
        ({"smoothing": 0.7}, "needs token_counts"),
    ],
)
def test_bad_options_are_refused(plain_facts, options, message):
    with pytest.raises(ValueError, match=message):
        Masker(plain_facts, seed=0, **options)


def test_whole_word_needs_a_tokenizer_that_marks_words(plain_facts):
    with pytest.raises(ValueError, match="does not mark words"):
        Masker(dataclasses.replace(plain_facts, continuation=None), seed=0, whole_word=True)
