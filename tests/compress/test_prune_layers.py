import json
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError

from fastdistil.compress.blocks import find_blocks
from fastdistil.compress.importance import layer_importances
from fastdistil.compress.method import Calibration
from fastdistil.compress.prune_heads import PruneHeadsOptions, prune_heads
from fastdistil.compress.prune_layers import PruneLayersOptions, keep_layers, prune_layers
from fastdistil.compress.replacements import record, replacements
from fastdistil.errors import UserError

_SIX = 6


def _kept(model: Any, whole: Any) -> list[int]:
    """Which of the whole model's layers these are, by a weight."""
    theirs = [block.part(block.names.ffn_output).weight for block in find_blocks(whole)]
    ours = [block.part(block.names.ffn_output).weight for block in find_blocks(model)]
    return [next(i for i, weight in enumerate(theirs) if torch.equal(weight, own)) for own in ours]


def _skip(model: Any, layers: list[int]) -> None:
    """Makes these layers the identity."""
    for layer in layers:
        block = find_blocks(model)[layer].module
        block.register_forward_hook(lambda module, args, output: args[0])


@pytest.mark.parametrize(
    ("by", "expected"),
    [("spread", [0, 3, 5]), ("top", [0, 1, 2]), ("bottom", [3, 4, 5])],
)
def test_layers_go_by_place(build: Any, by: Any, expected: list[int]) -> None:
    model = prune_layers(build(num_hidden_layers=_SIX), PruneLayersOptions(num_layers=3, by=by), None)
    assert _kept(model, build(num_hidden_layers=_SIX)) == expected


def test_modernbert_keeps_its_first_layer(build: Any) -> None:
    model = build("modernbert", num_hidden_layers=_SIX)
    prune_layers(model, PruneLayersOptions(num_layers=3, by="bottom"), None)
    assert _kept(model, build("modernbert", num_hidden_layers=_SIX)) == [0, 4, 5]
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_pruned_model_equals_the_one_that_skips_the_layers(build: Any, family: str, run: Any) -> None:
    pruned, masked = (build(family, **_depth(family, 4)) for _ in range(2))
    keep_layers(pruned, [0, 2])
    _skip(masked, [1, 3])
    torch.testing.assert_close(run(pruned), run(masked), rtol=0, atol=0)


def test_auto_model_loads_the_pruned_folder(build: Any, family: str, run: Any, save: Any) -> None:
    model = build(family, **_depth(family, 4))
    one = sum(parameter.numel() for parameter in find_blocks(model)[3].module.parameters())
    before = sum(parameter.numel() for parameter in model.parameters())
    prune_layers(model, PruneLayersOptions(num_layers=3, by="top"), None)
    folder = save(model)
    assert "fastdistil" not in json.loads((folder / "config.json").read_text())
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(run(loaded), run(model))
    assert before - sum(parameter.numel() for parameter in loaded.parameters()) == one


def test_replacements_move_with_their_layers(build: Any, reload_equal: Any) -> None:
    model = prune_heads(
        build(num_hidden_layers=4), PruneHeadsOptions(heads={1: [0], 2: [0, 1], 3: [0, 1, 2]}), None
    )
    keep_layers(model, [0, 2, 3])
    assert [block.num_heads for block in find_blocks(reload_equal(model))] == [4, 2, 1]
    assert {path.split(".")[3] for path, _ in replacements(model)} == {"1", "2"}


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_importance_drops_the_layers_whose_loss_is_lowest_one_after_another(
    build: Any, family: str, calibration: Calibration
) -> None:
    def loss_without(gone: list[int]) -> float:
        model = build(family, **_depth(family, 4))
        _skip(model, gone)
        with torch.no_grad():
            return float(sum(calibration.loss(model, batch) for batch in calibration.batches))

    droppable = range(1 if family == "modernbert" else 0, 4)
    first = min(droppable, key=lambda layer: loss_without([layer]))
    second = min((i for i in droppable if i != first), key=lambda layer: loss_without([first, layer]))
    model = build(family, **_depth(family, 4))
    prune_layers(model, PruneLayersOptions(ratio=0.5, by="importance"), calibration)
    assert _kept(model, build(family, **_depth(family, 4))) == sorted({0, 1, 2, 3} - {first, second})


