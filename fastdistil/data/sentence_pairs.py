"""BERT's pretraining sequences: two segments, of which the second follows the first or is a random one.

    [CLS] sentences of a document [SEP] the sentences that follow them [SEP]                  0
    [CLS] sentences of a document [SEP] sentences from somewhere in another document [SEP]    1

Devlin et al. 2019, section 3.1 (task 2) and appendix A.2, drawn as google-research/bert does in
create_pretraining_data.py. Whole sentences of a document are collected until they fill a sequence, or, one
time in ten, a random shorter length. A random number of them, at least one, is the first segment. The second
is the rest of them; or, half of the time, what begins with a random sentence of another document and fills
the same length, and then the rest is put back and opens the next pair. So each sentence of a document is in
one first segment, or follows in one second segment. A pair that is too long loses tokens one by one, at the
front or the back of the longer segment.

Where we differ:
- The paper has 50 % random second segments. The script also gives one to a sentence that is collected alone,
  mostly the last of its document, and ends with 53 % on Wikipedia's articles and with 70 % where each of
  their paragraphs is a document. Here every other such sentence is made up for by a pair that would have been
  random and is not, as long as there are pairs to do so.
- The script decides on a shorter length once for all pairs of a document, here for each pair: one in ten is
  short however long the documents are.
- The script writes each document ten times, with other pairs and other masks. Here the pairs are drawn once,
  and the masks anew in each epoch (`data.masking`).
- Documents are dealt to up to a hundred groups, and "another document" is one of the same group, so that
  whole groups can be held out whose text no training pair contains (`TokenStore.split`).
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

import numpy as np

from fastdistil.data.corpus import Corpus
from fastdistil.data.noise import permutation
from fastdistil.data.sentences import read_documents
from fastdistil.data.token_store import PAIR, TokenStore, open_or_build, write_store
from fastdistil.data.tokenizer import DocumentEncoder, TokenizerFacts
from fastdistil.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 1  # of the rules for sentences and pairs: part of a cached store's identity
_SENTENCES_PER_BATCH = 8192
_MAX_GROUPS = 100
_DOCUMENTS_PER_GROUP = 8  # at least
_GROUP_SEED = 0  # the same groups, and so the same held-out documents, for every seed


@dataclass(frozen=True)
class TokenisedDocuments:
    """Documents of sentences of tokens, in three arrays.

    Attributes:
        tokens: (T,) of all documents, end to end.
        sentences: (S + 1,) where in `tokens` each sentence begins, and T.
        documents: (D + 1,) where in `sentences` each document begins, and S.
    """

    tokens: np.ndarray
    sentences: array[int]
    documents: array[int]

    def __len__(self) -> int:
        return len(self.documents) - 1

    def of(self, sentences: range) -> np.ndarray:
        return self.tokens[self.sentences[sentences.start] : self.sentences[sentences.stop]]

    def num_tokens(self, begin: int, end: int) -> int:
        return self.sentences[end] - self.sentences[begin]

    def fill(self, begin: int, stop: int, target: int) -> int:
        """The end of the fewest sentences from `begin` on, at least one, that have `target` tokens; at most
        `stop`."""
        return bisect_left(self.sentences, self.sentences[begin] + target, begin + 1, stop)


@dataclass(frozen=True)
class Pair:
    """Two segments as ranges of sentence numbers."""

    group: int
    first: range
    second: range
    is_random: bool


class _Groups:
    """Deals documents to groups of nearly equal numbers, and draws from them."""

    def __init__(self, num_documents: int) -> None:
        self._number = max(1, min(_MAX_GROUPS, num_documents // _DOCUMENTS_PER_GROUP))
        self._order = permutation(num_documents, _GROUP_SEED, 0).numpy()
        self._rank = np.argsort(self._order)

    def of(self, document: int) -> int:
        return int(self._rank[document]) % self._number

    def another(self, document: int, rng: random.Random) -> int:
        """One of the other documents of the document's group."""
        ranks = range(self.of(document), len(self._order), self._number)
        own = ranks.index(int(self._rank[document]))
        drawn = rng.randrange(len(ranks) - 1)
        return int(self._order[ranks[drawn + (drawn >= own)]])


