"""Parameters by layer: each belongs to one, and is what that layer's output depends on."""

import pytest
import torch

from fastdistil.errors import UserError
from fastdistil.models.stack import embedding_parameters, layer_parameters


@pytest.fixture(params=["bert", "roberta", "distilbert", "electra", "modernbert", "mobilebert"])
def model(request, build):
    return build(request.param)


def states(model, batch):
    """What enters the first layer, then the output of each of the four."""
    with torch.no_grad():
        found = model.base_model(*batch, output_hidden_states=True).hidden_states
    return torch.stack(found)


def test_embeddings_and_layers_share_nothing_and_are_the_whole_encoder(model):
    groups = [embedding_parameters(model), *(layer_parameters(model, layer) for layer in range(4))]
    ids = [id(parameter) for group in groups for parameter in group]
    assert len(ids) == len(set(ids))
    rest = {name for name, parameter in model.base_model.named_parameters() if id(parameter) not in ids}
    # ModernBERT has a norm behind its last layer.
    assert rest == ({"final_norm.weight"} if model.config.model_type == "modernbert" else set())


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layers_parameters_change_its_output_and_nothing_before(model, tiny_batch, layer):
    batch = tiny_batch(model)
    before = states(model, batch)
    with torch.no_grad():
        for parameter in layer_parameters(model, layer):
            parameter.mul_(0.5)
    after = states(model, batch)
    assert torch.equal(after[: layer + 1], before[: layer + 1])
    assert not torch.allclose(after[layer + 1], before[layer + 1])


def test_the_embeddings_parameters_change_what_enters_the_first_layer(model, tiny_batch):
    batch = tiny_batch(model)
    with torch.no_grad():
        for parameter in embedding_parameters(model):
            parameter.zero_()
    assert states(model, batch)[0].eq(0).all()


def test_an_encoder_alone_has_the_same_ones(model):
    ours, whole = (layer_parameters(m, 1) for m in (model.base_model, model))
    assert all(a is b for a, b in zip(ours, whole, strict=True))


def test_what_is_not_there_is_refused(build):
    with pytest.raises(UserError, match="BertForMaskedLM has no layer 4, its layers are 0 to 3"):
        layer_parameters(build("bert"), 4)
    with pytest.raises(UserError, match=r"'albert'.*bert, distilbert, electra, mobilebert, modernbert"):
        embedding_parameters(build("albert"))