def _shrink(model: Any, layer: int) -> None:
    """Scales down what this layer adds to the states; its own norms make the rest of it no smaller."""
    block = find_blocks(model)[layer]
    with torch.no_grad():
        for parameter in block.module.parameters():
            parameter.mul_(1e-3)


@pytest.mark.parametrize("by", ["magnitude", "taylor", "activation"])
def test_the_least_important_layers_go(build: Any, calibration: Calibration, by: Any) -> None:
    """ModernBERT adds to its states without a norm after it: a layer of tiny weights changes nothing."""
    whole, model = (build("modernbert", num_hidden_layers=4) for _ in range(2))
    for each in (whole, model):
        _shrink(each, 2)
    prune_layers(model, PruneLayersOptions(num_layers=3, by=by), calibration)
    assert _kept(model, whole) == [0, 1, 3]
    assert not any(block.module._forward_hooks for block in find_blocks(model))


def test_taylor_is_the_change_of_the_loss_to_first_order(build: Any, calibration: Calibration) -> None:
    """Against finite differences of a gate on a layer's change of the states, an example at a time."""
    model = build(num_hidden_layers=2).double()
    layers = [block.module for block in find_blocks(model)]

    def loss(batch: Any, layer: int, gate: float) -> float:
        handle = layers[layer].register_forward_hook(
            lambda module, args, output: args[0] + gate * (output - args[0])
        )
        with torch.no_grad():
            value = float(calibration.loss(model, batch))
        handle.remove()
        return value

    expected, step = torch.zeros(2, dtype=torch.float64), 1e-4
    batch = calibration.batches[0]
    rows = len(batch.input_ids)
    singles = [
        replace(
            batch, **{f.name: getattr(batch, f.name)[i : i + 1] for f in fields(batch) if _tensor(batch, f)}
        )
        for i in range(rows)
    ]
    for single in singles:
        for layer in range(2):
            change = (loss(single, layer, 1 + step) - loss(single, layer, 1 - step)) / (2 * step)
            expected[layer] += abs(change) / rows
    found = layer_importances(model, layers, "taylor", replace(calibration, batches=[batch]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def _tensor(batch: Any, field: Any) -> bool:
    return isinstance(getattr(batch, field.name), torch.Tensor)


def test_activation_leaves_padding_out(build: Any, calibration: Calibration) -> None:
    model = build(num_hidden_layers=2)
    layers = [block.module for block in find_blocks(model)]
    batch = calibration.batches[0]
    with torch.no_grad():
        states = model(**batch.inputs, output_hidden_states=True).hidden_states
    mask = batch.attention_mask.bool()
    expected = [
        1 - torch.nn.functional.cosine_similarity(a[mask].double(), b[mask].double(), dim=-1).mean()
        for a, b in pairwise(states)
    ]
    found = layer_importances(model, layers, "activation", replace(calibration, batches=[batch]))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 6), (0.3, 4), (0.99, 1), (None, 3)])
def test_ratio_is_the_part_that_goes(build: Any, ratio: float | None, left: int) -> None:
    model = prune_layers(build(num_hidden_layers=_SIX), PruneLayersOptions(ratio=ratio), None)
    assert (model.config.num_hidden_layers, len(find_blocks(model))) == (left, left)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 3}, "num_layers is 3, but the model has only 2"),
        ({"num_layers": 1, "ratio": 0.5}, "either num_layers or ratio"),
        ({"by": "importance"}, "importance is measured on training examples"),
        ({"by": "taylor"}, "taylor is measured on training examples"),
    ],
)
def test_bad_options_are_a_user_error(tiny_bert: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_layers(tiny_bert, PruneLayersOptions(**options), None)


def test_layers_with_a_replacement_of_their_list_are_refused(build: Any) -> None:
    model = build(num_hidden_layers=4)
    record(model, "bert.encoder.layer", {"kind": "shared"})
    with pytest.raises(UserError, match="the layers are stored together: prune them before that"):
        keep_layers(model, [0])


@pytest.mark.parametrize("options", [{"num_layers": 0}, {"ratio": 1.0}, {"ratio": -1}])
def test_options_outside_of_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        PruneLayersOptions(**options)


def _depth(family: str, layers: int) -> dict[str, int]:
    return {"n_layers" if family == "distilbert" else "num_hidden_layers": layers}