def draw_pairs(
    text: TokenisedDocuments, max_tokens: int, short_probability: float, rng: random.Random
) -> Iterator[Pair]:
    """The pairs of all documents, in the documents' order, as the module's docstring says.

    Args:
        text: at least two documents.
        max_tokens: what both segments should fill together; the last sentence of either may go beyond.
        short_probability: share of the pairs that fill a random number of tokens from 2 to `max_tokens`.
    """
    groups = _Groups(len(text))
    unpaid = 0  # random second segments of sentences without a successor, for which no other pair made up
    for document in range(len(text)):
        begin, stop = text.documents[document], text.documents[document + 1]
        while begin < stop:
            target = rng.randint(2, max_tokens) if rng.random() < short_probability else max_tokens
            end = text.fill(begin, stop, target)
            middle = begin + 1 if end == begin + 1 else rng.randint(begin + 1, end - 1)
            is_random = rng.random() < 0.5
            if middle == end:
                is_random = True
                unpaid += 1
            elif is_random and unpaid >= 2:
                is_random = False
                unpaid -= 2
            if is_random:
                other = groups.another(document, rng)
                last = text.documents[other + 1]
                start = rng.randrange(text.documents[other], last)
                second = range(start, text.fill(start, last, target - text.num_tokens(begin, middle)))
            else:
                second = range(middle, end)
            yield Pair(groups.of(document), range(begin, middle), second, is_random)
            begin = middle if is_random else end


