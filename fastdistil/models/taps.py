"""Run an encoder once and keep what the objectives compare."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistil.models.heads import MLMHead, mlm_head


@dataclass(frozen=True)
class Taps:
    """What one forward pass of a model offers to the objectives."""

    last_hidden: Tensor  # (B, L, D)
    head: MLMHead
    autocast_dtype: torch.dtype | None = None  # precision of the pass, None: that of the weights
    trainable: bool = True

    def vocabulary_operands(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(hidden (N, E), weight (V, E), bias (V,) | None)`: the logits are `hidden @ weight.T + bias`.

        `rows` (N,) are indices into the B * L positions; None takes all of them. Only these rows are
        gathered and sent through the head's transform. `hidden` is in the precision of the pass, to which
        the vocabulary product is left to convert the weight; it carries a gradient if the model trains.
        """
        hidden = self.last_hidden.flatten(0, 1)
        with_grad = self.trainable and torch.is_grad_enabled()
        with torch.set_grad_enabled(with_grad), _autocast(hidden, self.autocast_dtype):
            if rows is not None:
                hidden = hidden.index_select(0, rows)
            hidden = self.head.transform(hidden)
        if self.autocast_dtype is not None:
            # The transform ends in a LayerNorm, which autocast runs in float32.
            hidden = hidden.to(self.autocast_dtype)
        return hidden, self.head.weight, self.head.bias


def tap(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Taps:
    """Taps of a model that trains: `input_ids`, `attention_mask` (B, L). The vocabulary head is not run."""
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    kind = hidden.device.type
    autocast_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return Taps(hidden, mlm_head(model), autocast_dtype)


@torch.inference_mode()
def tap_teacher(
    model: Any, input_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype | None = None
) -> Taps:
    """Taps of a teacher in eval mode, without gradients, under autocast to `dtype` if given."""
    if model.training:
        raise ValueError("the teacher must be in eval mode: with dropout on it teaches noise")
    with _autocast(input_ids, dtype):
        hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return Taps(hidden, mlm_head(model), dtype, trainable=False)


def flat_rows(positions: Tensor, length: int) -> Tensor:
    """Where the `positions` (B, k) of sequences of `length` lie among the B * L rows: (B * k,)."""
    first = torch.arange(len(positions), device=positions.device)[:, None] * length
    return (positions + first).flatten()


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where matrix products in it are faster than in float32 on `device`, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return None


def _autocast(like: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    # Disabled rather than absent when dtype is None, so that an outer autocast of the student stays outside.
    return torch.autocast(like.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
