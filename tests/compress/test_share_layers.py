import copy

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from fastdistil.compress.method import Calibration
from fastdistil.compress.replacements import replace, replacements
from fastdistil.compress.share_layers import METHODS, ShareLayersOptions
from fastdistil.errors import UserError

(METHOD,) = METHODS


def _apply(model, calibration=None, **options):
    return METHOD.finish(
        METHOD.apply(model, ShareLayersOptions(**options), calibration), ShareLayersOptions(**options)
    )


def _layers(model):
    family = model.config.model_type
    names = {"modernbert": "layers", "distilbert": "transformer.layer"}
    return model.base_model.get_submodule(names.get(family, "encoder.layer"))


def _named(layer):
    return dict(layer.named_parameters())


def _same_weights(a, b):
    """Names of the parameters that both layers have and that are one parameter."""
    theirs = _named(b)
    return {name for name, weight in _named(a).items() if theirs.get(name) is weight}


@pytest.fixture
def deep(build, family):
    return build(family, num_hidden_layers=6)


def _build_deep(build, family="bert"):
    return build(family, num_hidden_layers=6)


@pytest.mark.parametrize(
    ("groups", "layers"),
    [(1, [0] * 6), (2, [0, 0, 0, 3, 3, 3]), (4, [0, 1, 1, 3, 4, 4]), (5, [0, 1, 2, 3, 4, 4])],
)
def test_consecutive_layers_share(build, groups, layers):
    model = _apply(_build_deep(build), groups=groups)
    ((path, spec),) = replacements(model)
    assert (path, spec["kind"], spec["layers"]) == ("bert.encoder.layer", "shared", layers)
    stack = _layers(model)
    for i in range(6):
        for j in range(6):
            assert (stack[i] is stack[j]) == (layers[i] == layers[j])


def test_the_parameters_are_those_of_the_groups(deep, family):
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in _layers(deep)]
    before = deep.num_parameters()
    _apply(deep, groups=2)
    # ModernBERT's first layer lacks the norm that the others of its group share.
    expected = sizes[1] + sizes[4]
    assert before - deep.num_parameters() == sum(sizes) - expected


def test_all_weights_of_a_layer_are_those_of_its_group(deep):
    _apply(deep, groups=2)
    stack = _layers(deep)
    for i, j in ((0, 1), (1, 2), (3, 4), (4, 5)):
        assert _same_weights(stack[i], stack[j]) == _named(stack[i]).keys()
    assert not _same_weights(stack[2], stack[3])


def test_the_layers_of_modernbert_keep_what_they_attend_to(build):
    model = build("modernbert", num_hidden_layers=6)
    kinds = [(layer.attention_type, layer.attn.sliding_window) for layer in _layers(model)]
    _apply(model, groups=1)
    assert [(layer.attention_type, layer.attn.sliding_window) for layer in _layers(model)] == kinds
    assert len(set(kinds)) == 2
    assert isinstance(_layers(model)[0].attn_norm, nn.Identity)


