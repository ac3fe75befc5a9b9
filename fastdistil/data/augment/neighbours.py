"""The nearest words of a word, by the cosine of their vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fastdistil.data.augment.words import WordTokenizer, is_word
from fastdistil.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Scores held at a time: 64 MiB of float32.
_MAX_SCORES = 1 << 24
# As TinyBERT's code: of the words of a GloVe file, most frequent first, so many are read.
_MAX_WORDS = 100_000


class Neighbours:
    """Words with a vector each, any of which may stand for a word near to it.

    Args:
        words: M different ones.
        vectors: (M, D).
        vector_of: gives the vector (D,) of a word that is not among `words`, or None where it has none.
    """

    def __init__(
        self,
        words: Sequence[str],
        vectors: Tensor,
        vector_of: Callable[[str], Tensor | None] | None = None,
    ) -> None:
        self._words = list(words)
        self._index = {word: index for index, word in enumerate(self._words)}
        self._vectors = nn.functional.normalize(vectors.float(), dim=1)
        self._vector_of = vector_of

    @classmethod
    def from_file(cls, path: str | Path) -> Neighbours:
        """Vectors of a GloVe text file: a line holds a word and its D numbers, separated by single spaces.

        Of the first 100,000 lines, as in TinyBERT's code, the words of letters alone.

        Raises:
            UserError: no such file, a line that is not a word and D finite numbers, or no word.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"word vectors {str(path)!r}: there is no such file")
        words: dict[str, np.ndarray] = {}
        size = None
        with path.open("rb") as stream:
            for number, line in zip(range(1, _MAX_WORDS + 1), stream, strict=False):
                word, vector = _parse(f"word vectors {path}, line {number}", line, size)
                size = len(vector)
                if is_word(word):
                    words.setdefault(word, vector)
        if not words:
            raise UserError(f"word vectors {path}: the file has no word in it")
        return cls(list(words), torch.from_numpy(np.stack(list(words.values()))))

    @classmethod
    def from_embeddings(cls, weight: Tensor, tokenizer: PreTrainedTokenizerBase) -> Neighbours:
        """A model's own word embeddings `weight` (V, D): those of the tokens that are whole words.

        A word of several pieces has the mean of their embeddings.

        Raises:
            UserError: no token of the tokenizer is a whole word.
        """
        weight = weight.detach()
        splitter = WordTokenizer(tokenizer)
        words = splitter.whole_words()
        special = set(splitter.facts.special_ids)

        def mean_of_pieces(word: str) -> Tensor | None:
            (pieces,) = splitter.encode([word])
            return None if not pieces or special & set(pieces) else weight[pieces].float().mean(0)

        return cls(list(words), weight[list(words.values())], mean_of_pieces)

    def knows(self, word: str) -> bool:
        """Whether the word has a vector, as it is written or in lower case."""
        return self._vector(word) is not None

    def nearest(self, words: Sequence[str], count: int) -> list[list[str]]:
        """The at most `count` nearest other words of each word, the nearest first.

        A word that is missing as it is written is looked up in lower case; the neighbours of a word with a
        capital get one too. A word without a vector has none.
        """
        vectors = {word: vector for word in words if (vector := self._vector(word)) is not None}
        found: dict[str, list[str]] = {}
        if vectors:
            # These may be of any length, unlike the rows of the table: it changes no order.
            best = top_columns(torch.stack(list(vectors.values())), self._vectors, None, count + 1)
            for word, indices in zip(vectors, best, strict=True):
                own = word if word in self._index else word.lower()
                others = [other for i in indices if (other := self._words[i]) != own][:count]
                found[word] = (
                    [other.title() for other in others] if own != word and word.istitle() else others
                )
        return [found.get(word, []) for word in words]

    def _vector(self, word: str) -> Tensor | None:
        for spelling in (word, word.lower()):
            if spelling in self._index:
                return self._vectors[self._index[spelling]]
        return None if self._vector_of is None else self._vector_of(word)


def top_columns(rows: Tensor, table: Tensor, bias: Tensor | None, count: int) -> list[list[int]]:
    """For each row of `rows` (N, D) the `count` largest of `rows @ table.T + bias`, the largest first.

    At most C of them for a `table` (C, D). The (N, C) products are formed a block of rows at a time.
    """
    count = min(count, len(table))
    best: list[list[int]] = []
    for block in rows.split(max(1, _MAX_SCORES // len(table))):
        best += nn.functional.linear(block, table, bias).topk(count, dim=1).indices.tolist()
    return best


def _parse(where: str, line: bytes, size: int | None) -> tuple[str, np.ndarray]:
    """The word and its vector, of `size` numbers unless it is None."""
    try:
        text = line.decode().rstrip()
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None
    if size is None:
        size = text.count(" ")
    # From the right: the largest GloVe file has words with spaces in them.
    word, *numbers = text.rsplit(" ", size)
    if not word or not numbers or len(numbers) != size:
        raise UserError(f"{where}: not a word and {size or 'its'} numbers, separated by spaces")
    try:
        vector = np.array(numbers, dtype=np.float32)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not np.isfinite(vector).all():
        raise UserError(f"{where}: a number that is not finite")
    return word, vector
