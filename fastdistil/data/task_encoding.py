"""Token ids of a task's examples, one flat array for all of them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from fastdistil.data.task_windows import Windows, question_windows
from fastdistil.data.tasks import Examples, Task
from fastdistil.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

# Texts that are encoded at once: few enough that their Python objects are small beside the result.
_CHUNK = 8192


@dataclass(frozen=True)
class TeacherAnswers:
    """What a teacher says of M of a task's examples of C sequences each, known beforehand.

    Attributes:
        rows: (M, num_labels + C * K * D) float32, a row an example: the logits of its classes, options or
            one score, then of each of its sequences the outputs of K layers at the first token.
        layers: those K layers, from 0.
        examples: (M,) int64, which examples, in ascending order.
    """

    rows: np.ndarray
    layers: tuple[int, ...]
    examples: np.ndarray


@dataclass(frozen=True)
class EncodedTask:
    """N examples of a task as S = N * C sequences, C the number of options of a choice task, else 1.

    An example of a span task is a window of a context; a long context has several.

    Attributes:
        task: whose examples they are.
        input_ids: (T,) int32, the sequences one after another.
        token_type_ids: (T,) int8, 0 in the first segment and 1 in the second; 0 everywhere where the
            tokenizer has no segments.
        offsets: (S + 1,) int64, where each sequence begins.
        labels: (N,) int64 or float32, as of `Examples`; (N, 2) int64 for spans, as of `question_windows`.
        pad_id: of the tokenizer.
        max_length: the sequences have at most so many tokens.
        truncated: how many sequences had more; for spans, how many questions were cut.
        windows: of a span task.
        answers: of a teacher, where they are known beforehand.
    """

    task: Task
    input_ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    pad_id: int
    max_length: int
    truncated: int
    windows: Windows | None = None
    answers: TeacherAnswers | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_choices(self) -> int:
        return self.task.num_labels if self.task.kind == "choice" else 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int64 tokens of each example, of the longest option of a choice."""
        return np.diff(self.offsets).reshape(len(self), self.num_choices).max(axis=1)

    @cached_property
    def sha256(self) -> str:
        """Of everything that training reads."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.token_type_ids, self.offsets, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def encode(
    task: Task, examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedTask:
    """Encodes the examples with the tokenizer's special tokens, on all cores.

    A pair that is too long loses tokens of its longer text first. A choice becomes one pair an option: the
    context, and the question with the option after it or in its blank "_" (as transformers' code for RACE
    has it). A span's context is cut into windows. A text that spells a special token, such as "[MASK]", gets
    it. The work is done by a copy of the tokenizer's backend, so that the caller's own keeps its truncation.

    Raises:
        UserError: no example, not a fast tokenizer, no padding token, or no room for text in `max_length`.
    """
    if len(examples) == 0:
        raise UserError(f"task {task.name!r} has no examples")
    special = tokenizer.num_special_tokens_to_add(pair=len(task.columns) > 1)
    if max_length < special + 2:
        raise UserError(f"max_length must be >= {special + 2}, special tokens included, got {max_length}")
    backend = _backend(tokenizer)
    flat = _Flat(segments="token_type_ids" in tokenizer.model_input_names)
    labels, windows = examples.labels, None
    if task.kind == "span":
        encodings, labels, windows, truncated = question_windows(backend, examples, max_length - special)
        flat.add(encodings)
    else:
        backend.enable_truncation(max_length, strategy="longest_first")
        texts, truncated = _sequences(task, examples), 0
        for start in range(0, len(texts), _CHUNK):
            encodings = backend.encode_batch_fast(texts[start : start + _CHUNK])
            flat.add(encodings)
            truncated += sum(bool(encoding.overflowing) for encoding in encodings)
    ids, types, offsets = flat.arrays()
    return EncodedTask(
        task, ids, types, offsets, labels, tokenizer.pad_token_id, max_length, truncated, windows
    )


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {name!r} is not a fast tokenizer: it needs a tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer {name!r} has no padding token")
    backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    return backend


def _sequences(task: Task, examples: Examples) -> Sequence[str | tuple[str, ...]]:
    if task.kind == "choice":
        return [
            (passage, question.replace("_", option) if "_" in question else f"{question} {option}")
            for passage, question, *options in examples.texts
            for option in options
        ]
    if len(task.columns) == 1:
        return [text for (text,) in examples.texts]
    return examples.texts


class _Flat:
    """Encodings, added in parts, as flat arrays."""

    def __init__(self, segments: bool) -> None:
        self._segments = segments
        self._ids: list[np.ndarray] = []
        self._types: list[np.ndarray] = []
        self._lengths: list[int] = []

    def add(self, encodings: list[Encoding]) -> None:
        lengths = [len(encoding) for encoding in encodings]
        size = sum(lengths)
        self._lengths += lengths
        self._ids.append(_array((encoding.ids for encoding in encodings), np.int32, size))
        if self._segments:
            self._types.append(_array((encoding.type_ids for encoding in encodings), np.int8, size))
        else:
            self._types.append(np.zeros(size, np.int8))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """input_ids (T,), token_type_ids (T,) and offsets (S + 1,)."""
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        return np.concatenate(self._ids), np.concatenate(self._types), offsets


def _array(parts: Iterable[list[int]], dtype: type, size: int) -> np.ndarray:
    return np.fromiter(chain.from_iterable(parts), dtype, size)
