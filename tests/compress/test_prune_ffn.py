import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch.nn import functional as F

from fastdistil.compress.blocks import find_blocks
from fastdistil.compress.importance import importances
from fastdistil.compress.method import Calibration
from fastdistil.compress.prune_ffn import PruneFFNOptions, kept_neurons, prune_ffn
from fastdistil.compress.prune_heads import PruneHeadsOptions, prune_heads
from fastdistil.compress.reconstruct import output_moments, refit
from fastdistil.compress.replacements import replacements
from fastdistil.errors import UserError


def _mask_neurons(model: Any, kept: list[torch.Tensor]) -> None:
    for block, neurons in zip(find_blocks(model), kept, strict=True):
        keep = torch.zeros(block.num_neurons)
        keep[neurons] = 1
        output = block.part(block.names.ffn_output)
        output.register_forward_pre_hook(lambda module, x, keep=keep: (x[0] * keep,))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruned_model_equals_the_masked_one(
    build: Any, family: str, run: Any, calibration: Calibration, scope: Any
) -> None:
    masked, pruned = build(family), build(family)
    whole = run(masked)
    scores = importances(masked, find_blocks(masked), "neurons", "taylor", calibration)
    kept = kept_neurons(scores, 0.6, scope, "taylor", 4)
    _mask_neurons(masked, kept)
    options = PruneFFNOptions(ratio=0.6, scope=scope, round_to=4, reconstruct=False)
    prune_ffn(pruned, options, calibration)
    assert [block.num_neurons for block in find_blocks(pruned)] == [len(neurons) for neurons in kept]
    torch.testing.assert_close(run(pruned), run(masked), rtol=1e-5, atol=1e-5)
    assert (run(pruned) - whole).abs().max() > 1e-2


def test_uniform_widths_are_in_the_config_and_auto_model_loads_them(
    build: Any, family: str, run: Any, save: Any
) -> None:
    model = build(family)
    before = sum(parameter.numel() for parameter in model.parameters())
    prune_ffn(model, PruneFFNOptions(ratio=0.5), None)
    folder = save(model)
    assert "fastdistil" not in json.loads((folder / "config.json").read_text())
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(run(loaded), run(model))
    # 24 of 48 neurons of two layers: columns of both matrices, or of three where gated, and a bias.
    each = 3 * 32 if family == "modernbert" else 2 * 32 + 1
    assert before - sum(parameter.numel() for parameter in loaded.parameters()) == 2 * 24 * each


def test_widths_that_differ_by_layer_are_reloaded_bit_equal(
    build: Any, family: str, calibration: Calibration, reload_equal: Any
) -> None:
    options = PruneFFNOptions(ratio=0.6, scope="global", round_to=4)
    model = prune_ffn(build(family), options, calibration)
    counts = [block.num_neurons for block in find_blocks(model)]
    assert counts[0] != counts[1]
    assert replacements(model)
    assert [block.num_neurons for block in find_blocks(reload_equal(model))] == counts


def test_pruned_again_to_one_width_needs_no_replacement(
    build: Any, calibration: Calibration, reload_equal: Any
) -> None:
    model = prune_ffn(build("bert"), PruneFFNOptions(ratio=0.5, scope="global", round_to=4), calibration)
    assert len(replacements(model)) > 0
    for block in find_blocks(model):
        block.keep_neurons(torch.arange(8))
    prune_ffn(model, PruneFFNOptions(ratio=0, round_to=8), None)
    assert (model.config.intermediate_size, replacements(model)) == (8, [])
    reload_equal(model)


@pytest.mark.parametrize("ffn_first", [True, False])
def test_chain_with_pruned_heads_is_reloaded_bit_equal(
    build: Any, family: str, calibration: Calibration, reload_equal: Any, ffn_first: bool
) -> None:
    steps = [
        lambda model: prune_ffn(model, PruneFFNOptions(ratio=0.5, scope="global", round_to=4), calibration),
        lambda model: prune_heads(model, PruneHeadsOptions(heads={0: [0, 3]}), None),
    ]
    model = build(family)
    for step in steps if ffn_first else steps[::-1]:
        # Through a folder, as a chain goes.
        model = reload_equal(step(model))
    assert [block.num_heads for block in find_blocks(model)] == [2, 4]


def test_layer_scope_keeps_a_multiple_nearest_to_the_ratio() -> None:
    scores = [torch.arange(100.0), torch.arange(100.0).flip(0)]
    kept = kept_neurons(scores, 0.5, "layer", "taylor", 8)
    assert [part.tolist() for part in kept] == [list(range(52, 100)), list(range(48))]
    assert [len(part) for part in kept_neurons(scores, 0.99, "layer", "taylor", 8)] == [8, 8]
    assert [len(part) for part in kept_neurons(scores, 0, "layer", "taylor", 8)] == [96, 96]


