"""Held-out scores against the model's own loss on the same masked text."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from fastdistil.data.batches import read_batch
from fastdistil.data.masking import Masker
from fastdistil.data.sentence_pairs import build_pair_store
from fastdistil.data.tokenizer import TokenizerFacts
from fastdistil.errors import UserError
from fastdistil.evaluate import evaluate_masked_lm


@pytest.fixture
def config():
    torch.manual_seed(0)
    return BertConfig(
        vocab_size=45,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        max_position_embeddings=16,
    )


@pytest.fixture
def model(config):
    return BertForMaskedLM(config)


@pytest.fixture(scope="module")
def pair_store(tokenizer, tmp_path_factory):
    words = np.random.default_rng(1).integers(0, 40, (20, 4, 5))
    documents = ["\n".join(" ".join(f"w{i}" for i in line) for line in document) for document in words]
    return build_pair_store(documents, tokenizer, tmp_path_factory.mktemp("pairs") / "store", 16, seed=0)


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


def test_pretraining_model_is_scored_on_both_tasks_with_token_types(config, tokenizer, pair_store):
    facts, rows = TokenizerFacts.from_tokenizer(tokenizer), np.arange(len(pair_store))
    model = BertForPreTraining(config)
    score = evaluate_masked_lm(model, facts, pair_store, rows, batch_size=7)

    batch = read_batch(pair_store, rows)
    masked = Masker(facts, seed=0).mask(batch.input_ids, batch.attention_mask, batch.sequence_index, 0)
    inputs = (masked.input_ids, masked.attention_mask.long(), batch.token_type_ids)
    with torch.no_grad():
        output = model.double().eval()(*inputs)
    chosen = masked.labels != -100
    loss = torch.nn.functional.cross_entropy(output.prediction_logits[chosen], masked.labels[chosen])
    assert score.loss == pytest.approx(loss.item(), rel=1e-5)
    label = torch.from_numpy(pair_store.pairs["next_sentence"])
    right = (output.seq_relationship_logits.argmax(-1) == label).double().mean()
    assert 0 < right < 1
    assert score.next_sentence_accuracy == pytest.approx(right.item())


def test_next_sentences_are_scored_only_with_pairs_and_a_head(config, model, tokenizer, store, pair_store):
    facts, rows = TokenizerFacts.from_tokenizer(tokenizer), np.arange(10)
    assert evaluate_masked_lm(model, facts, pair_store, rows).next_sentence_accuracy is None
    single = evaluate_masked_lm(BertForPreTraining(config), facts, store, rows)
    assert single.next_sentence_accuracy is None


def test_text_without_a_token_to_predict_is_refused(model, tokenizer, store):
    facts = TokenizerFacts.from_tokenizer(tokenizer)
    with pytest.raises(UserError, match="no token to predict"):
        evaluate_masked_lm(model, facts, store, np.arange(0))
