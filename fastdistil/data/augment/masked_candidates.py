"""What a masked language model would put in a word's place."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastdistil.data.augment.neighbours import top_columns
from fastdistil.data.augment.words import WordTokenizer
from fastdistil.models.heads import mlm_head
from fastdistil.models.taps import flat_rows, tap_teacher

# Token ids of a text, one of which is the mask token; then, if the model is to read two texts, the token that
# ends the first, and the second. What begins and ends the whole is left out.
Gap = tuple[int, ...]


class MaskedCandidates:
    """The most probable whole words at the mask token of each sequence.

    All sequences are run in batches of similar length. The vocabulary head is run at the mask token alone,
    and on the rows of its matrix that belong to whole words.

    Args:
        model: a `transformers` masked language model in eval mode.
        words: word -> id of its one token: what may be put in.
        max_tokens: of a batch, padding counted.
        dtype: autocast of the encoder's passes; the product with the vocabulary, a few per cent of the work,
            keeps the precision of the weights, because rounded to bfloat16 many words tie.

    Raises `UserError` for a model whose head cannot be split.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: WordTokenizer,
        words: dict[str, int],
        *,
        max_tokens: int,
        dtype: torch.dtype | None,
    ) -> None:
        head = mlm_head(model)
        ids = torch.tensor(list(words.values()), device=model.device)
        precision = torch.promote_types(head.weight.dtype, torch.float32)
        with torch.no_grad():
            self._weight = head.weight[ids].to(precision)  # (C, E)
            self._bias = None if head.bias is None else head.bias[ids].to(precision)
        self._model = model
        self._words = list(words)
        self._facts = tokenizer.facts
        self._max_tokens = max_tokens
        self._dtype = dtype

    def __call__(self, gaps: Sequence[Gap], count: int) -> list[list[str]]:
        """The `count` most probable words of each gap, the most probable first."""
        found: list[list[str]] = [[] for _ in gaps]
        for rows in self._batches(gaps):
            for row, best in zip(rows, self._best([gaps[row] for row in rows], count), strict=True):
                found[row] = [self._words[column] for column in best]
        return found

    def _batches(self, gaps: Sequence[Gap]) -> Iterator[list[int]]:
        """Rows of `gaps`, in ascending order of length."""
        batch: list[int] = []
        for row in sorted(range(len(gaps)), key=lambda row: len(gaps[row])):
            if batch and (len(batch) + 1) * (len(gaps[row]) + 2) > self._max_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _best(self, gaps: list[Gap], count: int) -> list[list[int]]:
        facts = self._facts
        lengths = np.array([len(gap) + 2 for gap in gaps])
        ids = np.full((len(gaps), lengths.max()), facts.pad_id)
        for row, gap in zip(ids, gaps, strict=True):
            row[: len(gap) + 2] = (facts.begin_id, *gap, facts.end_id)
        real = np.arange(ids.shape[1]) < lengths[:, None]
        arrays = {"input_ids": ids, "attention_mask": real}
        if getattr(self._model.config, "type_vocab_size", 0) > 1:
            ends = (ids == facts.end_id).cumsum(1) - (ids == facts.end_id)  # before each token
            arrays["token_type_ids"] = np.where(real, ends, 0)
        device = self._model.device
        inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        masked = inputs["input_ids"] == facts.mask_id
        taps = tap_teacher(self._model, inputs, self._dtype)
        with torch.inference_mode():
            positions = masked.int().argmax(1, keepdim=True)  # (B, 1)
            hidden, _, _ = taps.vocabulary_operands(flat_rows(positions, ids.shape[1]))
            return top_columns(hidden.to(self._weight.dtype), self._weight, self._bias, count)
