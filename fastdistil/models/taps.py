"""Run an encoder once and keep what the objectives compare."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.models.attention import AttentionStates, tap_attention
from fastdistil.models.heads import mlm_head
from fastdistil.models.layers import check_layer
from fastdistil.ops.matmul import native_bf16_products


@dataclass(frozen=True)
class Wanted:
    """What objectives ask of one forward pass besides the last hidden states. Layers count from 0."""

    attention: frozenset[int] = frozenset()  # layers whose queries, keys and values are kept
    hidden: frozenset[int] = frozenset()  # layers whose outputs are kept
    embeddings: bool = False  # what enters the first layer

    @staticmethod
    def union(parts: Iterable["Wanted"]) -> "Wanted":
        parts = list(parts)
        return Wanted(
            frozenset().union(*(part.attention for part in parts)),
            frozenset().union(*(part.hidden for part in parts)),
            any(part.embeddings for part in parts),
        )


@dataclass(frozen=True)
class Taps:
    """What one forward pass of a model offers to the objectives."""

    last_hidden: Tensor  # (B, L, D)
    model: Any  # for its masked-language-model head, which not every model has
    autocast_dtype: torch.dtype | None = None  # precision of the pass, None: that of the weights
    trainable: bool = True
    attention: Mapping[int, AttentionStates] = field(default_factory=dict)  # of the layers asked for
    hidden: Mapping[int, Tensor] = field(default_factory=dict)  # layer -> (B, L, D)
    embeddings: Tensor | None = None  # (B, L, D)

    def vocabulary_operands(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(hidden (N, E), weight (V, E), bias (V,) | None)`: the logits are `hidden @ weight.T + bias`.

        `rows` (N,) are indices into the B * L positions; None takes all of them. Only these rows are
        gathered and sent through the head's transform. `hidden` is in the precision of the pass, to which
        the vocabulary product is left to convert the weight; it carries a gradient if the model trains.

        Raises `UserError` if the model has no masked-language-model head.
        """
        head = mlm_head(self.model)
        hidden = self.last_hidden.flatten(0, 1)
        with_grad = self.trainable and torch.is_grad_enabled()
        with torch.set_grad_enabled(with_grad), _autocast(hidden, self.autocast_dtype):
            if rows is not None:
                hidden = hidden.index_select(0, rows)
            hidden = head.transform(hidden)
        if self.autocast_dtype is not None:
            # The transform ends in a LayerNorm, which autocast runs in float32.
            hidden = hidden.to(self.autocast_dtype)
        return hidden, head.weight, head.bias


_NOTHING = Wanted()


def tap(model: Any, input_ids: Tensor, attention_mask: Tensor, wanted: Wanted = _NOTHING) -> Taps:
    """Taps of a model that trains: `input_ids`, `attention_mask` (B, L). The vocabulary head is not run."""
    kind = input_ids.device.type
    autocast_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return _run(model, input_ids, attention_mask, wanted, autocast_dtype, trainable=True)


def tap_teacher(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    dtype: torch.dtype | None = None,
    wanted: Wanted = _NOTHING,
) -> Taps:
    """Taps of a teacher in eval mode, without gradients, under autocast to `dtype` if given."""
    if model.training:
        raise ValueError("the teacher must be in eval mode: with dropout on it teaches noise")
    # Queries and keys are kept for the backward pass of their objective, which inference tensors cannot be.
    without_grad = torch.no_grad() if wanted.attention else torch.inference_mode()
    with without_grad, _autocast(input_ids, dtype):
        return _run(model, input_ids, attention_mask, wanted, dtype, trainable=False)


def _run(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    wanted: Wanted,
    dtype: torch.dtype | None,
    *,
    trainable: bool,
) -> Taps:
    keywords = {"output_hidden_states": True} if wanted.hidden or wanted.embeddings else {}
    with tap_attention(model, wanted.attention) as attention:
        output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **keywords)
    # What enters the first layer, then each layer's output.
    states: tuple[Tensor, ...] = output.hidden_states if keywords else ()
    for layer in wanted.hidden:
        check_layer(layer, len(states) - 1, type(model).__name__, "hidden states")
    return Taps(
        output.last_hidden_state,
        model,
        dtype,
        trainable,
        attention,
        {layer: states[layer + 1] for layer in wanted.hidden},
        states[0] if wanted.embeddings else None,
    )


def frozen_copy(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy for passes of `tap_teacher` under autocast to `dtype`, with the linear layers' weights in it.

    It computes the same bits: autocast would convert these weights at every pass, because it keeps converted
    weights only of parameters that train. None gives the model itself.
    """
    if dtype is None:
        return model
    frozen = copy.deepcopy(model).requires_grad_(False)
    for module in frozen.modules():
        if isinstance(module, nn.Linear):
            # A new parameter: a decoder's may be the word embeddings, which stay as they are. So do biases,
            # which the vocabulary loss takes unrounded.
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
    return frozen


def flat_rows(positions: Tensor, length: int) -> Tensor:
    """Where the `positions` (B, k) of sequences of `length` lie among the B * L rows: (B * k,)."""
    first = torch.arange(len(positions), device=positions.device)[:, None] * length
    return (positions + first).flatten()


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where matrix products in it are faster than in float32 on `device`, else None."""
    return torch.bfloat16 if native_bf16_products(device) else None


def _autocast(like: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    # Disabled rather than absent when dtype is None, so that an outer autocast of the student stays outside.
    return torch.autocast(like.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
