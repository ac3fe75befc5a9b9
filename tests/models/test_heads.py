"""The split head computes the same logits as the model it was taken from; which models have BERT's other."""

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

from fastdistil.errors import UserError
from fastdistil.models.heads import mlm_head, next_sentence_head, start_at_frequencies


@pytest.fixture(params=["bert", "roberta", "distilbert", "electra", "modernbert", "mobilebert"])
def model(request, build):
    return build(request.param)


def test_transform_and_vocabulary_product_equal_the_models_logits(model, tiny_batch):
    ids, mask = tiny_batch(model)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    head = mlm_head(model)

    logits = nn.functional.linear(head.transform(hidden), head.weight, head.bias)

    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_gradients_through_the_split_head_are_the_models_own(model, tiny_batch):
    ids, mask = tiny_batch(model)
    upstream = torch.randn(*ids.shape, 61, generator=torch.Generator().manual_seed(2))

    def gradients(logits):
        (upstream * logits).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    head = mlm_head(model)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    ours = gradients(nn.functional.linear(head.transform(hidden), head.weight, head.bias))
    expected = gradients(model(input_ids=ids, attention_mask=mask).logits)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


def test_weight_is_the_models_own_tied_embedding(tiny_model):
    assert mlm_head(tiny_model).weight is tiny_model.get_input_embeddings().weight


def test_parameters_are_exactly_those_outside_the_encoder(model):
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    outside = {id(p) for p in model.parameters()} - encoder
    assert {id(p) for p in mlm_head(model).parameters()} == outside


def test_the_bias_starts_at_the_log_frequencies_with_one_more_of_each(model):
    # The counts may end before the vocabulary does.
    counts = torch.arange(60)
    start_at_frequencies(mlm_head(model), counts)
    bias = model.get_output_embeddings().bias
    expected = torch.tensor([*range(1, 61), 1.0]) / (60 * 61 / 2 + 1)
    torch.testing.assert_close(bias.exp(), expected)


def test_a_head_without_bias_starts_as_it_is(build):
    model = build("modernbert", decoder_bias=False)
    assert mlm_head(model).bias is None
    start_at_frequencies(mlm_head(model), torch.arange(61))


@pytest.mark.parametrize("family", ["bert", "mobilebert"])
def test_the_next_sentence_head_reads_the_pooled_state(build, tiny_pair, family):
    model = build(family, "PreTraining")
    pooled = model.base_model(**tiny_pair).pooler_output
    torch.testing.assert_close(
        next_sentence_head(model)(pooled), model(**tiny_pair).seq_relationship_logits, rtol=0, atol=1e-6
    )


def test_a_masked_language_model_has_no_next_sentence_head(model):
    assert next_sentence_head(model) is None
    assert next_sentence_head(model.base_model) is None


def test_another_family_is_refused_with_the_supported_ones():
    config = AlbertConfig(
        vocab_size=20,
        embedding_size=8,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=8,
        num_hidden_layers=1,
    )
    with pytest.raises(UserError, match=r"'albert'.*electra, mobilebert, modernbert, roberta"):
        mlm_head(AlbertForMaskedLM(config))
