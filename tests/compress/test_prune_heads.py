from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError

from fastdistil.compress.blocks import find_blocks
from fastdistil.compress.importance import importances
from fastdistil.compress.method import Calibration
from fastdistil.compress.prune_heads import METHODS, PruneHeadsOptions, kept_heads, prune_heads
from fastdistil.compress.registry import find_method
from fastdistil.compress.replacements import replacements
from fastdistil.errors import UserError

GONE = {0: [1, 2, 3], 1: [0]}


def _mask_heads(model: Any, gone: dict[int, list[int]]) -> list[Any]:
    """Sets what the output matrices read of these heads to 0."""
    handles = []
    for block in find_blocks(model):
        keep = torch.ones(block.num_heads)
        keep[gone.get(block.layer, [])] = 0
        keep = keep.repeat_interleave(block.head_size)
        output = block.part(block.names.attention_output)
        handles.append(output.register_forward_pre_hook(lambda module, x, keep=keep: (x[0] * keep,)))
    return handles


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_model_equals_the_masked_one(build: Any, family: str, run: Any, attention: str) -> None:
    masked, pruned = build(family), build(family)
    for model in (masked, pruned):
        model.set_attn_implementation(attention)
    whole = run(masked)
    _mask_heads(masked, GONE)
    prune_heads(pruned, PruneHeadsOptions(heads=GONE), None)
    torch.testing.assert_close(run(pruned), run(masked), rtol=1e-5, atol=1e-5)
    assert (run(pruned) - whole).abs().max() > 1e-2


def test_heads_that_differ_by_layer_are_reloaded_bit_equal(
    build: Any, family: str, reload_equal: Any
) -> None:
    loaded = reload_equal(prune_heads(build(family), PruneHeadsOptions(heads=GONE), None))
    assert [block.num_heads for block in find_blocks(loaded)] == [1, 3]
    assert [block.head_size for block in find_blocks(loaded)] == [8, 8]


def test_parameters_are_fewer_by_the_formula(build: Any, family: str) -> None:
    model = build(family)
    before = _parameters(model)
    prune_heads(model, PruneHeadsOptions(ratio=0.5), None)
    # Two of four heads of 8 in each of two layers: q, k, v rows and o columns, and q, k, v biases.
    biases = 0 if family == "modernbert" else 3
    assert before - _parameters(model) == 2 * 16 * (4 * 32 + biases)


def test_pruned_twice_equals_pruned_at_once(build: Any, family: str, run: Any, reload_equal: Any) -> None:
    twice, once = build(family), build(family)
    prune_heads(twice, PruneHeadsOptions(heads={0: [1]}), None)
    prune_heads(twice, PruneHeadsOptions(heads={0: [0, 2], 1: [3]}), None)
    prune_heads(once, PruneHeadsOptions(heads={0: [0, 1, 3], 1: [3]}), None)
    assert torch.equal(run(twice), run(once))
    assert replacements(twice) == replacements(once)
    reload_equal(twice)


