"""Queries, keys and values of chosen layers, where `transformers` hands them to the attention function.

A model of `transformers` looks its attention function up by name at every call. For the length of one forward
pass the name is that of `_tapped_sdpa`, which keeps what it is given and then does what SDPA does. So the
model's code is not patched, and outside of that pass it is untouched.

The same way a model that trains in bfloat16 on a CPU without dropout in attention gets SDPA in float32: in
bfloat16 torch's backward pass (`_scaled_dot_product_flash_attention_for_cpu_backward`, torch 2.13) is so much
slower at short lengths that it adds a quarter to the time of the whole pass
(benchmarks/bench_train_no_dropout.py). With dropout SDPA takes another path.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdistil.errors import UserError

_NAME = "fastdistil_taps"


@dataclass(frozen=True)
class AttentionStates:
    """What one layer's attention is computed from, after rotary positions where a model has them."""

    query: Tensor  # (B, H, L, d)
    key: Tensor  # (B, H, L, d)
    value: Tensor  # (B, H, L, d)
    scale: float | None  # of query @ key.mT; None: d ** -0.5
    window: int | None  # how far a token sees; None: all of them

    def relation(self, name: str) -> Tensor:
        """(B, L, H * d): "query", "key" or "value", the heads side by side; a view in most models."""
        states: Tensor = getattr(self, name)
        return states.transpose(1, 2).flatten(2)


@dataclass
class _Recording:
    layers: frozenset[int]
    calls: int = 0
    states: dict[int, AttentionStates] = field(default_factory=dict)


# Of this thread: teacher and student may run in two.
_recording: ContextVar[_Recording | None] = ContextVar("fastdistil_recording", default=None)


@contextmanager
def tap_attention(model: Any, layers: Collection[int]) -> Iterator[dict[int, AttentionStates]]:
    """Within the context, one forward pass of `model` fills the yielded dict with `layers` (0-based).

    They are counted in the order in which the pass comes to them, so that layers that share weights (ALBERT)
    are told apart. The pass runs through SDPA. Without `layers` nothing is changed but the precision of an
    attention whose backward pass would be slow.

    Raises:
        UserError: afterwards, if the model's attention does not go through the interface of `transformers`
            (MPNet), or a layer is not there.
    """
    config = model.config
    if not layers and not _trains_slowly(config):
        yield {}
        return
    _register()
    recording, implementation = _Recording(frozenset(layers)), config._attn_implementation
    token = _recording.set(recording)
    config._attn_implementation = _NAME
    try:
        yield recording.states
    finally:
        config._attn_implementation = implementation
        _recording.reset(token)
    if layers and recording.calls == 0:
        raise UserError(
            f"{type(model).__name__} (model type {config.model_type!r}) does not use the attention interface "
            "of transformers, so its queries, keys and values cannot be tapped; BERT, DistilBERT, RoBERTa, "
            "ELECTRA, MobileBERT, ALBERT and ModernBERT do; objectives of hidden states work with any model"
        )
    for layer in sorted(recording.layers - recording.states.keys()):
        raise UserError(f"layer {layer} is not there: the attention layers are 0 to {recording.calls - 1}")


def _trains_slowly(config: Any) -> bool:
    """Whether the pass is one of SDPA in bfloat16 on a CPU, with a backward pass to follow."""
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return torch.is_grad_enabled() and bf16 and config._attn_implementation == "sdpa"


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, _tapped_sdpa)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _tapped_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    recording = _recording.get()
    if recording is not None:
        if recording.calls in recording.layers:
            recording.states[recording.calls] = AttentionStates(
                query, key, value, keywords.get("scaling"), keywords.get("sliding_window")
            )
        recording.calls += 1
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    if not slow or keywords.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **keywords
        )
    return output.to(query.dtype), None
