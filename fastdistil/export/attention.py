"""The attention of a model under export as one node of ONNX Runtime.

A model of `transformers` looks its attention and its mask function up by name. During the export the name is
that of the two functions here, which emit `com.microsoft::MultiHeadAttention` with the padding mask as the
tokenizer gives it. So nothing depends on a pattern being recognised in the exported graph, the masks of all
pairs of tokens are not formed, and layers with different numbers of heads need no special case.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_NAME = "fastdistil_onnxruntime"


@contextmanager
def onnxruntime_attention(model: Any) -> Iterator[None]:
    """Within the context, `model` can be exported to ONNX, and not be called."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    config = model.config
    implementation = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = implementation


def _attention(
    module: Any,
    query: Tensor,  # (B, H, L, d)
    key: Tensor,  # (B, H, L, d)
    value: Tensor,  # (B, H, L, e)
    attention_mask: Tensor | None,  # of `_mask`
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    heads = query.shape[1]
    states = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]  # (B, L, H * d)
    padding = None if attention_mask is None or attention_mask.ndim > 2 else attention_mask
    bias = attention_mask if padding is None else None
    attributes: dict[str, Any] = {"num_heads": heads}
    if scaling is not None:
        attributes["scale"] = float(scaling)
    context = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (*states, None, padding, bias),
        attributes,
        dtype=query.dtype,
        shape=states[2].shape,
        version=1,
    )
    return context.unflatten(-1, (heads, -1)), None  # (B, L, H, e)


def _mask(*, attention_mask: Tensor | None, local_size: int | None = None, **keywords: Any) -> Tensor | None:
    """(B, L) int32 of a layer that sees all tokens; else (B, 1, L, L), what is added to the scores."""
    from transformers.masking_utils import eager_mask

    if local_size is not None:
        keywords["allow_is_bidirectional_skip"] = False
        return eager_mask(attention_mask=attention_mask, local_size=local_size, **keywords)
    return None if attention_mask is None else attention_mask.to(torch.int32)