def truncate_pair(
    first: np.ndarray, second: np.ndarray, max_tokens: int, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Takes tokens off the longer of the two, one by one at its front or its back with equal chances, until
    both together have `max_tokens`."""
    # One by one, the longer shrinks to what the other leaves or both to half, the first one to the larger.
    keep_first = max(max_tokens - len(second), (max_tokens + 1) // 2)
    keep_second = max(max_tokens - len(first), max_tokens // 2)
    return _cut(first, keep_first, rng), _cut(second, keep_second, rng)


def _cut(tokens: np.ndarray, keep: int, rng: random.Random) -> np.ndarray:
    excess = max(0, len(tokens) - keep)
    front = rng.getrandbits(excess).bit_count()  # of so many tosses of a coin
    return tokens[front : len(tokens) - (excess - front)]


def build_pair_store(
    documents: Corpus | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    max_length: int,
    *,
    seed: int,
    document_column: str | None = None,
    short_probability: float = 0.1,
    max_sequences: int | None = None,
) -> TokenStore:
    """Tokenises `documents`, draws the pairs and writes them into a new folder.

    While it works, the tokens of all documents lie in a temporary file beside `out_dir`.

    Args:
        documents, document_column: as of `read_documents`.
        tokenizer: a fast tokenizer with begin, end, padding and mask tokens.
        out_dir: must not exist, or be empty; it appears only when the store is whole.
        max_length: L, tokens a sequence, [CLS] and two [SEP] counted.
        seed: of the pairs.
        short_probability: share of the pairs that are shorter on purpose.
        max_sequences: stop after so many; no more documents are read than that needs.

    Raises:
        UserError: `max_length` below 5, no text, a single document, no document of two sentences, `out_dir`
            in use, or what reading the documents raises.
        RunError: the disk is full.
    """
    if max_length < 5:
        raise UserError(f"max_length of sentence pairs must be >= 5, got {max_length}")
    facts = TokenizerFacts.from_tokenizer(tokenizer)
    corpus = documents.spec if isinstance(documents, Corpus) else "documents"
    max_tokens = max_length - 3
    # A pair takes at most as many tokens from its document as fill it, and one more sentence.
    enough = None if max_sequences is None else 2 * max_sequences * max_length
    pairs = bytearray()

    def sequences() -> Iterator[list[int]]:
        rng = random.Random(seed)
        with TemporaryFile(dir=Path(out_dir).expanduser().parent) as file:
            sentences = _tokenised(read_documents(documents, document_column), DocumentEncoder(tokenizer))
            dtype = np.dtype(np.uint16 if facts.vocab_size <= 1 << 16 else np.uint32)
            sentence_starts, document_starts = _write_tokens(sentences, file, dtype, max_length, enough)
            _check(len(document_starts) - 1, len(sentence_starts) - 1, corpus)
            tokens = np.memmap(file, dtype, mode="r", shape=(sentence_starts[-1],))
            text = TokenisedDocuments(tokens, sentence_starts, document_starts)
            for pair in islice(draw_pairs(text, max_tokens, short_probability, rng), max_sequences):
                first, second = truncate_pair(text.of(pair.first), text.of(pair.second), max_tokens, rng)
                pairs.extend(np.array((len(first) + 2, pair.is_random, pair.group), PAIR).tobytes())
                yield [facts.begin_id, *first.tolist(), facts.end_id, *second.tolist(), facts.end_id]

    return write_store(out_dir, sequences(), facts, max_length, corpus, pairs)


def cached_pair_store(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    document_column: str | None = None,
    short_probability: float = 0.1,
    max_sequences: int | None = None,
    cache_dir: str | Path | None = None,
) -> TokenStore:
    """The store of pairs of this corpus, tokenizer and arguments: opened if it was built before, else built.

    Processes of one run must not build at once for nothing: let rank 0 call first. Raises as
    `build_pair_store`.
    """
    facts = TokenizerFacts.from_tokenizer(tokenizer)
    kind = ["pairs", _VERSION, corpus.fingerprint, document_column, facts.fingerprint]
    return open_or_build(
        [*kind, max_length, seed, short_probability, max_sequences],
        cache_dir,
        lambda path: build_pair_store(
            corpus,
            tokenizer,
            path,
            max_length,
            seed=seed,
            document_column=document_column,
            short_probability=short_probability,
            max_sequences=max_sequences,
        ),
    )


def _tokenised(documents: Iterable[list[str]], encoder: DocumentEncoder) -> Iterator[list[list[int]]]:
    """The tokens of each document's sentences, tokenised some thousand sentences at a time."""

    def encode(waiting: list[list[str]]) -> Iterator[list[list[int]]]:
        tokens = iter(encoder([sentence for document in waiting for sentence in document]))
        for document in waiting:
            yield [sentence for sentence in islice(tokens, len(document)) if sentence]

    waiting: list[list[str]] = []
    num_sentences = 0
    for document in documents:
        waiting.append(document)
        num_sentences += len(document)
        if num_sentences >= _SENTENCES_PER_BATCH:
            yield from encode(waiting)
            waiting, num_sentences = [], 0
    yield from encode(waiting)


def _write_tokens(
    documents: Iterable[list[list[int]]],
    file: IO[bytes],
    dtype: np.dtype,
    max_length: int,
    enough: int | None,
) -> tuple[array[int], array[int]]:
    """Where the sentences and the documents begin, as in `TokenisedDocuments`. Stops when there are `enough`
    tokens, no sentence counted as longer than `max_length`."""
    sentence_starts, document_starts = array("q", [0]), array("q", [0])
    usable = 0
    for document in documents:
        if not document:
            continue
        for sentence in document:
            file.write(np.array(sentence, dtype).tobytes())
            sentence_starts.append(sentence_starts[-1] + len(sentence))
            usable += min(len(sentence), max_length)
        document_starts.append(len(sentence_starts) - 1)
        if enough is not None and usable >= enough and len(document_starts) > 2:
            break
    file.flush()
    return sentence_starts, document_starts


def _check(num_documents: int, num_sentences: int, corpus: str) -> None:
    if num_documents == 0:
        raise UserError(f"corpus {corpus!r} holds no text")
    if num_documents == 1:
        what = "is a single document, and a random second segment comes from another one"
    elif num_documents == num_sentences:
        what = "has no document of two sentences, of which one could follow the other"
    else:
        return
    raise UserError(
        f"corpus {corpus!r} {what}: put empty lines between the documents of a text file, or name the "
        "document column of parquet or JSON lines"
    )