def test_pruned_model_trains_under_sdpa(build: Any, family: str, calibration: Calibration) -> None:
    model = prune_heads(build(family), PruneHeadsOptions(heads=GONE), None).train()
    loss = calibration.loss(model, calibration.batches[0])
    loss.backward()
    shapes = {
        block.part(name).weight.grad.shape[0]
        for block in find_blocks(model)
        for name in block.names.projections
    }
    per_head = 24 if family == "modernbert" else 8
    assert shapes == {1 * per_head, 3 * per_head}
    assert torch.isfinite(loss)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_taylor_importance_equals_finite_differences_in_float64(
    build: Any, family: str, calibration: Calibration
) -> None:
    # A step of 1e-3 and a slack of 1e-3, as ModernBERT rotates in float32 whatever the dtype.
    model = build(family).double()
    blocks = find_blocks(model)
    found = importances(model, blocks, "heads", "taylor", calibration)
    for block, scores in zip(blocks, found, strict=True):
        output = block.part(block.names.attention_output)
        for head in (0, 3):
            changes = []
            for step in (1e-3, -1e-3):
                gates = torch.ones(block.num_heads, dtype=torch.float64)
                gates[head] += step
                gates = gates.repeat_interleave(block.head_size)
                hook = output.register_forward_pre_hook(lambda module, x, gates=gates: (x[0] * gates,))
                changes.append(_losses(model, calibration))
                hook.remove()
            slopes = (changes[0] - changes[1]) / 2e-3
            torch.testing.assert_close(scores[head], slopes.abs().mean(), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def _losses(model: Any, calibration: Calibration) -> torch.Tensor:
    """(N,): of each example in a batch of its own."""
    return torch.stack(
        [
            calibration.loss(
                model,
                replace(
                    batch,
                    input_ids=batch.input_ids[row : row + 1],
                    attention_mask=batch.attention_mask[row : row + 1],
                    token_type_ids=batch.token_type_ids[row : row + 1],
                    labels=batch.labels[row : row + 1],
                ),
            )
            for batch in calibration.batches
            for row in range(len(batch.labels))
        ]
    )


def test_magnitude_importance_is_the_norm_of_all_weights_of_a_head(build: Any) -> None:
    model = build("bert").double()
    attention = model.bert.encoder.layer[1].attention
    of_head = [attention.output.dense.weight[:, 8:16]]
    for linear in (attention.self.query, attention.self.key, attention.self.value):
        of_head += [linear.weight[8:16], linear.bias[8:16]]
    expected = torch.cat([part.flatten() for part in of_head]).norm()
    found = importances(model, find_blocks(model), "heads", "magnitude", None)
    torch.testing.assert_close(found[1][1], expected)


def test_magnitude_importance_of_fused_projections(tiny_modernbert: Any) -> None:
    attention = tiny_modernbert.model.layers[1].attn
    fused = attention.Wqkv.weight.unflatten(0, (3, 4, 8))[:, 2]
    expected = torch.cat([fused.flatten(), attention.Wo.weight[:, 16:24].flatten()]).double().norm()
    found = importances(tiny_modernbert, find_blocks(tiny_modernbert), "heads", "magnitude", None)
    torch.testing.assert_close(found[1][2], expected, rtol=1e-5, atol=0)


def test_activation_importance_is_the_mean_over_tokens_without_padding(
    tiny_bert: Any, calibration: Calibration
) -> None:
    seen = []
    output = tiny_bert.bert.encoder.layer[0].attention.output.dense
    hook = output.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    for batch in calibration.batches:
        calibration.loss(tiny_bert, batch)
    hook.remove()
    tokens = torch.cat([x[b.attention_mask] for x, b in zip(seen, calibration.batches, strict=True)])
    found = importances(tiny_bert, find_blocks(tiny_bert), "heads", "activation", calibration)
    expected = tokens.double().abs().unflatten(-1, (4, 8)).mean((0, 2))
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-9)


def test_default_importance_is_taylor_where_there_are_examples(build: Any, calibration: Calibration) -> None:
    default = prune_heads(build("bert"), PruneHeadsOptions(), calibration).state_dict()
    taylor = prune_heads(build("bert"), PruneHeadsOptions(importance="taylor"), calibration).state_dict()
    magnitude = prune_heads(build("bert"), PruneHeadsOptions(), None).state_dict()
    assert all(torch.equal(default[name], taylor[name]) for name in default)
    assert not all(torch.equal(default[name], magnitude[name]) for name in default)


def test_measuring_leaves_the_model_without_hooks_and_gradients(
    tiny_bert: Any, calibration: Calibration
) -> None:
    importances(tiny_bert, find_blocks(tiny_bert), "heads", "taylor", calibration)
    assert not any(module._forward_pre_hooks for module in tiny_bert.modules())
    assert all(parameter.grad is None for parameter in tiny_bert.parameters())


