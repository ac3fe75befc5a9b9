"""Questions about a context that may be longer than the model reads: windows of it, as for SQuAD.

The context is cut into windows that overlap by 128 tokens, as by transformers' run_qa script, and a question
into 64 tokens, as by BERT's own (Devlin et al. 2019, section 4.2 and the code to it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastdistil.data.tasks import Examples

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_OVERLAP = 128
_QUESTION_LENGTH = 64
_CHUNK = 512  # contexts that are encoded at once: their offsets are Python tuples


@dataclass(frozen=True)
class Windows:
    """Where the T tokens of N windows stand in the E contexts that were cut into them.

    Attributes:
        example: (N,) int64, which example each window is of.
        characters: (T, 2) int32, each token's first character in the context and the one after its last; -1
            for special tokens and those of the question.
        contexts: E texts.
        answers: E tuples of the answers that count as right.
    """

    example: np.ndarray
    characters: np.ndarray
    contexts: list[str]
    answers: list[tuple[str, ...]]


def question_windows(
    backend: Tokenizer, examples: Examples, room: int
) -> tuple[list[Encoding], np.ndarray, Windows, int]:
    """Encodings of the windows, their labels, where they stand, and how many questions were cut.

    A label is the first and the last token of the example's first answer, (N, 2) int64. Both are 0, which is
    the [CLS] token, in a window that does not hold all of the answer.

    Args:
        backend: its truncation is changed.
        room: tokens of a window without the special ones.
    """
    longest = min(_QUESTION_LENGTH, room // 2)
    questions, cut = _cut(backend, [question.lstrip() for question, _ in examples.texts], longest)
    special = backend.num_special_tokens_to_add(is_pair=True)
    overlap = min(_OVERLAP, (room - longest) // 2)
    backend.enable_truncation(room + special, stride=overlap, strategy="only_second")

    assert examples.answers is not None
    encodings, owners, characters, labels = [], [], [], []
    for example, encoding in _windows(backend, questions, [context for _, context in examples.texts]):
        offsets = np.array(encoding.offsets, np.int32)
        offsets[np.array([segment != 1 for segment in encoding.sequence_ids])] = -1
        encodings.append(encoding)
        owners.append(example)
        characters.append(offsets)
        labels.append(_token_span(offsets, *examples.labels[example].tolist()))
    windows = Windows(
        np.array(owners),
        np.concatenate(characters),
        [context for _, context in examples.texts],
        examples.answers,
    )
    return encodings, np.array(labels, dtype=np.int64), windows, cut


def _windows(backend: Tokenizer, questions: list[str], contexts: list[str]) -> Iterator[tuple[int, Encoding]]:
    for start in range(0, len(questions), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        pairs = list(zip(questions[chunk], contexts[chunk], strict=True))
        for example, encoding in enumerate(backend.encode_batch(pairs), start):
            for window in (encoding, *encoding.overflowing):
                yield example, window


def _cut(backend: Tokenizer, questions: list[str], longest: int) -> tuple[list[str], int]:
    """The questions, each ending with its token number `longest`, and how many had more."""
    backend.no_truncation()
    encodings = backend.encode_batch(questions, add_special_tokens=False)
    cut = [
        question[: encoding.offsets[longest - 1][1]] if len(encoding) > longest else question
        for question, encoding in zip(questions, encodings, strict=True)
    ]
    return cut, sum(len(encoding) > longest for encoding in encodings)


def _token_span(characters: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """The tokens of the window that hold the context's characters [start, end), (0, 0) if it has not all."""
    (inside,) = np.nonzero(characters[:, 0] >= 0)
    if len(inside) == 0 or start < characters[inside[0], 0] or end > characters[inside[-1], 1]:
        return 0, 0
    first = np.searchsorted(characters[inside, 0], start, side="right") - 1
    last = np.searchsorted(characters[inside, 1], end, side="left")
    return int(inside[first]), int(inside[last])
