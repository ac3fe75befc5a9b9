"""Held-out scores against the model's own loss on the same masked text."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from fastdistil.data.batches import read_batch
from fastdistil.data.masking import Masker
from fastdistil.data.tokenizer import TokenizerFacts
from fastdistil.errors import UserError
from fastdistil.evaluate import evaluate_masked_lm


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=45,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        max_position_embeddings=16,
    )
    return BertForMaskedLM(config)


def test_scores_equal_those_from_whole_logits_in_float64(model, tokenizer, store):
    facts, rows = TokenizerFacts.from_tokenizer(tokenizer), np.arange(len(store))
    score = evaluate_masked_lm(model, facts, store, rows, batch_size=5)

    batch = read_batch(store, rows)
    masked = Masker(facts, seed=0).mask(
        batch.input_ids, batch.attention_mask, batch.sequence_index, batch.epoch
    )
    with torch.no_grad():
        logits = model.double().eval()(masked.input_ids, masked.attention_mask.long()).logits
    chosen = masked.labels != -100
    loss = torch.nn.functional.cross_entropy(logits[chosen], masked.labels[chosen]).item()
    assert score.tokens == chosen.sum() > 20
    assert score.loss == pytest.approx(loss, rel=1e-5)
    assert score.accuracy == pytest.approx(
        (logits.argmax(-1) == masked.labels)[chosen].double().mean().item()
    )
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_batch_size_does_not_change_which_tokens_are_asked(model, tokenizer, store):
    facts, rows = TokenizerFacts.from_tokenizer(tokenizer), np.arange(len(store))
    one, other = (evaluate_masked_lm(model, facts, store, rows, batch_size=b) for b in (3, 64))
    assert one.tokens == other.tokens
    assert one.accuracy == other.accuracy
    assert one.loss == pytest.approx(other.loss, rel=1e-6)


def test_max_batches_reads_the_first_ones(model, tokenizer, store):
    facts, rows = TokenizerFacts.from_tokenizer(tokenizer), np.arange(len(store))
    first = evaluate_masked_lm(model, facts, store, rows, batch_size=4, max_batches=2)
    assert first == evaluate_masked_lm(model, facts, store, rows[:8], batch_size=4)


def test_dropout_is_off_and_the_mode_and_gradients_are_left_alone(model, tokenizer, store):
    facts, rows = TokenizerFacts.from_tokenizer(tokenizer), np.arange(len(store))
    model.train()
    first, second = (evaluate_masked_lm(model, facts, store, rows) for _ in range(2))
    assert first == second
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_text_without_a_token_to_predict_is_refused(model, tokenizer, store):
    facts = TokenizerFacts.from_tokenizer(tokenizer)
    with pytest.raises(UserError, match="no token to predict"):
        evaluate_masked_lm(model, facts, store, np.arange(0))
