"""Taps of attention: what transformers computes with, from every family, and nothing of the model changed."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import MPNetConfig, MPNetModel

from fastdistil.errors import UserError
from fastdistil.models.student import set_dropout
from fastdistil.models.taps import Wanted, tap, tap_teacher

FAMILIES = ["bert", "distilbert", "roberta", "electra", "mobilebert", "albert", "modernbert"]
SOME = Wanted(attention=frozenset({1, 3}))


@pytest.fixture(params=FAMILIES)
def model(request, build):
    return build(request.param)


def inputs(ids, mask):
    return {"input_ids": ids, "attention_mask": mask}


def attention_maps(model, ids, mask):
    """(B, H, L, L) of each layer, as the eager attention of transformers has them."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return eager.base_model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions


def test_tapped_queries_and_keys_give_the_attention_maps(model, tiny_batch):
    ids, mask = tiny_batch(model)
    taps = tap_teacher(model, inputs(ids, mask.bool()), wanted=SOME)
    maps = attention_maps(model, ids, mask)
    assert set(taps.attention) == {1, 3}
    for layer, states in taps.attention.items():
        scale = states.query.shape[-1] ** -0.5 if states.scale is None else states.scale
        scores = scale * states.query @ states.key.mT
        # ModernBERT's layers 1 and 2 see a window; eager attention shows which pairs it covers.
        assert (states.window is None) == (model.config.model_type != "modernbert" or layer == 3)
        seen = maps[layer] > 0
        ours = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        valid = mask.bool()[:, None, :, None].expand_as(ours)
        torch.testing.assert_close(ours[valid], maps[layer][valid], rtol=0, atol=1e-6)
        if states.window is None:
            assert torch.equal(seen[valid], mask.bool()[:, None, None, :].expand_as(seen)[valid])


def test_layers_that_share_weights_are_told_apart(build, tiny_batch):
    albert = build("albert")
    taps = tap_teacher(albert, inputs(*tiny_batch(albert)), wanted=SOME)
    assert not torch.allclose(taps.attention[1].query, taps.attention[3].query)


def test_the_model_computes_the_same_bits_and_is_left_as_it_was(model, tiny_batch):
    ids, mask = tiny_batch(model)
    implementations = []
    model.base_model.register_forward_pre_hook(
        lambda module, inputs: implementations.append(module.config._attn_implementation)
    )
    plain = tap_teacher(model, inputs(ids, mask))
    tapped = tap_teacher(model, inputs(ids, mask), wanted=SOME)
    assert torch.equal(plain.last_hidden, tapped.last_hidden)
    assert implementations[0] == model.config._attn_implementation == "sdpa"
    assert implementations[1] != "sdpa"
    assert plain.attention == {}


def test_gradients_reach_the_student_through_the_taps(model, tiny_batch):
    """The query of layer 1 depends on all that comes before it, and on nothing after."""
    ids, mask = tiny_batch(model)
    states = tap(model, inputs(ids, mask), SOME).attention[1]
    states.query.square().sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    if model.config.model_type == "bert":
        grads = [layer.attention.self.query.weight.grad is not None for layer in model.bert.encoder.layer]
        assert grads == [True, True, False, False]
        assert model.bert.encoder.layer[1].attention.self.key.weight.grad is None


