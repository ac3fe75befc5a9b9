"""How well a model predicts masked tokens of held-out text, and whether one segment follows another."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdistil.data.batches import evaluation_batches
from fastdistil.data.masking import Masker, mask_batch
from fastdistil.data.token_store import TokenStore
from fastdistil.data.tokenizer import TokenizerFacts
from fastdistil.errors import UserError
from fastdistil.models.heads import next_sentence_head
from fastdistil.models.taps import flat_rows, tap_teacher

# Every model is asked for the same tokens, whatever it was trained with.
_MASKING_SEED = 0


@dataclass(frozen=True)
class MaskedLMScore:
    """Means over the `tokens` that were masked; `next_sentence_accuracy` is over the sequences, and None
    where these are no pairs or the model has no head for them."""

    loss: float  # cross entropy, nats a token
    accuracy: float  # share of tokens whose most probable prediction is right
    tokens: int
    next_sentence_accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def evaluate_masked_lm(
    model: Any,
    facts: TokenizerFacts,
    store: TokenStore,
    rows: np.ndarray,
    *,
    batch_size: int = 32,
    max_batches: int | None = None,
    dtype: torch.dtype | None = None,
) -> MaskedLMScore:
    """Scores on the sequences `rows` of `store`, on the model's device.

    15 % of the tokens are masked as BERT does (80/10/10, no smoothing), the same ones for every model that
    reads the same store. The vocabulary head runs on these tokens alone. A model with BERT's
    next-sentence head is also asked, of the same masked text, whether the second segments of a store of
    sentence pairs follow the first ones. The model is put back into the mode it was in.

    Args:
        facts: of the tokenizer that made the store.
        rows: (n,) sequence numbers.
        max_batches: stop after so many batches of `batch_size`.
        dtype: autocast of the forward passes; default the precision of the weights.

    Raises:
        UserError: no token to predict in these sequences.
    """
    device = model.device
    masker = Masker(facts, seed=_MASKING_SEED, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    right, tokens, right_pairs = torch.zeros((3,), dtype=torch.int64, device=device)
    num_pairs = 0
    pair_head = next_sentence_head(model)
    training = model.training
    model.eval()
    try:
        for batch in evaluation_batches(store, rows, batch_size, max_batches):
            batch = batch.to(device)
            masked = mask_batch(masker, batch)
            taps = tap_teacher(model, masked.inputs, dtype)
            picked = flat_rows(masked.positions, masked.input_ids.shape[1])
            with torch.inference_mode():
                hidden, weight, bias = taps.vocabulary_operands(picked)
                bias = None if bias is None else bias.to(hidden.dtype)
                logits = nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float()
                labels = masked.position_labels.flatten()
                loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
                right += (logits.argmax(-1) == labels).sum()
                tokens += (labels != -100).sum()
                if pair_head is not None and taps.pooled is not None and masked.next_sentence is not None:
                    random = pair_head(taps.pooled.to(pair_head.weight.dtype)).argmax(-1)
                    right_pairs += (random == masked.next_sentence).sum()
                    num_pairs += len(random)
    finally:
        model.train(training)
    count = int(tokens)
    if count == 0:
        raise UserError(f"{store.path}: the held-out sequences have no token to predict")
    accuracy = int(right_pairs) / num_pairs if num_pairs else None
    return MaskedLMScore(loss.item() / count, int(right) / count, count, accuracy)
