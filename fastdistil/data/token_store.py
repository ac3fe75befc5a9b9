"""A tokenised corpus on disk: fixed-length sequences in one memory-mapped array.

Packing. Documents are laid end to end, each followed by the end token, and cut into sequences of
`max_length`:

    [CLS] document 1 [SEP] document 2 [SEP] document 3, first part [SEP]
    [CLS] document 3, second part [SEP] document 4 [SEP] ...

Every sequence begins with [CLS] and ends with [SEP] (the tokenizer's own: <s> and </s> for RoBERTa). A
document that does not fit goes on in the next sequence, so no token is dropped. One place that only another
[SEP] could fill is padded, as is the last sequence.

On disk, a folder of `input_ids.bin` (n, max_length) in uint16 or uint32, `lengths.npy` (n,),
`token_counts.npy` (V,) and `meta.json`, which is written last, into a temporary folder that is then
renamed: a folder of the final name is whole, and its checksums are verified when it is opened. A store of
sentence pairs (`data.sentence_pairs`) has `pairs.npy` (n,) besides.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdistil.data.corpus import Corpus
from fastdistil.data.noise import permutation
from fastdistil.data.tokenizer import DocumentEncoder, TokenizerFacts
from fastdistil.errors import RunError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_DOCUMENTS_PER_BATCH = 1024
_SPLIT_SEED = 0  # the same held-out sequences for every seed of a run

# What a store of sentence pairs holds of each.
PAIR = np.dtype(
    [
        ("first_length", np.int32),  # tokens of the first segment, [CLS] and its [SEP] counted
        ("next_sentence", np.int8),  # 0: the second segment follows the first; 1: it is a random one
        ("group", np.int16),  # the second segment of a pair comes from documents of the pair's own group
    ]
)


class Packer:
    """Cuts a stream of documents into sequences as the module's docstring says.

    `open_sequence` is the unfinished one: with it and the position in the corpus, packing goes on exactly.
    """

    def __init__(
        self, begin_id: int, end_id: int, max_length: int, open_sequence: list[int] | None = None
    ) -> None:
        if max_length < 3:
            raise UserError(f"max_length must be >= 3, got {max_length}")
        self._begin_id = begin_id
        self._end_id = end_id
        self._max_length = max_length
        self.open_sequence = open_sequence or [begin_id]

    def add(self, document: list[int]) -> list[list[int]]:
        """The sequences that this document completes."""
        finished = []
        start = 0
        while start < len(document):
            room = self._max_length - 1 - len(self.open_sequence)
            if room <= 0:
                finished.append(self.open_sequence)
                self.open_sequence = [self._begin_id]
                continue
            self.open_sequence += document[start : start + room]
            self.open_sequence.append(self._end_id)
            start += room
        return finished

    def flush(self) -> list[list[int]]:
        """The last, short sequence, if it holds anything."""
        last, self.open_sequence = self.open_sequence, [self._begin_id]
        return [last] if len(last) > 1 else []


def packed_sequences(
    documents: Iterable[str],
    encoder: DocumentEncoder,
    packer: Packer,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[int]]:
    """The sequences of the documents, tokenised in batches; after each, on_progress(documents, sequences)."""
    iterator = iter(documents)
    num_documents = num_sequences = 0
    while batch := list(islice(iterator, _DOCUMENTS_PER_BATCH)):
        for tokens in encoder(batch):
            finished = packer.add(tokens)
            num_sequences += len(finished)
            yield from finished
        num_documents += len(batch)
        if on_progress is not None:
            on_progress(num_documents, num_sequences)
    yield from packer.flush()


@dataclass(frozen=True)
class StoreMeta:
    """meta.json."""

    format: int
    corpus: str
    tokenizer: str  # TokenizerFacts.fingerprint
    num_sequences: int
    max_length: int
    vocab_size: int
    pad_id: int
    dtype: str
    num_tokens: int  # without padding
    sha256: dict[str, str]


@dataclass(frozen=True)
class TokenStore:
    """Tokenised sequences.

    Attributes:
        path: the folder.
        meta: meta.json.
        input_ids: (n, L) uint16 or uint32, memory-mapped, padded with `meta.pad_id`.
        lengths: (n,) int32, tokens before the padding.
        token_counts: (V,) int64, how often each token occurs; rarity-smoothed masking needs it.
        pairs: (n,) of dtype `PAIR` in a store of sentence pairs, else None.
    """

    path: Path
    meta: StoreMeta
    input_ids: np.ndarray
    lengths: np.ndarray
    token_counts: np.ndarray
    pairs: np.ndarray | None = None

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Opens and verifies a store. UserError if the folder is not a whole store."""
        path = Path(path).expanduser()
        try:
            meta = StoreMeta(**json.loads((path / "meta.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a token store: {error}") from None
        if meta.format != _FORMAT:
            raise UserError(
                f"{path} is a token store of format {meta.format}, not {_FORMAT}: prepare it again"
            )
        for name, expected in meta.sha256.items():
            file = path / name
            if not file.is_file() or _sha256(file) != expected:
                raise UserError(
                    f"token store {path} is damaged ({name}): delete the folder and prepare it again"
                )
        return cls(
            path=path,
            meta=meta,
            input_ids=np.memmap(
                path / "input_ids.bin", meta.dtype, mode="r", shape=(meta.num_sequences, meta.max_length)
            ),
            lengths=np.load(path / "lengths.npy"),
            token_counts=np.load(path / "token_counts.npy"),
            pairs=np.load(path / "pairs.npy") if "pairs.npy" in meta.sha256 else None,
        )

    def __len__(self) -> int:
        return self.meta.num_sequences

    def split(self, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Sequence indices for training and for validation, both sorted, disjoint, the same in every run.

        At least one sequence is held out if the fraction is above 0; with 0 the second array is empty. Of
        sentence pairs whole groups of documents are held out, so that no held-out text is the random second
        segment of a training pair; as many groups as come nearest to the fraction.
        """
        if not 0 <= validation_fraction < 1:
            raise UserError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        wanted = max(1, round(validation_fraction * len(self))) if validation_fraction else 0
        of_a_sequence = np.arange(len(self)) if self.pairs is None else self.pairs["group"]
        _, group, sizes = np.unique(of_a_sequence, return_inverse=True, return_counts=True)
        order = permutation(len(sizes), _SPLIT_SEED, 0).numpy()
        num_groups = int(np.abs(sizes[order].cumsum() - wanted).argmin()) + 1 if wanted else 0
        if num_groups >= len(sizes):
            gives = f"{len(self)} sequence of {self.meta.max_length} tokens"
            if self.pairs is not None:
                gives = f"sentence pairs of {len(sizes)} group of documents"
            raise UserError(
                f"corpus {self.meta.corpus!r} gives {gives}: too short to hold one out for validation"
            )
        held_out = np.isin(group, order[:num_groups])
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def build_token_store(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    max_length: int,
    *,
    max_sequences: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Tokenises and packs `documents` into a new folder.

    Args:
        documents: a `Corpus`, or any iterable of texts.
        tokenizer: a fast tokenizer with begin, end, padding and mask tokens.
        out_dir: must not exist, or be empty; it appears only when the store is whole.
        max_length: L, tokens a sequence.
        max_sequences: stop after so many.
        on_progress: called with the numbers of documents and sequences so far, about every thousand
            documents.

    Raises:
        UserError: no text, `out_dir` in use, or what reading the corpus raises.
        RunError: the disk is full.
    """
    facts = TokenizerFacts.from_tokenizer(tokenizer)
    packer = Packer(facts.begin_id, facts.end_id, max_length)
    sequences = packed_sequences(documents, DocumentEncoder(tokenizer), packer, on_progress)
    corpus = documents.spec if isinstance(documents, Corpus) else "documents"
    return write_store(out_dir, islice(sequences, max_sequences), facts, max_length, corpus)


def write_store(
    out_dir: str | Path,
    sequences: Iterator[list[int]],
    facts: TokenizerFacts,
    max_length: int,
    corpus: str,
    pairs: bytearray | None = None,
) -> TokenStore:
    """Writes sequences of at most `max_length` tokens into a new folder, as `build_token_store` does.

    `pairs`, for a store of sentence pairs, has one `PAIR` record a sequence when the sequences are exhausted.
    """
    out_dir = Path(out_dir).expanduser()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists already and is not empty")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _write(partial, sequences, facts, max_length, corpus, pairs)
        _publish(partial, out_dir)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunError(f"no space left on the disk of {out_dir} while preparing corpus {corpus!r}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenStore.open(out_dir)


def _write(
    folder: Path,
    sequences: Iterator[list[int]],
    facts: TokenizerFacts,
    max_length: int,
    corpus: str,
    pairs: bytearray | None,
) -> None:
    dtype = np.dtype(np.uint16 if facts.vocab_size <= 1 << 16 else np.uint32)
    counts = np.zeros(facts.vocab_size, np.int64)
    lengths: list[int] = []
    with (folder / "input_ids.bin").open("wb") as stream:
        while chunk := list(islice(sequences, 4096)):
            rows = np.full((len(chunk), max_length), facts.pad_id, dtype)
            for row, sequence in zip(rows, chunk, strict=True):
                row[: len(sequence)] = sequence
            chunk_lengths = np.fromiter(map(len, chunk), np.int32, len(chunk))
            real = np.arange(max_length) < chunk_lengths[:, None]
            counts += np.bincount(rows[real], minlength=facts.vocab_size)
            lengths += chunk_lengths.tolist()
            stream.write(rows.tobytes())
    if not lengths:
        raise UserError(f"corpus {corpus!r} holds no text")
    np.save(folder / "lengths.npy", np.array(lengths, np.int32))
    np.save(folder / "token_counts.npy", counts)
    if pairs is not None:
        np.save(folder / "pairs.npy", np.frombuffer(pairs, PAIR, len(lengths)))
    meta = StoreMeta(
        format=_FORMAT,
        corpus=corpus,
        tokenizer=facts.fingerprint,
        num_sequences=len(lengths),
        max_length=max_length,
        vocab_size=facts.vocab_size,
        pad_id=facts.pad_id,
        dtype=dtype.name,
        num_tokens=int(sum(lengths)),
        sha256={file.name: _sha256(file) for file in sorted(folder.iterdir())},
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=2) + "\n")


def _publish(partial: Path, out_dir: Path) -> None:
    """Renames the finished folder into its place; another process may have finished the same store before."""
    for file in partial.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    try:
        partial.rename(out_dir)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def default_cache_dir() -> Path:
    """$FASTDISTIL_CACHE, else fastdistil/ in $XDG_CACHE_HOME or ~/.cache."""
    if path := os.environ.get("FASTDISTIL_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdistil"


def cached_token_store(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_sequences: int | None = None,
    cache_dir: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """The store of this corpus, tokenizer and length: opened if it was built before and verifies, else built.

    Processes of one run must not build at once for nothing: let rank 0 call first. Raises as
    `build_token_store`.
    """
    facts = TokenizerFacts.from_tokenizer(tokenizer)
    return open_or_build(
        [_FORMAT, corpus.fingerprint, facts.fingerprint, max_length, max_sequences],
        cache_dir,
        lambda path: build_token_store(
            corpus, tokenizer, path, max_length, max_sequences=max_sequences, on_progress=on_progress
        ),
    )


def open_or_build(
    identity: list[Any], cache_dir: str | Path | None, build: Callable[[Path], TokenStore]
) -> TokenStore:
    """The store that `identity` (JSON-able) names in the cache; made by `build` if it is not there whole."""
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    path = root / "tokens" / key
    if path.exists():
        try:
            return TokenStore.open(path)
        except UserError:  # torn or damaged: it can be made again
            shutil.rmtree(path)
    return build(path)


def open_token_store(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, pairs: bool = False
) -> TokenStore:
    """Opens a prepared store for a run with this tokenizer and length; a UserError says how they differ.

    With `pairs` it must be a store of sentence pairs; without, it may be one.
    """
    store = TokenStore.open(path)
    if pairs and store.pairs is None:
        raise UserError(f"token store {path} holds packed text, no sentence pairs to predict the next one of")
    if store.meta.tokenizer != TokenizerFacts.from_tokenizer(tokenizer).fingerprint:
        raise UserError(f"token store {path} was prepared with another tokenizer: prepare the corpus again")
    if store.meta.max_length != max_length:
        raise UserError(
            f"token store {path} has sequences of {store.meta.max_length} tokens, max_length is {max_length}"
        )
    return store
