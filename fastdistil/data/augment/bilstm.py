"""The augmentation of Distilled BiLSTM (Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into
Simple Neural Networks", "Data Augmentation for Distillation").

For each word of an example X ~ U(0, 1) is drawn: if X < p_mask the word becomes the mask token; if
p_mask <= X < p_mask + p_pos it becomes a word of the same part of speech, drawn from the unigram distribution
of the words so tagged in the training texts. Then, with probability p_ng, only an n-gram of the result is
kept, n drawn from {1, ..., 5}. Of a pair, copies augment the first sentence, then the second, then both, in a
cycle, the sentence that is not augmented staying as it is.

Where the authors' code (castorini/d-bert, augment_data.py and augment_paired_data.py) and the paper differ:
- A copy in which every word is replaced is kept, as in the paper; the code drops it for single sentences.
- Pairs take their turns, as in the paper; the code draws which sentences to augment, both in one third.
- An n-gram may be the last one of the sentence, and is the whole sentence where that is shorter than n: the
  code never draws the last, and there stops augmenting the example, or keeps all of it.
- Copies equal to any earlier copy or to a training example are dropped over the whole corpus, as in the
  code; most of those are n-grams.
Words are told apart as in the code, by NLTK's Treebank tokenizer. The tagger is TextBlob's for English, with
the Penn Treebank's tags; the code's, NLTK's perceptron, needs a download.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdistil.data.augment.words import replace_words
from fastdistil.data.noise import noise_bits, uniform

# Independent uses of the same (seed, example, sentence, word or 0, copy).
_KIND, _WORD, _CUT, _SIZE, _START = 31, 32, 33, 34, 35
_MAX_NGRAM = 5
# Examples at a time: what is drawn for each word and copy stays within some hundred megabytes for documents.
_CHUNK = 1024


def bilstm_augment(
    texts: Sequence[tuple[str, ...]],
    *,
    mask_token: str,
    copies: int,
    mask_probability: float = 0.1,
    pos_probability: float = 0.1,
    ngram_probability: float = 0.25,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[tuple[str, ...]]]:
    """For each example its copies, without the example itself; at most `copies`, as equal ones are dropped.

    What is drawn for an example depends on the seed and its index alone, and its first n copies are drawn the
    same whatever `copies` is. Of equal copies the earliest is kept. What is not replaced stays as it is
    written.

    Args:
        texts: one or more English sentences an example, as many in each. With more than two, copies
            augment each in turn, then all.
        mask_token: of the student's and the teacher's tokenizer.
        copies: n_iter, of an example: 20 for single sentences and 10 for pairs in the paper.
        mask_probability: p_mask.
        pos_probability: p_pos.
        ngram_probability: p_ng, of each augmented sentence.
        on_progress: called with the examples done and their number.

    Raises:
        ValueError: a number out of its range.
    """
    if copies < 1:
        raise ValueError(f"copies must be >= 1, got {copies}")
    shares = (mask_probability, pos_probability, ngram_probability)
    if min(shares) < 0 or mask_probability + pos_probability > 1 or ngram_probability > 1:
        raise ValueError(
            "mask_probability + pos_probability and ngram_probability must be in [0, 1], "
            f"got {mask_probability}, {pos_probability}, {ngram_probability}"
        )
    augmenter = _Augmenter(_Corpus.of(texts), mask_token, copies, *shares, seed)
    seen = set(texts)
    result: list[list[tuple[str, ...]]] = []
    for first in range(0, len(texts), _CHUNK):
        chunk = range(first, min(first + _CHUNK, len(texts)))
        for made in augmenter(chunk):
            result.append(kept := [])
            for candidate in made:
                if candidate not in seen:
                    seen.add(candidate)
                    kept.append(candidate)
        if on_progress is not None:
            on_progress(len(result), len(texts))
    return result


@dataclass(frozen=True)
class _Corpus:
    """The sentences of all examples one after the other, and their words one after the other."""

    texts: Sequence[tuple[str, ...]]
    fields: int  # F sentences an example
    spans: list[list[tuple[int, int]]]  # characters [start, end) of each word of each sentence
    first: np.ndarray  # (S + 1,) the first word of each sentence
    tag: np.ndarray  # (W,) part of speech of each word, a number
    pool: list[str]  # W words, those of one tag together
    pool_first: np.ndarray  # (T + 1,) the first word of each tag in `pool`

    @classmethod
    def of(cls, texts: Sequence[tuple[str, ...]]) -> _Corpus:
        from nltk.tokenize import NLTKWordTokenizer
        from textblob.taggers import PatternTagger

        tokenizer, tagger = NLTKWordTokenizer(), PatternTagger()
        known: dict[str, tuple[list[tuple[int, int]], list[str], list[str]]] = {}
        spans, words, tags = [], [], []
        for text in itertools.chain.from_iterable(texts):
            if text not in known:
                places = list(tokenizer.span_tokenize(text))
                own = [text[start:end] for start, end in places]
                tagged = tagger.tag(" ".join(own), tokenize=False) if own else []
                assert len(tagged) == len(own), f"{len(tagged)} tags for {len(own)} words of {text!r}"
                known[text] = places, own, [tag for _, tag in tagged]
            places, own, own_tags = known[text]
            spans.append(places)
            words += own
            tags += own_tags
        names, tag = np.unique(np.array(tags, dtype=str), return_inverse=True)
        order = tag.argsort(kind="stable")
        return cls(
            texts,
            len(texts[0]) if texts else 1,
            spans,
            np.cumsum([0, *map(len, spans)]),
            tag,
            [words[i] for i in order],
            np.searchsorted(tag[order], np.arange(len(names) + 1)),
        )


@dataclass(frozen=True)
class _Augmenter:
    """Draws copies. Numbers are hashes of (seed, example, sentence of the example, word, copy)."""

    corpus: _Corpus
    mask_token: str
    copies: int
    mask_share: float
    pos_share: float
    ngram_share: float
    seed: int

    def __call__(self, examples: range) -> list[list[tuple[str, ...]]]:
        """For each of the `examples` all its copies."""
        corpus, fields = self.corpus, self.corpus.fields
        sentences = np.arange(examples.start * fields, examples.stop * fields)
        replaced = self._replace(sentences)
        kept = self._cut(sentences)
        result: list[list[tuple[str, ...]]] = []
        for row, example in enumerate(examples):
            result.append(made := [])
            for copy in range(self.copies):
                texts = list(corpus.texts[example])
                for field, text in enumerate(texts):
                    at = row * fields + field
                    start, end = kept[at][copy]
                    changes = [change for change in replaced[at][copy] if start <= change[0] < end]
                    spans = corpus.spans[sentences[at]]
                    whole = end - start == len(spans)
                    window = (0, len(text)) if whole else (spans[start][0], spans[end - 1][1])
                    texts[field] = replace_words(text, spans, changes, start=window[0], end=window[1])
                made.append(tuple(texts))
        return result

    def _replace(self, sentences: np.ndarray) -> list[list[list[tuple[int, str]]]]:
        """For each sentence and copy (word of the sentence, what takes its place), in ascending order."""
        corpus = self.corpus
        first, end = corpus.first[sentences[0]], corpus.first[sentences[-1] + 1]
        owner = np.repeat(sentences, np.diff(corpus.first)[sentences])  # (W,) the sentence of each word
        word = np.arange(first, end) - corpus.first[owner]
        tag = corpus.tag[first:end]

        copy = np.arange(self.copies)
        kind = uniform(self._noise(_KIND, owner[:, None], word[:, None], copy)).numpy()  # (W, N)
        hit = (kind < self.mask_share + self.pos_share) & self._augmented(owner[:, None], copy)
        rows, columns = hit.nonzero()
        begin, stop = corpus.pool_first[tag[rows]], corpus.pool_first[tag[rows] + 1]
        choice = begin + self._below(_WORD, owner[rows], word[rows], columns, stop - begin)
        choice[kind[rows, columns] < self.mask_share] = -1

        replaced: list[list[list[tuple[int, str]]]] = [[[] for _ in copy] for _ in sentences]
        where = (owner[rows] - sentences[0]).tolist(), columns.tolist()
        for row, column, at, chosen in zip(*where, word[rows].tolist(), choice.tolist(), strict=True):
            replaced[row][column].append((at, self.mask_token if chosen < 0 else corpus.pool[chosen]))
        return replaced

    def _cut(self, sentences: np.ndarray) -> list[list[tuple[int, int]]]:
        """For each sentence and copy the words [start, end) that are kept."""
        length = np.diff(self.corpus.first)[sentences][:, None]  # (S, 1)
        where = sentences[:, None], np.zeros_like(length), np.arange(self.copies)
        cut = uniform(self._noise(_CUT, *where)).numpy() < self.ngram_share  # (S, N)
        cut &= self._augmented(sentences[:, None], where[2])
        size = 1 + self._below(_SIZE, *where, np.int64(_MAX_NGRAM))
        size = np.where(cut, np.minimum(size, length), length)
        start = self._below(_START, *where, length - size + 1)
        return [
            list(zip(starts, ends, strict=True))
            for starts, ends in zip(start.tolist(), (start + size).tolist(), strict=True)
        ]

    def _augmented(self, sentences: np.ndarray, copy: np.ndarray) -> np.ndarray:
        """Whether it is the sentence's turn in the copy: that of each sentence alone, then that of all."""
        fields = self.corpus.fields
        turn = copy % (fields + 1)
        return (turn == sentences % fields) | (turn == fields)

    def _noise(self, stream: int, sentences: np.ndarray, word: np.ndarray, copy: np.ndarray) -> torch.Tensor:
        counters = (*np.divmod(sentences, self.corpus.fields), word, copy)
        return noise_bits(self.seed, stream, *map(torch.from_numpy, counters))

    def _below(
        self,
        stream: int,
        sentences: np.ndarray,
        word: np.ndarray,
        copy: np.ndarray,
        bound: np.ndarray | np.int64,
    ) -> np.ndarray:
        """int64 in [0, bound), for a `bound` for each or for all."""
        bits = self._noise(stream, sentences, word, copy).numpy().view(np.uint64)
        return (bits % bound.astype(np.uint64)).astype(np.int64)
