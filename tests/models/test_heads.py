"""The split head computes the same logits as the model it was taken from."""

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

from fastdistil.errors import UserError
from fastdistil.models.heads import mlm_head


def test_transform_and_vocabulary_product_equal_the_models_logits(tiny_model, tiny_batch):
    ids, mask = tiny_batch(tiny_model)
    hidden = tiny_model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    head = mlm_head(tiny_model)

    logits = nn.functional.linear(head.transform(hidden), head.weight, head.bias)

    expected = tiny_model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_weight_is_the_models_own_tied_embedding(tiny_model):
    assert mlm_head(tiny_model).weight is tiny_model.get_input_embeddings().weight


def test_parameters_are_exactly_those_outside_the_encoder(tiny_model):
    encoder = {id(parameter) for parameter in tiny_model.base_model.parameters()}
    outside = {id(p) for p in tiny_model.parameters()} - encoder
    assert {id(p) for p in mlm_head(tiny_model).parameters()} == outside


def test_another_family_is_refused_with_the_supported_ones():
    config = AlbertConfig(
        vocab_size=20,
        embedding_size=8,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=8,
        num_hidden_layers=1,
    )
    with pytest.raises(UserError, match=r"'albert'.*bert, distilbert, electra, modernbert, roberta"):
        mlm_head(AlbertForMaskedLM(config))
