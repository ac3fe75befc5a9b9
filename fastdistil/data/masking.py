"""Masked language modelling inputs, with static shapes and no host sync.

BERT's masking (Devlin et al. 2019, section 3.1): 15 % of the tokens are picked; of these 80 % become
[MASK], 10 % a random token, 10 % stay. DistilBERT's rarity smoothing picks a token with weight
count(token)^-0.7, as XLM does (Lample and Conneau 2019); the k picks of a sequence are then a draw without
replacement with these weights, which Gumbel top-k gives exactly: the k largest of log w_i - log E_i, with
E_i exponential (Efraimidis and Spirakis 2006).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdistil.data.batches import TokenBatch, TokenSource
from fastdistil.data.noise import below, noise_bits, uniform
from fastdistil.data.tokenizer import TokenizerFacts

# Independent uses of the same (seed, epoch, sequence, position).
_PICK, _REPLACE, _TOKEN = 1, 2, 3
# Whole words: rounds of "take the next words that still fit". After the first one less than a word's length
# is left, and each further round takes at least one word, so four leave places only in texts of very long
# words.
_WHOLE_WORD_ROUNDS = 4


@dataclass(frozen=True)
class MaskedBatch:
    """What the student and the teacher read, and what the student must predict. B sequences of L tokens, k
    picks.

    Attributes:
        input_ids: (B, L) int64 with the replacements.
        attention_mask: (B, L) bool, false on padding.
        labels: (B, L) int64, the original token where picked, else -100.
        positions: (B, k) int64, the picked positions in ascending order; unused places point at unpicked
            positions.
        position_labels: (B, k) int64, `labels` at `positions`: -100 in unused places.
        token_type_ids, next_sentence: as of `TokenBatch`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    positions: Tensor
    position_labels: Tensor
    token_type_ids: Tensor | None = None
    next_sentence: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.token_type_ids is None else {**inputs, "token_type_ids": self.token_type_ids}


def num_picks(probability: float, length: int) -> int:
    """k = max(1, round(p * L)), halves up."""
    return max(1, math.floor(probability * length + 0.5))


