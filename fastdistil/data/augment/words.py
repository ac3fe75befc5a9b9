"""The words of a text, where they stand in it, and other words put in their places."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdistil.data.tokenizer import TokenizerFacts
from fastdistil.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# English function words: replaced, they break the grammar and seldom change the label.
_FUNCTION_WORDS = (
    # articles, quantifiers, negation
    "a an the all any both each few more most other some such no nor not only own same",
    # pronouns
    "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her",
    "hers herself it its itself they them their theirs themselves this that these those",
    # auxiliaries
    "am is are was were be been being have has had having do does did doing can will should",
    # conjunctions and prepositions
    "and but if or because as until while than of at by for with about against between into through",
    "during before after above below to from up down in out on off over under",
    # adverbs
    "again further then once here there so too very just now",
    # what a contraction leaves when it is split at its apostrophe
    "s t d m o y ll re ve ma ain aren couldn didn doesn don hadn hasn haven isn mightn mustn needn shan",
    "shouldn wasn weren won wouldn",
)
STOP_WORDS = frozenset(word for words in _FUNCTION_WORDS for word in words.split())


@dataclass(frozen=True)
class SplitText:
    """A text, its tokens without special ones, and for each word its characters and its tokens."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]  # characters [start, end) of each word
    pieces: list[tuple[int, int]]  # tokens [first, end) of each word

    def word(self, index: int) -> str:
        start, end = self.spans[index]
        return self.text[start:end]

    def replaceable(self, max_tokens: int) -> list[int]:
        """The words of letters alone that are no stop words and lie within the first `max_tokens` tokens."""
        return [
            index
            for index, (_, end) in enumerate(self.pieces)
            if end <= max_tokens and is_word(word := self.word(index)) and word.lower() not in STOP_WORDS
        ]


class WordTokenizer:
    """A tokenizer's own division of texts into words, such as BERT's at spaces and punctuation.

    A text that spells "[MASK]" is text. Raises `UserError` for a tokenizer that is not fast or lacks a
    special token of a masked language model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.facts = TokenizerFacts.from_tokenizer(tokenizer)
        self._name = tokenizer.name_or_path
        self._backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def split(self, texts: Sequence[str]) -> list[SplitText]:
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [_split(text, e.ids, e.word_ids, e.offsets) for text, e in zip(texts, encodings, strict=True)]

    def normalize(self, word: str) -> str:
        """The word as the vocabulary spells it: in lower case and without accents for an uncased BERT."""
        normalizer = self._backend.normalizer
        return word if normalizer is None else normalizer.normalize_str(word).strip()

    def encode(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of words that stand inside a text."""
        spaced = [f" {word}" for word in words]
        return [e.ids for e in self._backend.encode_batch_fast(spaced, add_special_tokens=False)]

    def whole_words(self) -> dict[str, int]:
        """word -> id, of the tokens that are a whole word of letters.

        Each of these words, put between spaces or punctuation, is that one token again.

        Raises:
            UserError: there is none, or the tokenizer does not mark where words begin.
        """
        facts = self.facts
        if facts.continuation is None:
            raise UserError(
                f"tokenizer {self._name!r} does not mark whole words: augmentation needs WordPiece or "
                "byte-level BPE"
            )
        ordinary = set(self._backend.get_vocab().values()) - set(facts.special_ids)
        ids = [i for i in sorted(ordinary) if not facts.continuation[i]]
        words = [word.strip() for word in self._backend.decode_batch([[i] for i in ids])]
        found = {
            word: i
            for word, i, encoded in zip(words, ids, self.encode(words), strict=True)
            if is_word(word) and encoded == [i]
        }
        if not found:
            raise UserError(
                f"tokenizer {self._name!r} has no token that is a whole word: there is nothing to replace "
                "words with"
            )
        return found


def is_word(text: str) -> bool:
    """Letters alone: numbers, punctuation and what mixes them is neither replaced nor put in."""
    return text.isalpha()


def _split(
    text: str, ids: list[int], word_ids: list[int | None], offsets: list[tuple[int, int]]
) -> SplitText:
    spans: list[tuple[int, int]] = []
    pieces: list[tuple[int, int]] = []
    last: int | None = None
    for token, (word, (start, end)) in enumerate(zip(word_ids, offsets, strict=True)):
        if word == last:
            spans[-1] = (spans[-1][0], end)
            pieces[-1] = (pieces[-1][0], token + 1)
        else:
            # Byte-level BPE counts the space before a word as part of it.
            start += len(text[start:end]) - len(text[start:end].lstrip())
            spans.append((start, end))
            pieces.append((token, token + 1))
            last = word
    return SplitText(text, ids, spans, pieces)


def replace_words(
    text: str, spans: Sequence[tuple[int, int]], replaced: Iterable[tuple[int, str]], *, start: int, end: int
) -> str:
    """The characters [start, end) of `text`, with other words at the `spans` of some.

    Everything else stays as it is written. Where a word that is put in would run together with its
    neighbour, as "very" for the "n't" of "didn't", a space goes between them.

    Args:
        replaced: (index into `spans`, word), ascending, inside [start, end).
    """
    result, at = "", start
    for index, word in replaced:
        first, stop = spans[index]
        result = _append(_append(result, text[at:first]), word)
        at = stop
    return _append(result, text[at:end])


def _append(text: str, part: str) -> str:
    return f"{text} {part}" if text[-1:].isalnum() and part[:1].isalnum() else text + part