def test_global_scope_drops_whole_packs_and_leaves_one_in_each_layer() -> None:
    scores = [torch.arange(32.0), torch.arange(32.0) + 100]
    kept = kept_neurons(scores, 0.25, "global", "taylor", 8)
    assert [part.tolist() for part in kept] == [list(range(16, 32)), list(range(32))]
    kept = kept_neurons(scores, 0.9, "global", "taylor", 8)
    assert [part.tolist() for part in kept] == [list(range(24, 32)), list(range(24, 32))]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_taylor_importance_equals_gate_gradients_of_single_examples(
    build: Any, family: str, calibration: Calibration
) -> None:
    """The sum over tokens of activation * dL/d(activation), with a loss of each example on its own."""
    model = build(family).double()
    block = find_blocks(model)[0]
    seen: list[torch.Tensor] = []
    output = block.part(block.names.ffn_output)
    hook = output.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    total = torch.zeros(48, dtype=torch.float64)
    for batch in calibration.batches:
        inputs = dict(batch.inputs)
        if family == "modernbert":
            inputs.pop("token_type_ids")
        losses = F.cross_entropy(model(**inputs).logits, batch.labels, reduction="none")
        for row, loss in enumerate(losses):
            (gradient,) = torch.autograd.grad(loss, seen[-1], retain_graph=True)
            total += (seen[-1][row] * gradient[row]).sum(0).abs().detach()
    hook.remove()
    found = importances(model, find_blocks(model), "neurons", "taylor", calibration)
    torch.testing.assert_close(found[0], total / 12, rtol=1e-9, atol=1e-12)


def test_magnitude_importance_is_the_norm_of_all_weights_of_a_neuron(build: Any) -> None:
    bert, modern = build("bert").double(), build("modernbert").double()
    layer = bert.bert.encoder.layer[0]
    into, out = layer.intermediate.dense, layer.output.dense
    expected = torch.cat([into.weight[5], into.bias[5:6], out.weight[:, 5]]).norm()
    found = importances(bert, find_blocks(bert), "neurons", "magnitude", None)
    torch.testing.assert_close(found[0][5], expected)
    mlp = modern.model.layers[0].mlp
    expected = torch.cat([mlp.Wi.weight[5], mlp.Wi.weight[48 + 5], mlp.Wo.weight[:, 5]]).norm()
    found = importances(modern, find_blocks(modern), "neurons", "magnitude", None)
    torch.testing.assert_close(found[0][5], expected)


@pytest.mark.parametrize("bias", [True, False])
def test_refitted_matrix_is_the_ridge_regression(build: Any, calibration: Calibration, bias: bool) -> None:
    """Of what the whole matrix gives, solved as an augmented least-squares problem in float64."""
    model = build("bert" if bias else "modernbert").double()
    blocks = find_blocks(model)
    linear = blocks[1].part(blocks[1].names.ffn_output)
    seen: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    for batch in calibration.batches:
        calibration.loss(model, batch)
    hook.remove()
    x = torch.cat([states[b.attention_mask] for states, b in zip(seen, calibration.batches, strict=True)])
    x, kept = x.detach(), torch.arange(0, 48, 3)
    target = F.linear(x, linear.weight, linear.bias).detach()
    old = linear.weight.detach()[:, kept]
    moments = output_moments(model, blocks, calibration)[1]
    with torch.no_grad():
        refit(linear, kept, moments)
    part = x[:, kept]
    centre = part.mean(0) if bias else torch.zeros(len(kept), dtype=torch.float64)
    rest = target - F.linear(part, old)
    offset = rest.mean(0) if bias else torch.zeros(32, dtype=torch.float64)
    ridge = 0.01 * (part - centre).square().mean(0).mean() * len(x)
    augmented = torch.cat([part - centre, ridge.sqrt() * torch.eye(len(kept), dtype=torch.float64)])
    wanted = torch.cat([rest - offset, torch.zeros(len(kept), 32, dtype=torch.float64)])
    change = torch.linalg.lstsq(augmented, wanted).solution.T
    torch.testing.assert_close(linear.weight[:, kept].detach(), old + change, rtol=1e-3, atol=1e-4)
    if bias:
        expected = offset - change @ centre
        torch.testing.assert_close(linear.bias.detach(), expected, rtol=1e-3, atol=1e-4)


def test_reconstruction_brings_the_outputs_nearer(build: Any, family: str, calibration: Calibration) -> None:
    def distance(reconstruct: bool) -> float:
        model, whole = build(family), build(family)
        options = PruneFFNOptions(ratio=0.5, importance="magnitude", reconstruct=reconstruct)
        prune_ffn(model, options, calibration)
        states = []
        for each in (model, whole):
            block = find_blocks(each)[0]
            output = block.part(block.names.ffn_output)
            output.register_forward_hook(lambda module, x, y: states.append(y))
            calibration.loss(each, calibration.batches[0])
        mask = calibration.batches[0].attention_mask
        return float((states[0] - states[1])[mask].detach().square().mean())

    assert distance(True) < 0.5 * distance(False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "taylor"}, "prune-ffn: importance 'taylor' is measured on training examples"),
        ({"reconstruct": True}, "prune-ffn: reconstruct fits the matrices on training examples"),
    ],
)
def test_what_needs_examples_is_refused_without(
    tiny_bert: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prune_ffn(tiny_bert, PruneFFNOptions(**options), None)


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": -0.5}, {"round_to": 0}])
def test_options_outside_of_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        PruneFFNOptions(**options)


def test_factorised_matrix_is_refused(tiny_bert: Any, tmp_path: Path) -> None:
    layer = tiny_bert.bert.encoder.layer[0]
    layer.output.dense = torch.nn.Sequential(torch.nn.Linear(48, 4), torch.nn.Linear(4, 32))
    with pytest.raises(UserError, match=r"layer\.0\.output\.dense is a Sequential"):
        prune_ffn(tiny_bert, PruneFFNOptions(), None)


def test_where_there_are_examples_the_matrices_are_refitted(
    build: Any, run: Any, calibration: Calibration
) -> None:
    outputs = []
    for reconstruct in (None, True, False):
        model = build("bert")
        prune_ffn(model, PruneFFNOptions(ratio=0.5, round_to=4, reconstruct=reconstruct), calibration)
        outputs.append(run(model))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
