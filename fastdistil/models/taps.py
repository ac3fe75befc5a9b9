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
        """`(hidden (N, E), weight (V, E), bias (V,) | None)`, whose `hidden @ weight.T + bias` are the logits.

        `rows` (N,) are indices into the B * L positions; None takes all of them. Only these rows are gathered and
        sent through the head's transform. All three are in the precision of the pass, and only a trainable model's
        carry a gradient.
        """
        hidden = self.last_hidden.flatten(0, 1)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()), _autocast(hidden, self.autocast_dtype):
            if rows is not None:
                hidden = hidden.index_select(0, rows)
            hidden = self.head.transform(hidden)
            weight, bias = self.head.weight, self.head.bias
            if self.autocast_dtype is not None:
                # Autocast does not reach into a custom op, and a LayerNorm under it gives float32.
                hidden, weight = hidden.to(self.autocast_dtype), weight.to(self.autocast_dtype)
        return hidden, weight, bias


def tap(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Taps:
    """Taps of a model that trains: `input_ids` and `attention_mask` (B, L). The vocabulary head is not run."""
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    kind = hidden.device.type
    autocast_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return Taps(hidden, mlm_head(model), autocast_dtype)


@torch.inference_mode()
def tap_teacher(model: Any, input_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype | None = None) -> Taps:
    """Taps of a teacher in eval mode: no gradients, under autocast to `dtype` (see `fast_dtype`) if it is given."""
    if model.training:
        raise ValueError("the teacher must be in eval mode: with dropout on it teaches noise")
    with _autocast(input_ids, dtype):
        hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return Taps(hidden, mlm_head(model), dtype, trainable=False)


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