@pytest.fixture
def sdpa_dtypes(monkeypatch):
    """The dtypes of the queries that SDPA is called with, in order."""
    sdpa, dtypes = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, *arguments, **keywords):
        dtypes.append(query.dtype)
        return sdpa(query, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return dtypes


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dropout_a_model_that_trains_in_bfloat16_has_float32_attention_on_a_cpu(
    family, build, tiny_batch, sdpa_dtypes
):
    """In float32 SDPA's backward pass is faster there, and it rounds less: that is all that may differ."""
    model = build(family).train()
    set_dropout(model, 0.0)
    ids, mask = tiny_batch(model)
    exact = tap(model, inputs(ids, mask)).last_hidden
    with torch.autocast("cpu", torch.bfloat16):
        ours = tap(model, inputs(ids, mask)).last_hidden
        with torch.no_grad():
            plain = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    layers = model.config.num_hidden_layers
    assert sdpa_dtypes == [torch.float32] * 2 * layers + [torch.bfloat16] * layers
    assert model.config._attn_implementation == "sdpa"
    valid = mask.bool()
    ours_error, plain_error = ((x - exact)[valid].square().mean() for x in (ours, plain))
    assert ours_error <= 1.5 * plain_error
    ours.float()[valid].square().sum().backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_with_dropout_attention_stays_in_the_precision_of_the_pass(build, tiny_batch, sdpa_dtypes):
    bert = build("bert").train()
    with torch.autocast("cpu", torch.bfloat16):
        tap(bert, inputs(*tiny_batch(bert)))
    assert set(sdpa_dtypes) == {torch.bfloat16}


def test_relation_states_have_the_heads_side_by_side(build, tiny_batch):
    bert = build("bert")
    ids, mask = tiny_batch(bert)
    caught = {}
    attention = bert.bert.encoder.layer[1].attention.self
    for name in ("query", "key", "value"):
        getattr(attention, name).register_forward_hook(
            lambda module, inputs, output, name=name: caught.update({name: output})
        )
    states = tap(bert, inputs(ids, mask), SOME).attention[1]
    for name, output in caught.items():
        assert torch.equal(states.relation(name), output)
        assert states.relation(name).data_ptr() == output.data_ptr()  # a view


def test_a_teacher_under_autocast_has_low_precision_states_without_gradient(build, tiny_batch):
    bert = build("bert")
    ids, mask = tiny_batch(bert)
    states = tap_teacher(bert, inputs(ids, mask), torch.bfloat16, SOME).attention[1]
    assert states.query.dtype == torch.bfloat16
    assert not states.query.requires_grad
    # The backward pass of a student's loss must be able to keep them.
    student = torch.ones((), requires_grad=True)
    (student * states.query).sum().backward()


def test_what_is_tapped_is_gone_with_the_taps(build, tiny_batch):
    bert = build("bert")
    taps = tap_teacher(bert, inputs(*tiny_batch(bert)), wanted=SOME)
    kept = [weakref.ref(taps.attention[1].query), weakref.ref(taps.attention[3].value)]
    del taps
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_two_models_in_two_threads_do_not_mix(build, tiny_batch):
    models = [build("bert"), build("electra")]
    batches = [tiny_batch(model) for model in models]

    def run(i):
        batch = inputs(*batches[i])
        return [tap_teacher(models[i], batch, wanted=SOME).attention[3].query for _ in range(20)]

    expected = [run(0)[0], run(1)[0]]
    with ThreadPoolExecutor(2) as pool:
        for results, right in zip(pool.map(run, [0, 1]), expected, strict=True):
            assert all(torch.equal(result, right) for result in results)


def test_hidden_states_and_embeddings_are_those_of_transformers(model, tiny_batch):
    ids, mask = tiny_batch(model)
    with torch.no_grad():
        expected = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    taps = tap_teacher(model, inputs(ids, mask), wanted=Wanted(hidden=frozenset({0, 3}), embeddings=True))
    assert set(taps.hidden) == {0, 3}
    assert torch.equal(taps.embeddings, expected.hidden_states[0])
    assert torch.equal(taps.hidden[0], expected.hidden_states[1])
    assert torch.equal(taps.hidden[3], expected.hidden_states[4])
    assert torch.equal(taps.last_hidden, expected.last_hidden_state)
    assert tap_teacher(model, inputs(ids, mask)).embeddings is None


def test_a_model_outside_of_the_interface_is_named_with_those_inside():
    config = MPNetConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    model = MPNetModel(config).eval()
    ids = torch.arange(2, 8).view(1, 6)
    with pytest.raises(
        ValueError, match=r"MPNetModel \(model type 'mpnet'\).*BERT, DistilBERT, RoBERTa, ELECTRA"
    ):
        tap_teacher(model, inputs(ids, torch.ones_like(ids)), wanted=SOME)


def test_a_layer_that_is_not_there_is_named_and_the_model_put_back(build, tiny_batch):
    bert = build("bert")
    with pytest.raises(UserError, match="layer 4 is not there: the attention layers are 0 to 3"):
        tap_teacher(bert, inputs(*tiny_batch(bert)), wanted=Wanted(attention=frozenset({0, 4})))
    with pytest.raises(UserError, match="has no layer 4, its layers are 0 to 3"):
        tap_teacher(bert, inputs(*tiny_batch(bert)), wanted=Wanted(hidden=frozenset({4})))
    with pytest.raises(IndexError):
        tap_teacher(bert, inputs(torch.tensor([[99]]), torch.ones(1, 1)), wanted=SOME)
    assert bert.config._attn_implementation == "sdpa"
