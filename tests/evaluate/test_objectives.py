"""Held-out terms of objectives against those of one batch of all the text."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from fastdistil.data.batches import read_batch
from fastdistil.data.masking import Masker
from fastdistil.data.tokenizer import TokenizerFacts
from fastdistil.evaluate import evaluate_objectives
from fastdistil.models.student import make_student
from fastdistil.models.taps import tap_teacher
from fastdistil.objectives import HiddenObjective, RelationsObjective

OBJECTIVES = [RelationsObjective(0, 1, 4, value_weight=0), HiddenObjective(((0, 1),), 16, weight=5)]


@pytest.fixture
def models():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=45,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        max_position_embeddings=16,
    )
    teacher = BertModel(config, add_pooling_layer=False).eval()
    return make_student(teacher).train(), teacher


@pytest.fixture
def masker(tokenizer):
    return Masker(TokenizerFacts.from_tokenizer(tokenizer), seed=0)


def test_terms_are_unweighted_means_over_all_sequences(models, masker, store):
    """In batches of which the last is smaller: a mean of their means would differ."""
    student, teacher = models
    rows = np.arange(len(store))
    scores = evaluate_objectives(student, teacher, OBJECTIVES, masker, store, rows, batch_size=3)
    assert list(scores) == ["query_relation", "key_relation", "hidden"]

    whole = read_batch(store, rows)
    batch = masker.mask(whole.input_ids, whole.attention_mask, whole.sequence_index, whole.epoch)
    assert len(rows) % 3 > 0
    for objective in OBJECTIVES:
        ours, theirs = (
            tap_teacher(model.eval(), batch.inputs, wanted=wanted)
            for model, wanted in ((student, objective.student_taps), (teacher, objective.teacher_taps))
        )
        counts = objective.counts(batch)
        with torch.no_grad():
            sums = objective.loss(ours, theirs, batch, counts).sums
        for term, value in sums.items():
            assert scores[term] == pytest.approx((value / counts[term]).item(), rel=1e-5)


def test_dropout_is_off_and_the_mode_and_gradients_are_left_alone(models, masker, store):
    student, teacher = models
    rows = np.arange(len(store))
    first, second = (evaluate_objectives(student, teacher, OBJECTIVES, masker, store, rows) for _ in range(2))
    assert first == second
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_teacher_is_no_distance_from_itself(models, masker, store):
    _, teacher = models
    objectives = [RelationsObjective(1, 1, 4), HiddenObjective(((1, 1),), 16)]
    scores = evaluate_objectives(teacher, teacher, objectives, masker, store, np.arange(4))
    assert all(abs(value) < 1e-6 for value in scores.values())
