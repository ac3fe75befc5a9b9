"""Next-sentence prediction against the loss of `transformers`."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from fastdistil.data.masking import MaskedBatch
from fastdistil.errors import UserError
from fastdistil.models.taps import tap, tap_teacher
from fastdistil.objectives import NextSentenceObjective, VocabularyObjective

CONFIG = BertConfig(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    initializer_range=0.5,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BertForPreTraining(CONFIG).eval()


@pytest.fixture
def batch() -> MaskedBatch:
    """Three pairs of segments of 11, 6 and 8 tokens, with two masked tokens each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 61, (3, 11), generator=generator)
    mask = torch.arange(11) < torch.tensor([[11], [6], [8]])
    positions = torch.tensor([[1, 9], [2, 4], [3, 6]])
    picked = torch.randint(5, 61, (3, 2), generator=generator)
    labels = torch.full_like(ids, -100).scatter(1, positions, picked)
    types = ((torch.arange(11) >= torch.tensor([[6], [3], [4]])) & mask).long()
    return MaskedBatch(
        ids, mask, labels, positions, picked, token_type_ids=types, next_sentence=torch.tensor([1, 0, 1])
    )


def test_with_the_masked_tokens_it_is_berts_own_pretraining_loss(model, batch):
    objectives = [VocabularyObjective(kd_weight=0, ce_weight=1), NextSentenceObjective()]
    taps = tap(model, batch.inputs)
    results = [objective.loss(taps, None, batch, objective.counts(batch)) for objective in objectives]
    loss = sum(result.loss for result in results)
    (3 * loss).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    expected = model(**batch.inputs, labels=batch.labels, next_sentence_label=batch.next_sentence).loss
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_weighted_term_is_a_mean_over_sequences(model, batch):
    objective = NextSentenceObjective(weight=0.3)
    assert not objective.needs_teacher
    result = objective.loss(tap(model, batch.inputs), None, batch, objective.counts(batch))
    logits = model(**batch.inputs).seq_relationship_logits
    expected = -logits.log_softmax(-1)[torch.arange(3), batch.next_sentence].mean()
    torch.testing.assert_close(result.loss, 0.3 * expected)
    torch.testing.assert_close(result.sums["next_sentence"], 3 * expected)


def test_micro_batches_add_up_to_the_whole(model, batch):
    objective = NextSentenceObjective()
    counts = objective.counts(batch)
    whole = objective.loss(tap(model, batch.inputs), None, batch, counts)
    parts = []
    for rows in (slice(0, 1), slice(1, 3)):
        micro = MaskedBatch(**{name: value[rows] for name, value in vars(batch).items()})
        parts.append(objective.loss(tap(model, micro.inputs), None, micro, counts))
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    assert counts["next_sentence"].dtype == torch.int64


def test_it_takes_the_pooled_states_of_a_pass_in_bfloat16(model, batch):
    objective = NextSentenceObjective()
    exact = objective.loss(tap(model, batch.inputs), None, batch, objective.counts(batch)).loss
    taps = tap_teacher(model, batch.inputs, torch.bfloat16)
    assert taps.pooled.dtype == torch.bfloat16
    with torch.no_grad():
        result = objective.loss(taps, None, batch, objective.counts(batch))
    torch.testing.assert_close(result.loss, exact, rtol=0.05, atol=0)


def test_a_model_without_the_head_is_refused(batch):
    objective = NextSentenceObjective()
    model = BertForMaskedLM(CONFIG).eval()
    with pytest.raises(UserError, match="BertForMaskedLM does not have: take a BertForPreTraining"):
        objective.loss(tap(model, batch.inputs), None, batch, objective.counts(batch))


def test_text_without_pairs_is_refused(model, batch):
    objective = NextSentenceObjective()
    single = replace(batch, next_sentence=None, token_type_ids=None)
    with pytest.raises(UserError, match="needs text in pairs of segments"):
        objective.loss(tap(model, single.inputs), None, single, objective.counts(single))
