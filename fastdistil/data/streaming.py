"""Batches of a corpus that is tokenised while it is read: nothing is prepared, nothing is stored.

The corpus is read in blocks of some megabytes. A block's documents are tokenised, packed as in
`token_store`, and its sequences shuffled; the sequence that the block leaves open is finished by the next
one. At its end the corpus is read again, as the next epoch. Every rank reads all of it and keeps its share
of each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdistil.data.batches import Share, TokenBatch, require_same_data
from fastdistil.data.corpus import Corpus
from fastdistil.data.noise import permutation
from fastdistil.data.token_store import Packer
from fastdistil.data.tokenizer import DocumentEncoder, TokenizerFacts
from fastdistil.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_BLOCK = 4 << 20


@dataclass(frozen=True)
class _Start:
    """Where a block begins: enough to read it again."""

    epoch: int
    position: dict[str, Any] | None  # Reader.position(); None at the corpus's start
    open_sequence: list[int]  # what the block before has left; [] at the run's start
    first_sample: int  # the number of the block's first sequence, counted from the run's start


@dataclass(frozen=True)
class _Block:
    """Packed sequences, in the order in which they are read."""

    start: _Start
    input_ids: np.ndarray  # (n, L) int64
    lengths: np.ndarray  # (n,)
    sequence_index: np.ndarray  # (n,)

    @property
    def end(self) -> int:
        return self.start.first_sample + len(self.lengths)


class StreamBatches:
    """Batches of `micro_batches(0)`, `micro_batches(1)`, ...: no step may be asked for after a later one.

    Args:
        corpus: read again and again.
        tokenizer: fast, with begin, end, padding and mask tokens.
        max_length: L, tokens a sequence.
        share: batch size, micro-batch size, rank and world size.
        seed: of the run; orders the sequences inside a block.
        characters_per_block: how much text is shuffled at once, and read again when a run is resumed.

    Raises:
        UserError: the corpus holds no text, or what reading it raises.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        share: Share,
        seed: int,
        characters_per_block: int = _CHARACTERS_PER_BLOCK,
    ) -> None:
        self._corpus = corpus
        self._facts = TokenizerFacts.from_tokenizer(tokenizer)
        self._encoder = DocumentEncoder(tokenizer)
        self._max_length = max_length
        self._share = share
        self._seed = seed
        self._characters_per_block = characters_per_block
        self._next_sample = 0
        self._seek(_Start(epoch=0, position=None, open_sequence=[], first_sample=0))

    def micro_batches(self, step: int) -> Iterator[TokenBatch]:
        self._drop_before(step * self._share.batch_size)
        self._next_sample = (step + 1) * self._share.batch_size
        for samples in self._share.micro_batches(step):
            yield self._batch(samples)

    def state_dict(self) -> dict[str, Any]:
        """The start of the block that holds the next step's first sample, or of one before it."""
        self._drop_before(self._next_sample)
        start = self._blocks[0].start if self._blocks else self._following
        return {"block": dict(vars(start)), "seed": self._seed, "batch_size": self._share.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError naming what differs from the run that saved the state."""
        require_same_data(state, {"seed": self._seed, "batch_size": self._share.batch_size})
        self._seek(_Start(**state["block"]))

    def _seek(self, start: _Start) -> None:
        self._blocks: list[_Block] = []
        self._following = start  # of the block after the last one of _blocks
        self._reader = self._corpus.read(start.position)

    def _drop_before(self, sample: int) -> None:
        self._blocks = [block for block in self._blocks if block.end > sample]

    def _batch(self, samples: np.ndarray) -> TokenBatch:
        while self._following.first_sample <= samples[-1]:
            self._blocks.append(self._read_block())
        rows = [
            (block, sample - block.start.first_sample)
            for sample in samples.tolist()
            for block in self._blocks
            if block.start.first_sample <= sample < block.end
        ]
        lengths = torch.tensor([block.lengths[row] for block, row in rows])
        return TokenBatch(
            input_ids=torch.from_numpy(np.stack([block.input_ids[row] for block, row in rows])),
            attention_mask=torch.arange(self._max_length) < lengths.unsqueeze(1),
            sequence_index=torch.tensor([block.sequence_index[row] for block, row in rows]),
            epoch=torch.tensor([block.start.epoch for block, _ in rows]),
        )

    def _read_block(self) -> _Block:
        """Reads one block of documents; it may hold no whole sequence if the corpus is short."""
        start = self._following
        documents, characters = [], 0
        for document in self._reader:
            documents.append(document)
            characters += len(document)
            if characters >= self._characters_per_block:
                break
        at_end = characters < self._characters_per_block
        packer = Packer(self._facts.begin_id, self._facts.end_id, self._max_length, list(start.open_sequence))
        encoded = self._encoder(documents)
        if at_end and start.position is None and not any(encoded):
            raise UserError(f"corpus {self._corpus.spec!r} holds no text")
        sequences = [sequence for tokens in encoded for sequence in packer.add(tokens)]
        if at_end:
            self._reader = self._corpus.read()
        self._following = _Start(
            epoch=start.epoch + at_end,
            position=None if at_end else self._reader.position(),
            open_sequence=packer.open_sequence,
            first_sample=start.first_sample + len(sequences),
        )
        input_ids = np.full((len(sequences), self._max_length), self._facts.pad_id, np.int64)
        for row, sequence in zip(input_ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        order = permutation(len(sequences), self._seed, start.first_sample).numpy()
        return _Block(
            start=start,
            input_ids=input_ids[order],
            lengths=np.array([len(sequence) for sequence in sequences], np.int64)[order],
            sequence_index=start.first_sample + order,
        )


def sample_token_counts(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, characters: int = 4 * _CHARACTERS_PER_BLOCK
) -> np.ndarray:
    """(V,) int64: how often each token occurs in the first `characters` of a corpus that is not prepared."""
    documents, seen = [], 0
    for document in corpus:
        documents.append(document)
        seen += len(document)
        if seen >= characters:
            break
    tokens = [np.array(ids, np.int64) for ids in DocumentEncoder(tokenizer)(documents)]
    if not tokens:
        raise UserError(f"corpus {corpus.spec!r} holds no text")
    return np.bincount(np.concatenate(tokens), minlength=TokenizerFacts.from_tokenizer(tokenizer).vocab_size)
