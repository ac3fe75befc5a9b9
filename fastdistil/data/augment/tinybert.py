"""TinyBERT's data augmentation (Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language
Understanding", appendix A, Algorithm 1).

A copy of a sentence has each of its words replaced with probability p by one of K candidates, drawn evenly.
The candidates of a word that is a single token are what a masked language model finds most probable in its
place, those of other words their nearest neighbours among word vectors.

Where the authors' code (data_augmentation.py) and the paper differ:
- Each word is masked in the original sentence, as in the code, not in the copy with its earlier
  replacements: so a word has one set of candidates, whatever the copy.
- The model reads the masked sentence alone, as in the paper. In the code the unmasked sentence follows as the
  second segment, which keeps candidates nearer to the word; `show_original` does so.
- Words with anything but letters in them and stop words are never replaced, as in the code.
- Candidates are K whole words of letters other than the word itself. The code takes the K most probable
  tokens, drops the pieces of words among them, and may replace a word by itself.
- The code augments the first sentence of a pair, then the second while the first stays as its last copy.
  Here copies change the sentences of an example in turn, one a copy and the others as they were, and
  `copies` is the number for the example, the paper's N_a.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdistil.data.augment.masked_candidates import Gap, MaskedCandidates
from fastdistil.data.augment.neighbours import Neighbours
from fastdistil.data.augment.words import SplitText, WordTokenizer, replace_words
from fastdistil.data.noise import noise_bits, uniform
from fastdistil.errors import UserError
from fastdistil.models.load import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Independent uses of the same (seed, example, sentence, word, copy).
_REPLACE, _CHOOSE = 21, 22
# Examples at a time: enough for batches of one length, few enough to hold all that they are masked into.
_CHUNK = 2048


def tinybert_augment(
    texts: Sequence[tuple[str, ...]],
    *,
    model: Any | None,
    tokenizer: PreTrainedTokenizerBase,
    neighbours: Neighbours | None,
    copies: int,
    probability: float = 0.4,
    num_candidates: int = 15,
    show_original: bool = False,
    max_length: int = 128,
    max_tokens: int = 8192,
    seed: int,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[tuple[str, ...]]]:
    """For each example its copies, without the example itself; at most `copies`, as equal ones are dropped.

    The copies of an example depend on the seed, its index and its texts, not on the examples beside it (but
    for the rounding of the model's passes, which may exchange candidates of equal probability), and its
    first n copies are the same whatever `copies` is. What is not replaced stays as it is written.

    Candidates are computed for the words that some copy replaces, and each masked sentence is run once in
    a chunk of 2,048 examples.

    Args:
        texts: one or more sentences an example, as many in each.
        model: a `transformers` masked language model; None takes nearest neighbours for all words.
        tokenizer: the model's, or without one that of the task. It tells words apart.
        neighbours: for words of several tokens; None leaves them as they are.
        copies: N_a, of an example.
        probability: p_t, of replacing a word.
        num_candidates: K.
        show_original: let the model read the sentence unmasked too, for a little over twice the time.
        max_length: the model reads so many tokens of a sentence, special ones counted, or what it has
            positions for if that is less. Words beyond them stay.
        max_tokens: of a forward pass, padding counted.
        dtype: autocast of the forward passes; default the precision of the weights.
        on_progress: called with the examples done and their number.

    Raises:
        ValueError: a number out of its range, or neither a model nor neighbours.
        UserError: no candidate for any word: the tokenizer has no whole words, or the word vectors have none
            of the texts' words.
    """
    if copies < 1 or num_candidates < 1:
        raise ValueError(f"copies and num_candidates must be >= 1, got {copies} and {num_candidates}")
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be in (0, 1], got {probability}")
    if model is None and neighbours is None:
        raise ValueError("augmentation needs a masked language model, word vectors, or both")
    if not texts:
        return []
    splitter = WordTokenizer(tokenizer)
    masked = None
    window = max_length - 2
    if model is not None:
        room = max_positions(model)
        window = min(window, (room - 3) // 2 if show_original else room - 2)
        words = splitter.whole_words()
        masked = MaskedCandidates(model, splitter, words, max_tokens=max_tokens, dtype=dtype)
    if neighbours is not None and not any(map(neighbours.knows, _words(texts, splitter, window))):
        raise UserError("the word vectors have none of the words of the texts: are they of another language?")
    candidates = _Candidates(splitter, masked, neighbours, num_candidates, window, show_original)

    result: list[list[tuple[str, ...]]] = []
    training = model is not None and model.training
    try:
        if model is not None:
            model.eval()
        for first in range(0, len(texts), _CHUNK):
            chunk = texts[first : first + _CHUNK]
            result += _augment(chunk, first, splitter, candidates, copies, probability, seed)
            if on_progress is not None:
                on_progress(len(result), len(texts))
    finally:
        if model is not None:
            model.train(training)
    return result


def _words(texts: Sequence[tuple[str, ...]], splitter: WordTokenizer, window: int) -> Iterator[str]:
    """The words that may be replaced, a chunk of examples split at a time."""
    for first in range(0, len(texts), _CHUNK):
        for split in splitter.split([text for example in texts[first : first + _CHUNK] for text in example]):
            yield from (splitter.normalize(split.word(word)) for word in split.replaceable(window))


def _augment(
    texts: Sequence[tuple[str, ...]],
    first: int,
    splitter: WordTokenizer,
    candidates: _Candidates,
    copies: int,
    probability: float,
    seed: int,
) -> list[list[tuple[str, ...]]]:
    """The copies of examples `first`, `first + 1`, ..."""
    fields = len(texts[0])
    splits = splitter.split([text for example in texts for text in example])
    places = [(at, word) for at, split in enumerate(splits) for word in split.replaceable(candidates.window)]
    at, word = np.array(places, dtype=np.int64).reshape(-1, 2).T
    example, field = np.divmod(at, fields)

    def noise(stream: int, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        counters = (first + example[rows], field[rows], word[rows], columns)
        return noise_bits(seed, stream, *map(torch.from_numpy, counters))

    every, copy = np.arange(len(places))[:, None], np.arange(copies)[None]
    drawn = uniform(noise(_REPLACE, every, copy)).numpy() < probability
    drawn &= copy % fields == field[:, None]

    found: list[list[str]] = [[] for _ in places]
    needed = np.flatnonzero(drawn.any(1)).tolist()
    needed_places = [(splits[places[row][0]], places[row][1]) for row in needed]
    for row, choices in zip(needed, candidates(needed_places), strict=True):
        found[row] = choices
    number = np.array([len(choices) for choices in found], dtype=np.uint64)

    rows, columns = (drawn & (number[:, None] > 0)).nonzero()
    choice = noise(_CHOOSE, rows, columns).numpy().view(np.uint64) % number[rows]
    replaced: list[list[list[tuple[int, str]]]] = [[[] for _ in range(copies)] for _ in texts]
    where = rows.tolist(), example[rows].tolist(), columns.tolist()
    for row, owner, column, chosen in zip(*where, choice.tolist(), strict=True):
        # Rows are in the order of the text, as `replace_words` wants a copy's words.
        replaced[owner][column].append((places[row][1], found[row][chosen]))

    result = []
    for index, original in enumerate(texts):
        # A dict keeps the order in which copies are first seen.
        seen = {original: None}
        for column, changes in enumerate(replaced[index]):
            changed = column % fields
            split = splits[index * fields + changed]
            text = replace_words(split.text, split.spans, changes, start=0, end=len(split.text))
            seen[(*original[:changed], text, *original[changed + 1 :])] = None
        del seen[original]
        result.append(list(seen))
    return result


class _Candidates:
    """The words that may stand for words of texts."""

    def __init__(
        self,
        splitter: WordTokenizer,
        masked: MaskedCandidates | None,
        neighbours: Neighbours | None,
        count: int,
        window: int,
        show_original: bool,
    ) -> None:
        self.window = window  # tokens of a text that are read
        self._splitter = splitter
        self._masked = masked
        self._neighbours = neighbours
        self._count = count
        self._show_original = show_original
        self._near: dict[str, list[str]] = {}

    def __call__(self, places: list[tuple[SplitText, int]]) -> list[list[str]]:
        """The candidates of each (text, word of the text); none where nothing is known."""
        words = [self._splitter.normalize(split.word(word)) for split, word in places]
        gaps = [self._gap(split, word) for split, word in places]
        predicted = self._predict(list(dict.fromkeys(gap for gap in gaps if gap is not None)))
        self._look_up(dict.fromkeys(word for word, gap in zip(words, gaps, strict=True) if gap is None))
        return [
            self._near.get(word, []) if gap is None else self._others(predicted[gap], word)
            for word, gap in zip(words, gaps, strict=True)
        ]

    def _gap(self, split: SplitText, word: int) -> Gap | None:
        """What the masked language model reads, None for a word that it is not asked for."""
        first, end = split.pieces[word]
        if self._masked is None or end - first > 1:
            return None
        facts = self._splitter.facts
        ids = split.ids[: self.window]
        original = (facts.end_id, *ids) if self._show_original else ()
        return (*ids[:first], facts.mask_id, *ids[end:], *original)

    def _predict(self, gaps: list[Gap]) -> dict[Gap, list[str]]:
        if self._masked is None:
            return {}
        # One more: sentences that differ in the masked word alone are one gap, and it may be among the best.
        return dict(zip(gaps, self._masked(gaps, self._count + 1), strict=True))

    def _look_up(self, words: Iterable[str]) -> None:
        if self._neighbours is not None:
            missing = [word for word in words if word not in self._near]
            self._near.update(zip(missing, self._neighbours.nearest(missing, self._count), strict=True))

    def _others(self, best: list[str], word: str) -> list[str]:
        # By name, not by probability: the draw is even, and no copy hangs on the order of two that are close.
        return sorted([other for other in best if other != word][: self._count])
