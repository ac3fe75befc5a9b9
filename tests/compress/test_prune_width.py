import json
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from fastdistil.compress.blocks import find_blocks
from fastdistil.compress.method import Calibration
from fastdistil.compress.prune_ffn import PruneFFNOptions, prune_ffn
from fastdistil.compress.prune_heads import PruneHeadsOptions, prune_heads
from fastdistil.compress.prune_width import PruneWidthOptions, prune_width
from fastdistil.compress.replacements import replacements
from fastdistil.compress.spaces import dim_importance, find_spaces
from fastdistil.compress.store import load
from fastdistil.errors import UserError


class _MaskedNorm(nn.LayerNorm):
    """A LayerNorm over the dimensions that are kept, with 0 in the others."""

    keep: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x[..., self.keep]
        mean, variance = kept.mean(-1, keepdim=True), kept.var(-1, keepdim=True, unbiased=False)
        y = (x - mean) / (variance + self.eps).sqrt() * self.weight
        y = y if self.bias is None else y + self.bias
        return y * self.keep


def _mask_dims(model: Any, dims: list[torch.Tensor]) -> None:
    """The whole-size model that computes what the narrow one should: all that is not kept is 0."""
    for space, kept in zip(find_spaces(model, find_blocks(model)), dims, strict=True):
        keep = torch.zeros(32, dtype=torch.bool)
        keep[kept] = True
        for norm in space.norms:
            norm.__class__ = _MaskedNorm
            norm.keep = keep
        for module in (*space.embeddings, *space.writers):
            module.register_forward_hook(lambda module, x, y, keep=keep: y * keep)


@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM", "QuestionAnswering", ""])
def test_pruned_model_equals_the_masked_one(build: Any, family: str, run: Any, head: str) -> None:
    masked, pruned = build(family, head), build(family, head)
    spaces = find_spaces(masked, find_blocks(masked))
    dims = [dim_importance(space, "magnitude", masked, None) for space in spaces]
    kept = [score.argsort(descending=True, stable=True)[:16].sort().values for score in dims]
    prune_heads(masked, PruneHeadsOptions(ratio=0.5), None)
    _mask_dims(masked, kept)
    prune_width(pruned, PruneWidthOptions(ratio=0.5), None)
    expected = run(masked) if head else run(masked)[..., kept[0]]
    torch.testing.assert_close(run(pruned), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM", "MultipleChoice"])
def test_auto_model_loads_the_narrow_folder(build: Any, family: str, run: Any, save: Any, head: str) -> None:
    model = prune_width(build(family, head), PruneWidthOptions(ratio=0.5), None)
    folder = save(model)
    config = json.loads((folder / "config.json").read_text())
    assert "fastdistil" not in config
    assert (model.config.hidden_size, model.config.num_attention_heads) == (16, 2)
    auto = getattr(transformers, f"AutoModelFor{head}")
    loaded = auto.from_pretrained(folder).eval()
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    if head != "MultipleChoice":
        assert torch.equal(run(loaded), run(model))


def test_tied_embeddings_stay_tied(build: Any, family: str) -> None:
    model = prune_width(build(family, "MaskedLM"), PruneWidthOptions(ratio=0.5), None)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_electra_without_projection_narrows_its_embeddings(build: Any, run: Any, save: Any) -> None:
    model = prune_width(build("electra", embedding_size=32), PruneWidthOptions(ratio=0.5), None)
    assert model.config.embedding_size == 16
    assert torch.equal(run(load(save(model))), run(model))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_chain_of_all_structured_prunings_is_reloaded_bit_equal(
    build: Any, family: str, calibration: Calibration, reload_equal: Any
) -> None:
    model = build(family)
    prune_heads(model, PruneHeadsOptions(heads={0: [0, 1, 3]}), None)
    prune_ffn(model, PruneFFNOptions(ratio=0.5, scope="global", round_to=4), calibration)
    model = reload_equal(prune_width(reload_equal(model), PruneWidthOptions(ratio=0.5), calibration))
    # The layer that had one head keeps it, the other has as many as the width says.
    assert [block.num_heads for block in find_blocks(model)] == [1, 2]
    assert replacements(model)
    calibration.loss(model.train(), calibration.batches[0]).backward()


def test_taylor_importance_equals_finite_differences(build: Any, calibration: Calibration) -> None:
    model = build("bert").double()
    space = find_spaces(model, find_blocks(model))[0]
    found = dim_importance(space, "taylor", model, Calibration(calibration.batches[:1], calibration.loss))
    batch = calibration.batches[0]

    def losses(gate: torch.Tensor) -> torch.Tensor:
        hooks = [
            reader.register_forward_pre_hook(lambda module, x: (x[0] * gate,)) for reader in space.readers
        ]
        with torch.no_grad():
            logits = model(**batch.inputs).logits
        for hook in hooks:
            hook.remove()
        return nn.functional.cross_entropy(logits, batch.labels, reduction="none")

    for dim in (0, 17):
        step = 1e-5 * nn.functional.one_hot(torch.tensor(dim), 32).double()
        slopes = (losses(1 + step) - losses(1 - step)) / 2e-5
        torch.testing.assert_close(found[dim], slopes.abs().mean(), rtol=1e-6, atol=1e-9)


def test_activation_importance_finds_the_dimension_that_is_always_large(
    build: Any, calibration: Calibration
) -> None:
    model = build("bert")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.bias[11] = 9.0
    space = find_spaces(model, find_blocks(model))[0]
    assert dim_importance(space, "activation", model, calibration).argmax() == 11


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {"ratio": 0.05}, "ratio 0.05 of 32 dimensions removes nothing, as whole heads of 8 go"),
        ("bert", {"importance": "activation"}, "importance 'activation' is measured on training examples"),
        ("electra", {"ratio": 0.25}, "24 dimensions are as many as the embeddings have"),
    ],
)
def test_bad_options_are_a_user_error(build: Any, family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_width(build(family), PruneWidthOptions(**options), None)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_ratio_outside_of_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        PruneWidthOptions(ratio=ratio)


def test_head_of_another_kind_is_refused(build: Any) -> None:
    with pytest.raises(UserError, match="the head of BertForTokenClassification is not supported"):
        prune_width(build("bert", "TokenClassification"), PruneWidthOptions(), None)


def test_factorised_embeddings_are_refused(tiny_bert: Any) -> None:
    embeddings = tiny_bert.bert.embeddings
    embeddings.word_embeddings = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 32))
    with pytest.raises(UserError, match=r"word_embeddings\.1 is a Linear, .*prune before factorising"):
        prune_width(tiny_bert, PruneWidthOptions(), None)
