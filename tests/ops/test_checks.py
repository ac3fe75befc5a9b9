"""An argument of another type is told by its name, in one line, whichever op it is given to."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdistil import (
    attention_kl,
    attention_mse,
    cosine_loss,
    hidden_mse,
    kd_loss,
    linear_kd_loss,
    relation_kl,
)

LOGITS, WEIGHT, BIAS = (
    torch.linspace(-2, 2, 16).view(2, 8),
    torch.linspace(-1, 1, 64).view(8, 8),
    torch.ones(8),
)
LABELS, MASK = torch.tensor([1, -100]), torch.tensor([True, False])
HEADS, TOKENS = torch.linspace(-1, 1, 48).view(1, 2, 3, 8), torch.tensor([[True, True, False]])
# The tensors of every op, by the names of its arguments.
OPS: dict[Callable[..., Tensor], dict[str, Tensor]] = {
    kd_loss: {"student_logits": LOGITS, "teacher_logits": LOGITS, "labels": LABELS, "kd_mask": MASK},
    linear_kd_loss: {
        "student_hidden": LOGITS,
        "student_weight": WEIGHT,
        "teacher_hidden": LOGITS,
        "teacher_weight": WEIGHT,
        "labels": LABELS,
        "student_bias": BIAS,
        "teacher_bias": BIAS,
        "kd_mask": MASK,
    },
    cosine_loss: {"student_hidden": LOGITS, "teacher_hidden": LOGITS, "mask": MASK},
    hidden_mse: {
        "student_hidden": LOGITS,
        "teacher_hidden": LOGITS,
        "projection": WEIGHT,
        "bias": BIAS,
        "mask": MASK,
    },
    **{
        op: {"student_q": HEADS, "student_k": HEADS, "teacher_q": HEADS, "teacher_k": HEADS, "mask": TOKENS}
        for op in (attention_kl, attention_mse)
    },
    relation_kl: {"student_states": HEADS[:, 0], "teacher_states": HEADS[:, 0], "mask": TOKENS},
}
OPTIONAL = {"labels", "kd_mask", "mask", "projection", "bias", "student_bias", "teacher_bias"}


def call(op: Callable[..., Tensor], **changed: Any) -> Tensor:
    more = {"num_heads": 2} if op is relation_kl else {}
    return op(**{**OPS[op], **more, **changed})


def refusal(op: Callable[..., Tensor], **changed: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call(op, **changed)
    return str(caught.value)


@pytest.mark.parametrize(
    ("op", "name"),
    [pytest.param(op, name, id=f"{op.__name__}-{name}") for op, names in OPS.items() for name in names],
)
def test_what_is_no_tensor_is_named(op: Callable[..., Tensor], name: str) -> None:
    expected = "a tensor or None" if name in OPTIONAL else "a tensor"
    assert refusal(op, **{name: [1, 2]}) == f"{name} must be {expected}, got list"
    if name not in OPTIONAL:
        assert refusal(op, **{name: None}) == f"{name} must be a tensor, got None"


@pytest.mark.parametrize(
    ("op", "name", "whole", "told"),
    [
        (kd_loss, "student_logits", SimpleNamespace(logits=LOGITS), "got SimpleNamespace: give its .logits"),
        (kd_loss, "teacher_logits", {"logits": LOGITS}, "got dict: give its ['logits']"),
        (kd_loss, "teacher_logits", {"last_hidden_state": LOGITS}, "got dict"),
        (hidden_mse, "projection", nn.Linear(8, 8), "got Linear: give its .weight"),
        (linear_kd_loss, "student_weight", nn.Linear(8, 8), "got Linear: give its .weight"),
        (linear_kd_loss, "student_bias", nn.Linear(8, 8), "got Linear: give its .bias"),
        (linear_kd_loss, "student_bias", nn.Linear(8, 8, bias=False), "got Linear"),
        (
            cosine_loss,
            "student_hidden",
            SimpleNamespace(logits=LOGITS, last_hidden_state=LOGITS),
            "got SimpleNamespace: give its .last_hidden_state",
        ),
    ],
)
def test_the_tensor_that_was_meant_is_named(
    op: Callable[..., Tensor], name: str, whole: Any, told: str
) -> None:
    expected = "a tensor or None" if name in OPTIONAL else "a tensor"
    assert refusal(op, **{name: whole}) == f"{name} must be {expected}, {told}"


def test_an_output_of_transformers_is_named() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    told = refusal(kd_loss, teacher_logits=outputs.MaskedLMOutput(logits=LOGITS))
    assert told == "teacher_logits must be a tensor, got MaskedLMOutput: give its .logits"


@pytest.mark.parametrize(
    ("op", "name", "value", "told"),
    [
        (kd_loss, "temperature", "2", "temperature must be a float, got str"),
        (kd_loss, "temperature", True, "temperature must be a float, got bool"),
        (kd_loss, "kd_weight", "1", "kd_weight must be a float or a 0-dim tensor, got str"),
        (kd_loss, "ce_weight", None, "ce_weight must be a float or a 0-dim tensor, got None"),
        (kd_loss, "ce_weight", False, "ce_weight must be a float or a 0-dim tensor, got bool"),
        (kd_loss, "jsd_beta", "0.5", "jsd_beta must be a float, got str"),
        (kd_loss, "label_smoothing", [0.1], "label_smoothing must be a float, got list"),
        (kd_loss, "ignore_index", "-100", "ignore_index must be an integer, got str"),
        (linear_kd_loss, "chunk_size", 2.5, "chunk_size must be an integer, got float"),
        (attention_kl, "student_scale", "1", "student_scale must be a float or a 0-dim tensor, got str"),
        (attention_mse, "teacher_scale", [1.0], "teacher_scale must be a float or a 0-dim tensor, got list"),
        (relation_kl, "num_heads", "2", "num_heads must be an integer, got str"),
    ],
)
def test_what_is_no_number_is_named(op: Callable[..., Tensor], name: str, value: Any, told: str) -> None:
    assert refusal(op, **{name: value}) == told


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, Fraction])
@pytest.mark.parametrize("op", [kd_loss, linear_kd_loss], ids=["kd_loss", "linear_kd_loss"])
def test_any_real_number_is_the_float_that_it_is(op: Callable[..., Tensor], kind: Callable[..., Any]) -> None:
    settings = {"temperature": 2.5, "kd_weight": 0.75, "ce_weight": 0.5}
    settings |= {"jsd_beta": 0.25, "label_smoothing": 0.125}
    teacher = {
        name: OPS[op][name].flip(-1) for name in ("teacher_logits", "teacher_hidden") if name in OPS[op]
    }
    expected = call(op, divergence="jsd", **teacher, **settings)
    numbers = {name: kind(value) for name, value in settings.items()}
    assert torch.equal(call(op, divergence="jsd", **teacher, **numbers), expected)


def test_numpy_integers_are_integers() -> None:
    assert torch.equal(call(kd_loss, ignore_index=np.int64(-100)), call(kd_loss))
    assert torch.equal(call(linear_kd_loss, chunk_size=np.int32(1)), call(linear_kd_loss, chunk_size=1))
    assert torch.equal(call(relation_kl, num_heads=np.int64(2)), call(relation_kl))


class Marked(torch.Tensor):
    """A subclass without behaviour of its own."""


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_subclasses_of_tensor_are_tensors(op: Callable[..., Tensor]) -> None:
    marked = {name: value.as_subclass(Marked) for name, value in OPS[op].items()}
    torch.testing.assert_close(torch.Tensor(call(op, **marked)), call(op), check_dtype=False)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_the_checks_are_part_of_one_compiled_graph(op: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda: call(op), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), call(op))


def test_a_number_may_be_derived_from_a_traced_shape() -> None:
    def step(states: Tensor, logits: Tensor) -> Tensor:
        heads, rows = states.shape[1], logits.shape[0]
        return relation_kl(states, -states, heads) + kd_loss(
            logits, -logits, temperature=rows, kd_weight=rows
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for heads in (2, 4):
        states, logits = torch.linspace(-1, 1, 8 * heads).view(1, heads, 8), LOGITS.repeat(heads, 1)
        torch.testing.assert_close(compiled(states, logits), step(states, logits))
