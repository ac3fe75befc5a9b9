from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn

from fastdistil.compress.prune_2of4 import METHODS, Prune2of4Options, two_of_four
from fastdistil.compress.replacements import replacements
from fastdistil.errors import UserError

(METHOD,) = METHODS
PATH = "bert.encoder.layer.1.output.dense"


def test_the_mask_keeps_the_two_that_weigh_most() -> None:
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    groups, mask = weight.abs().view(-1, 4), two_of_four(weight).view(-1, 4)
    for group, kept in zip(groups, mask, strict=True):
        best = max(combinations(range(4), 2), key=lambda pair: float(group[list(pair)].sum()))
        assert kept.nonzero().flatten().tolist() == list(best)


def test_of_equal_weights_two_are_kept() -> None:
    assert two_of_four(torch.tensor([[1.0, -1.0, 1.0, 1.0]])).tolist() == [[True, True, False, False]]


def test_the_pattern_holds_in_training_and_after_reloading(
    tiny_bert: Any, calibration: Any, reload_equal: Callable[[Any], Any]
) -> None:
    options = Prune2of4Options()
    model = METHOD.apply(tiny_bert, options, None).train()
    mask = model.get_submodule(PATH).weight != 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for batch in calibration.batches:
        calibration.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded = reload_equal(METHOD.finish(model, options).eval())
    for module in loaded.base_model.modules():
        if isinstance(module, nn.Linear):
            assert ((module.weight != 0).view(-1, 4).sum(1) == 2).all()
    assert torch.equal(loaded.get_submodule(PATH).weight != 0, mask)


def test_every_family_reloads_bit_equal(
    build: Callable[..., Any], family: str, reload_equal: Callable[[Any], Any]
) -> None:
    model = METHOD.finish(
        METHOD.apply(build(family), Prune2of4Options(embeddings=True), None), Prune2of4Options()
    )
    assert {spec.get("pattern") for _, spec in replacements(model)} == {"2:4"}
    reload_equal(model)


def test_inputs_that_are_no_multiple_of_4_are_refused(build: Callable[..., Any]) -> None:
    model = build("bert", intermediate_size=46)
    with pytest.raises(
        UserError, match=r"layer\.0\.output\.dense has 46 inputs, which is not a multiple of 4"
    ):
        METHOD.apply(model, Prune2of4Options(), None)
    assert replacements(model) == []


def test_pruning_twice_is_refused(tiny_bert: Any) -> None:
    METHOD.finish(METHOD.apply(tiny_bert, Prune2of4Options(), None), Prune2of4Options())
    with pytest.raises(UserError, match="is pruned already"):
        METHOD.apply(tiny_bert, Prune2of4Options(), None)