def test_the_first_layer_gives_the_weights(deep, family):
    before = [copy.deepcopy(_named(layer)) for layer in _layers(deep)]
    _apply(deep, groups=2, init="first")
    for i, layer in enumerate(_layers(deep)):
        for name, weight in _named(layer).items():
            source = before[3 * (i // 3)]
            source = source if name in source else before[1]  # ModernBERT's first attention norm
            assert torch.equal(weight, source[name])


def test_the_mean_of_the_layers_gives_the_weights(deep, family):
    before = [copy.deepcopy(_named(layer)) for layer in _layers(deep)]
    _apply(deep, groups=2, init="mean")
    for i, layer in enumerate(_layers(deep)):
        group = before[:3] if i < 3 else before[3:]
        for name, weight in _named(layer).items():
            mean = torch.stack([weights[name] for weights in group if name in weights]).mean(0)
            torch.testing.assert_close(weight, mean)


def _loss_with(model, layers, calibration):
    """Of a model whose layer i has the values of the layer `layers[i]`, each as weights of its own."""
    model = copy.deepcopy(model)
    stack = _layers(model)
    values = [copy.deepcopy(_named(layer)) for layer in stack]
    with torch.no_grad():
        for i, j in enumerate(layers):
            for name, weight in _named(stack[i]).items():
                weight.copy_(values[j][name] if name in values[j] else values[1][name])
        return sum(float(calibration.loss(model, batch)) for batch in calibration.batches)


def test_the_best_layer_of_each_group_gives_the_weights(deep, calibration):
    original = copy.deepcopy(deep)
    expected = []
    for group in ((0, 1, 2), (3, 4, 5)):
        losses = [
            _loss_with(original, [j if i in group else i for i in range(6)], calibration) for j in group
        ]
        expected += [group[losses.index(min(losses))]] * 3
    _apply(deep, calibration, groups=2)
    assert replacements(deep)[0][1]["layers"] == expected
    ours = sum(float(calibration.loss(deep, batch).detach()) for batch in calibration.batches)
    assert ours == pytest.approx(_loss_with(original, expected, calibration), rel=1e-5)


def test_reload_is_bit_equal_and_shares_again(deep, calibration, reload_equal):
    _apply(deep, calibration, groups=2)
    loaded = reload_equal(deep)
    assert loaded.num_parameters() == deep.num_parameters()
    stack = _layers(loaded)
    assert _same_weights(stack[3], stack[5]) == _named(stack[3]).keys()


def test_the_file_holds_shared_weights_once(deep, save):
    full = (save(deep, "full") / "model.safetensors").stat().st_size
    parameters = deep.num_parameters()
    _apply(deep, groups=2)
    shared = (save(deep, "shared") / "model.safetensors").stat().st_size
    assert full - shared >= 4 * (parameters - deep.num_parameters())


def test_a_training_step_sums_the_gradients_and_keeps_the_sharing(deep, calibration, reload_equal):
    apart = copy.deepcopy(deep)  # the same values, each layer on its own
    _apply(deep, groups=2, init="first")
    with torch.no_grad():
        for ours, theirs in zip(_layers(apart), _layers(deep), strict=True):
            for name, weight in _named(theirs).items():
                _named(ours)[name].copy_(weight)
    for model in (deep, apart):
        calibration.loss(model, calibration.batches[0]).backward()
    for name, weight in _named(_layers(deep)[4]).items():
        total = sum(_named(_layers(apart)[i])[name].grad for i in (3, 4, 5))
        torch.testing.assert_close(weight.grad, total)
    torch.optim.SGD(deep.parameters(), lr=0.1).step()
    stack = _layers(reload_equal(deep))
    assert _same_weights(stack[3], stack[5]) == _named(stack[3]).keys()


def test_all_hidden_states_are_still_seen(deep, calibration):
    inputs = {"input_ids": calibration.batches[0].input_ids, "output_hidden_states": True}
    deep(**inputs)  # the hooks of transformers are set here
    _apply(deep, groups=2)
    states = deep(**inputs).hidden_states
    assert len(states) == 7
    stack, seen = _layers(deep), []
    stack[5].register_forward_hook(lambda module, args, output: seen.append(output))
    deep(**inputs)
    if deep.config.model_type != "modernbert":  # whose last state is normalised
        torch.testing.assert_close(states[6], seen[-1] if torch.is_tensor(seen[-1]) else seen[-1][0])


def test_half_of_the_layers_stay_by_default(build):
    assert replacements(_apply(_build_deep(build)))[0][1]["layers"] == [0, 0, 2, 2, 4, 4]


def test_layers_of_different_widths_share(build, reload_equal):
    model = _build_deep(build)
    for path, sizes in (("intermediate.dense", (32, 20)), ("output.dense", (20, 32))):
        spec = {"kind": "linear", "in_features": sizes[0], "out_features": sizes[1]}
        replace(model, f"bert.encoder.layer.1.{path}", nn.Linear(*sizes), spec)
    reload_equal(_apply(model, groups=1, init="first"))


def test_shared_layers_are_pruned_together(build, reload_equal):
    model = _apply(_build_deep(build), groups=2)
    for path, sizes in (("intermediate.dense", (32, 20)), ("output.dense", (20, 32))):
        spec = {"kind": "linear", "in_features": sizes[0], "out_features": sizes[1]}
        replace(model, f"bert.encoder.layer.3.{path}", nn.Linear(*sizes), spec)
    loaded = reload_equal(model)
    assert loaded.bert.encoder.layer[5].output.dense.in_features == 20


def test_layers_of_different_widths_have_no_mean(build):
    model = _build_deep(build)
    spec = {"kind": "linear", "in_features": 32, "out_features": 20}
    replace(model, "bert.encoder.layer.1.intermediate.dense", nn.Linear(32, 20), spec)
    with pytest.raises(UserError, match="layers 0 to 2 differ in size"):
        _apply(model, groups=2, init="mean")


@pytest.mark.parametrize("groups", [6, 7])
def test_as_many_groups_as_layers_are_refused(build, groups):
    with pytest.raises(UserError, match=f"groups must be below the 6 layers of the model, got {groups}"):
        _apply(_build_deep(build), groups=groups)


def test_no_group_is_refused():
    with pytest.raises(ValidationError, match="groups"):
        ShareLayersOptions(groups=0)


def test_the_best_layer_without_examples_is_refused(build):
    with pytest.raises(UserError, match="init 'best' needs examples"):
        _apply(_build_deep(build), init="best")


def test_sharing_what_is_shared_is_refused(build, family):
    model = _apply(_build_deep(build, family), groups=3)
    with pytest.raises(UserError, match="share weights already"):
        _apply(model, groups=2)


def test_another_family_is_refused():
    config = transformers.AlbertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(
        UserError, match=r"'albert'.*supported: bert, distilbert, electra, modernbert, roberta"
    ):
        _apply(transformers.AlbertModel(config), groups=1)


def test_an_encoder_alone_shares(build, batches, reload_equal):
    model = build("bert", "", num_hidden_layers=4)
    _apply(
        model, Calibration(batches, lambda model, batch: model(**batch.inputs)[0].square().mean()), groups=2
    )
    assert replacements(model)[0][0] == "encoder.layer"
    reload_equal(model)
