"""Run an encoder once and keep what the objectives compare."""

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
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
    logits: bool = False  # of the task head, which is run for them

    @staticmethod
    def union(parts: Iterable["Wanted"]) -> "Wanted":
        parts = list(parts)
        return Wanted(
            frozenset().union(*(part.attention for part in parts)),
            frozenset().union(*(part.hidden for part in parts)),
            any(part.embeddings for part in parts),
            any(part.logits for part in parts),
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
    pooled: Tensor | None = None  # (B, D), of a model that has a pooler
    # Of a task head: (B, C) classes or choices, (B, 1) a score, (B, 2, L) starts and ends of a span, -inf on
    # padding.
    logits: Tensor | None = None

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


def tap(model: Any, inputs: Mapping[str, Tensor], wanted: Wanted = _NOTHING) -> Taps:
    """Taps of a model that trains, of the `inputs` of a batch. The vocabulary head is not run."""
    kind = inputs["input_ids"].device.type
    autocast_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return _run(model, inputs, wanted, autocast_dtype, trainable=True)


def tap_teacher(
    model: Any,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    wanted: Wanted = _NOTHING,
) -> Taps:
    """Taps of a teacher in eval mode, without gradients, under autocast to `dtype` if given."""
    if model.training:
        raise ValueError("the teacher must be in eval mode: with dropout on it teaches noise")
    # Queries and keys are kept for the backward pass of their objective, which inference tensors cannot be.
    without_grad = torch.no_grad() if wanted.attention else torch.inference_mode()
    with without_grad, _autocast(inputs["input_ids"], dtype):
        return _run(model, inputs, wanted, dtype, trainable=False)


def _run(
    model: Any,
    inputs: Mapping[str, Tensor],
    wanted: Wanted,
    dtype: torch.dtype | None,
    *,
    trainable: bool,
) -> Taps:
    called = accepted_inputs(model, inputs)
    keywords = {"output_hidden_states": True} if wanted.hidden or wanted.embeddings else {}
    logits = None
    with tap_attention(model, wanted.attention) as attention:
        if wanted.logits:
            kept: list[Any] = []
            hook = model.base_model.register_forward_hook(lambda module, args, result: kept.append(result))
            try:
                logits = task_logits(model(**called, **keywords), inputs["attention_mask"])
            finally:
                hook.remove()
            (output,) = kept
        else:
            # The options of a choice (B, C, L) are sequences like others.
            output = model.base_model(**{n: t.flatten(0, -2) for n, t in called.items()}, **keywords)
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
        getattr(output, "pooler_output", None),
        logits,
    )


def answered(logits: Tensor, first: Tensor | None, layers: Sequence[int]) -> Taps:
    """Taps of a teacher of whom only these are known, beforehand: logits (B, C), and the outputs of K layers
    at the first token of each sequence (B, K, D), which become hidden states of length 1."""
    hidden = {} if first is None else dict(zip(layers, first[:, :, None].unbind(1), strict=True))
    return Taps(logits.new_empty(0), None, trainable=False, logits=logits, hidden=hidden)


def accepted_inputs(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `inputs` that the model's encoder takes: a DistilBERT takes no token types, for example.

    A RoBERTa takes them but has a single one, which those of a second segment would be beyond. A BiLSTM,
    which embeds none, does not count them.
    """
    names = set(inspect.signature(model.base_model.forward).parameters)
    if getattr(getattr(model, "config", None), "type_vocab_size", 2) < 2:
        names.discard("token_type_ids")
    return {name: value for name, value in inputs.items() if name in names}


def task_logits(output: Any, attention_mask: Tensor) -> Tensor:
    """The logits of a task head's output as `Taps.logits` has them."""
    if hasattr(output, "start_logits"):
        spans = torch.stack([output.start_logits, output.end_logits], dim=1)
        return spans.masked_fill(~attention_mask.bool()[:, None], -torch.inf)
    logits: Tensor = output.logits
    return logits


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