class Masker:
    """Picks and replaces tokens. All random numbers are hashes of (seed, epoch, sequence index, position).

    A sequence of n tokens (special ones counted, padding not) gets exactly max(1, round(p n)) picks, or one
    for each ordinary token if it has fewer. Special tokens and padding are never picked, and never drawn as
    replacement. With `whole_word`, all pieces of a picked word are picked: words are taken in random order
    while they fit, so a sequence may end with fewer picks. A word is weighted by its first piece.

    Args:
        facts: of the tokenizer.
        seed: of the run.
        probability: p, the share of tokens to pick.
        mask, random, keep: shares of the picks that become [MASK], become a random ordinary token, or stay.
        smoothing: exponent a of the weight count^-a, 0.7 for DistilBERT; None picks uniformly.
        whole_word: pick words, not pieces.
        token_counts: (V,), needed for smoothing. Counts of 0 weigh as 1.
        device: where batches will be.

    Raises:
        ValueError: a share outside [0, 1], shares that do not add up to 1, smoothing without counts, or
            whole words with a tokenizer that does not mark them.
    """

    def __init__(
        self,
        facts: TokenizerFacts,
        *,
        seed: int,
        probability: float = 0.15,
        mask: float = 0.8,
        random: float = 0.1,
        keep: float = 0.1,
        smoothing: float | None = None,
        whole_word: bool = False,
        token_counts: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < probability < 1:
            raise ValueError(f"masking probability must be in (0, 1), got {probability}")
        if min(mask, random, keep) < 0 or abs(mask + random + keep - 1) > 1e-6:
            raise ValueError(
                f"mask, random and keep must be shares that add up to 1, got {mask}, {random}, {keep}"
            )
        if whole_word and facts.continuation is None:
            raise ValueError(
                "whole_word needs a WordPiece or byte-level BPE tokenizer: this one does not mark words"
            )
        self._seed = seed
        self._probability = probability
        self._mask_share = mask
        self._replaced_share = mask + random
        self._mask_id = facts.mask_id
        self._whole_word = whole_word

        special = torch.zeros(facts.vocab_size, dtype=torch.bool)
        special[list(facts.special_ids)] = True
        log_weight = torch.zeros(facts.vocab_size)
        if smoothing is not None:
            if token_counts is None:
                raise ValueError("smoothing needs token_counts")
            log_weight = -smoothing * torch.from_numpy(token_counts).double().clamp(min=1).log().float()
        self._special = special.to(device)
        self._log_weight = log_weight.to(device)
        self._ordinary_ids = torch.nonzero(~special).squeeze(1).to(device)
        self._continuation = torch.from_numpy(facts.continuation).to(device) if whole_word else None
        self._budgets: dict[int, Tensor] = {}

    def num_picks(self, length: int) -> int:
        """k for sequences of `length` tokens, padding included."""
        return num_picks(self._probability, length)

    def mask(
        self, input_ids: Tensor, attention_mask: Tensor, sequence_index: Tensor, epoch: Tensor | int
    ) -> MaskedBatch:
        """Masks a batch.

        Args:
            input_ids: (B, L) int64; not written to.
            attention_mask: (B, L), true or 1 on tokens.
            sequence_index: (B,) int64, which sequence of the data each row is.
            epoch: (B,) int64 or an int: each pass over the data is masked anew.
        """
        length = input_ids.shape[1]
        attention_mask = attention_mask.bool()
        position = torch.arange(length, device=input_ids.device)  # (L,)
        sequence = sequence_index.unsqueeze(1)  # (B, 1)
        when = epoch if isinstance(epoch, int) else epoch.unsqueeze(1)

        def noise(stream: int) -> Tensor:  # (B, L)
            return noise_bits(self._seed, stream, when, sequence, position)

        ordinary = attention_mask & ~self._special[input_ids]
        budget = self._budget(length, input_ids.device)[attention_mask.sum(1)].unsqueeze(1)  # (B, 1)
        # Exponential race: the smallest E_i / w_i win, written as the largest log w_i - log E_i.
        score = self._log_weight[input_ids] - (-uniform(noise(_PICK)).log()).log()
        if self._continuation is None:
            picked = _top(score.masked_fill(~ordinary, -torch.inf), budget) & ordinary
        else:
            # A piece right behind a special token begins a word: the document or the segment was cut there.
            continuation = self._continuation[input_ids] & ordinary & ordinary.roll(1, dims=1)
            picked = _top_words(score, ordinary, continuation, budget)

        how = uniform(noise(_REPLACE))
        random_ids = self._ordinary_ids[below(noise(_TOKEN), len(self._ordinary_ids))]
        replaced = torch.where(how < self._mask_share, self._mask_id, random_ids)
        labels = input_ids.masked_fill(~picked, -100)
        # Picked positions first, both groups in ascending order.
        order = torch.where(picked, 2 * length - position, length - position)
        positions = order.topk(self.num_picks(length), dim=1).indices
        return MaskedBatch(
            input_ids=torch.where(picked & (how < self._replaced_share), replaced, input_ids),
            attention_mask=attention_mask,
            labels=labels,
            positions=positions,
            position_labels=labels.gather(1, positions),
        )

    def _budget(self, length: int, device: torch.device) -> Tensor:
        """(L + 1,): how many picks a sequence of n tokens gets."""
        if length not in self._budgets:
            table = [0] + [self.num_picks(n) for n in range(1, length + 1)]
            self._budgets[length] = torch.tensor(table, device=device)
        return self._budgets[length]


class Unmasked:
    """In place of a `Masker`: the models read the text as it is, and no token is to be predicted."""

    def mask(
        self, input_ids: Tensor, attention_mask: Tensor, sequence_index: Tensor, epoch: Tensor | int
    ) -> MaskedBatch:
        none = input_ids.new_empty(len(input_ids), 0)
        return MaskedBatch(input_ids, attention_mask.bool(), torch.full_like(input_ids, -100), none, none)


def mask_batch(masker: Masker | Unmasked, batch: TokenBatch) -> MaskedBatch:
    """The masked batch, which keeps what the batch says of its segments."""
    masked = masker.mask(batch.input_ids, batch.attention_mask, batch.sequence_index, batch.epoch)
    return replace(masked, token_type_ids=batch.token_type_ids, next_sentence=batch.next_sentence)


class MaskedBatches:
    """A `BatchSource`: the batches of `source`, moved to `device` and masked there."""

    def __init__(
        self, source: TokenSource, masker: Masker | Unmasked, device: torch.device | str = "cpu"
    ) -> None:
        self._source = source
        self._masker = masker
        self._device = device

    def micro_batches(self, step: int) -> Iterator[MaskedBatch]:
        for batch in self._source.micro_batches(step):
            yield mask_batch(self._masker, batch.to(self._device))

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)


def _top(score: Tensor, budget: Tensor) -> Tensor:
    """(B, L) bool: the `budget` (B, 1) largest of each row; ties go to the earlier position."""
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, rank < budget)


def _top_words(score: Tensor, ordinary: Tensor, continuation: Tensor, budget: Tensor) -> Tensor:
    """(B, L) bool: whole words in descending order of their first piece's score, skipping those that do not
    fit.

    BERT's whole-word masking in parallel: each round sorts nothing, it only counts along the ranked tokens.
    """
    length = score.shape[1]
    position = torch.arange(length, device=score.device).expand_as(score)
    head = torch.where(continuation, 0, position).cummax(1).values  # each token's first piece
    ones = ordinary.long()
    size = torch.zeros_like(ones).scatter_add(1, head, ones).gather(1, head)  # pieces of the token's word
    rest = size - 1 - (position - head)  # pieces of the word after this one

    word_score = score.gather(1, head).masked_fill(~ordinary, -torch.inf)
    order = word_score.argsort(dim=1, descending=True, stable=True)  # a word's pieces stay neighbours
    size, rest, candidate = size.gather(1, order), rest.gather(1, order), ordinary.gather(1, order)
    taken = torch.zeros_like(candidate)
    for _ in range(_WHOLE_WORD_ROUNDS):
        room = budget - taken.sum(1, keepdim=True)
        fits = candidate & ~taken & (size <= room)
        taken = taken | (fits & (fits.long().cumsum(1) + rest <= room))
    return torch.zeros_like(taken).scatter(1, order, taken)