def test_layer_scope_keeps_the_best_of_each_layer() -> None:
    scores = [torch.tensor([1.0, 4.0, 3.0, 2.0]), torch.tensor([9.0, 8.0, 7.0, 6.0])]
    kept = kept_heads(scores, 0.5, "layer", "taylor")
    assert [part.tolist() for part in kept] == [[1, 2], [0, 1]]


def test_global_scope_keeps_the_best_of_all_and_one_in_each_layer() -> None:
    scores = [torch.tensor([1.0, 4.0, 3.0, 2.0]), torch.tensor([9.0, 8.0, 7.0, 6.0])]
    assert [len(part) for part in kept_heads(scores, 0.25, "global", "taylor")] == [2, 4]
    kept = kept_heads(scores, 0.6, "global", "taylor")
    assert [part.tolist() for part in kept] == [[1], [0, 1]]
    assert [part.tolist() for part in kept_heads(scores, 0.99, "global", "taylor")] == [[1], [0]]


def test_global_scope_compares_norms_relative_to_their_layer() -> None:
    scores = [torch.tensor([1.0, 0.1]), torch.tensor([100.0, 100.0])]
    kept = kept_heads(scores, 0.25, "global", "magnitude")
    assert [part.tolist() for part in kept] == [[0], [0, 1]]
    scores = [torch.tensor([1.0, 1.0]), torch.tensor([100.0, 10.0])]
    assert [part.tolist() for part in kept_heads(scores, 0.25, "global", "magnitude")] == [[0, 1], [0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": {0: [0, 1, 2, 3]}}, "all 4 heads of layer 0 are to go, but one must stay"),
        ({"heads": {2: [0]}}, "no layer 2, the layers are 0 to 1"),
        ({"heads": {1: [4]}}, "layer 1 has no head 4, its heads are 0 to 3"),
        ({"heads": {1: [0]}, "ratio": 0.5}, "either ratio or heads"),
        ({"importance": "taylor"}, "importance 'taylor' is measured on training examples"),
        ({"importance": "activation"}, "importance 'activation' is measured on training examples"),
    ],
)
def test_bad_options_are_a_user_error(tiny_bert: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_heads(tiny_bert, PruneHeadsOptions(**options), None)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratio_outside_of_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        PruneHeadsOptions(ratio=ratio)


def test_other_families_are_refused(build: Any) -> None:
    config = transformers.AlbertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=9
    )
    with pytest.raises(UserError, match=r"AlbertModel .*cannot be pruned by structure; supported: bert, "):
        prune_heads(transformers.AlbertModel(config), PruneHeadsOptions(), None)


def test_matrices_that_are_no_longer_plain_are_refused(tiny_bert: Any) -> None:
    query = tiny_bert.bert.encoder.layer[1].attention.self
    query.query = torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.Linear(4, 32))
    with pytest.raises(
        UserError, match=r"layer\.1\.attention\.self\.query is a Sequential, .*prune heads, neurons and"
    ):
        prune_heads(tiny_bert, PruneHeadsOptions(), None)


def test_masked_matrices_are_refused_in_the_users_words(tiny_bert: Any) -> None:
    method = find_method("prune-magnitude")
    model = method.apply(tiny_bert, method.options(), None)
    with pytest.raises(UserError, match=r"layer\.0\.attention\.self\.query is pruned already, so that"):
        prune_heads(model, PruneHeadsOptions(), None)


@pytest.mark.parametrize("part", ["", ".attention"])
def test_shared_layers_are_refused(tiny_bert: Any, part: str) -> None:
    stack = "bert.encoder.layer"
    tiny_bert.set_submodule(f"{stack}.1{part}", tiny_bert.get_submodule(f"{stack}.0{part}"))
    with pytest.raises(UserError, match="prune before sharing"):
        prune_heads(tiny_bert, PruneHeadsOptions(), None)


def test_method_is_named() -> None:
    (method,) = METHODS
    assert (method.name, method.main, method.kind) == ("prune-heads", "ratio", "pruning")
