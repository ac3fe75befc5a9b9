import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastdistil.compress.replacements import drop, rebuild, replace, replacements
from fastdistil.errors import UserError

DENSE = "bert.encoder.layer.0.intermediate.dense"
OUTPUT = "bert.encoder.layer.0.output.dense"


def _narrow(model: Any) -> None:
    replace(model, DENSE, nn.Linear(32, 40), {"kind": "linear", "in_features": 32, "out_features": 40})
    replace(model, OUTPUT, nn.Linear(40, 32), {"kind": "linear", "in_features": 40, "out_features": 32})


def test_rebuilt_architecture_has_the_replaced_shapes_in_order(tiny_bert: Any, build: Any) -> None:
    _narrow(tiny_bert)
    replace(tiny_bert, DENSE, nn.Linear(32, 24), {"kind": "linear", "in_features": 32, "out_features": 24})
    fresh = build("bert")
    fresh.config.fastdistil = copy.deepcopy(tiny_bert.config.fastdistil)
    rebuild(fresh)
    assert [path for path, _ in replacements(fresh)] == [DENSE, OUTPUT, DENSE]
    shapes = {name: tuple(weight.shape) for name, weight in fresh.state_dict().items()}
    assert shapes == {name: tuple(weight.shape) for name, weight in tiny_bert.state_dict().items()}
    assert shapes[f"{DENSE}.weight"] == (24, 32)


def test_rebuilding_works_on_meta_tensors(tiny_bert: Any, build: Any) -> None:
    _narrow(tiny_bert)
    fresh = build("bert").to("meta")
    fresh.config.fastdistil = copy.deepcopy(tiny_bert.config.fastdistil)
    rebuild(fresh)
    weight = fresh.get_submodule(DENSE).weight
    assert (weight.shape, weight.device.type) == ((40, 32), "meta")


def test_dropped_replacement_leaves_no_trace_in_the_config(tiny_bert: Any, run: Any) -> None:
    before, linear = run(tiny_bert), tiny_bert.get_submodule(DENSE)
    replace(tiny_bert, DENSE, nn.Linear(32, 48), {"kind": "linear", "in_features": 32, "out_features": 48})
    assert not torch.equal(run(tiny_bert), before)
    drop(tiny_bert, DENSE, "linear", linear)
    assert torch.equal(run(tiny_bert), before)
    assert "fastdistil" not in tiny_bert.config.to_dict()


def test_drop_takes_only_the_last_entry_of_its_kind(tiny_bert: Any) -> None:
    _narrow(tiny_bert)
    replace(tiny_bert, DENSE, nn.Linear(32, 24), {"kind": "linear", "in_features": 32, "out_features": 24})
    drop(tiny_bert, DENSE, "linear", nn.Linear(32, 40))
    assert [spec["out_features"] for path, spec in replacements(tiny_bert) if path == DENSE] == [40]


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"replacements": [[DENSE, {"kind": "magic"}]]}, "unknown kind, 'magic'; known: .*linear"),
        ({"format": 9, "replacements": []}, "format 9, this version reads 1: update fastdistil"),
        ({"replacements": [["bert.nowhere", {"kind": "heads", "heads": 1, "head_size": 8}]]}, "does not fit"),
        ({"replacements": [[DENSE, {"kind": "linear"}]]}, "does not fit BertForSequenceClassification"),
        ({"replacements": ["x"]}, "not a replacement"),
        ("x", "is not a table"),
    ],
    ids=["kind", "format", "path", "spec", "entry", "table"],
)
def test_bad_list_is_a_user_error(tiny_bert: Any, described: Any, message: str) -> None:
    tiny_bert.config.fastdistil = described
    with pytest.raises(UserError, match=message):
        rebuild(tiny_bert)


def test_a_module_that_layers_share_is_replaced_in_all_of_them(tiny_bert: Any) -> None:
    first, second = (layer.intermediate for layer in tiny_bert.bert.encoder.layer)
    second.dense = first.dense
    replace(tiny_bert, DENSE, nn.Linear(32, 48), {"kind": "linear", "in_features": 32, "out_features": 48})
    assert second.dense is tiny_bert.get_submodule(DENSE)
    assert second.dense.in_features == 32
