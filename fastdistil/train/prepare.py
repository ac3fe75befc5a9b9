"""From a configuration to what the loop reads: tokenizer, training batches, masks, held-out text."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from fastdistil.data.batches import BatchSource, Share, StoreBatches, TokenSource
from fastdistil.data.corpus import Corpus, FileCorpus, open_corpus
from fastdistil.data.masking import MaskedBatches, Masker, Unmasked
from fastdistil.data.sentence_pairs import cached_pair_store
from fastdistil.data.streaming import StreamBatches, sample_token_counts
from fastdistil.data.token_store import TokenStore, cached_token_store, open_token_store
from fastdistil.data.tokenizer import TokenizerFacts, train_wordpiece
from fastdistil.errors import UserError
from fastdistil.models.load import load_tokenizer, max_positions
from fastdistil.models.student import check_same_tokenizer
from fastdistil.train.checkpoint import publish
from fastdistil.train.config import RunConfig
from fastdistil.train.logging import RunLog
from fastdistil.train.sections import DataConfig, LoopConfig, MaskingConfig


@dataclass(frozen=True)
class PreparedData:
    """Everything about the text, shared by all phases of a run."""

    tokenizer: Any
    facts: TokenizerFacts
    token_counts: np.ndarray  # (V,) in the training text
    held_out: TokenStore
    held_out_rows: np.ndarray  # sequence numbers in `held_out`
    training: Callable[[Share, int], TokenSource]  # share of the batch, seed
    num_sequences: int | None  # for training; None: a stream

    def describe_held_out(self) -> str:
        meta = self.held_out.meta
        return f"{len(self.held_out_rows):,} sequences of {meta.max_length} tokens of {meta.corpus}"

    def masker(self, masking: MaskingConfig | None, seed: int, device: torch.device) -> Masker | Unmasked:
        if masking is None:
            return Unmasked()
        try:
            return Masker(
                self.facts,
                seed=seed,
                **masking.model_dump(),
                token_counts=self.token_counts,
                device=device,
            )
        except ValueError as error:
            raise UserError(f"masking: {error}") from None


@dataclass(frozen=True)
class MaskedText:
    """The training text of a phase, as it is masked there."""

    data: PreparedData
    masking: MaskingConfig | None

    def steps_per_epoch(self, loop: LoopConfig) -> int | None:
        sequences = self.data.num_sequences
        return None if sequences is None else math.ceil(sequences / loop.batch_size)

    def steps(self, loop: LoopConfig) -> int:
        if loop.steps is not None:
            return loop.steps
        if self.data.num_sequences is None:
            raise UserError("run.epochs: a stream has no known length; give run.steps")
        assert loop.epochs is not None
        return math.ceil(loop.epochs * self.data.num_sequences / loop.batch_size)

    def batches(self, loop: LoopConfig, seed: int, accelerator: Accelerator) -> BatchSource:
        world = accelerator.num_processes
        micro = max(1, min(loop.micro_batch_size or loop.batch_size, loop.batch_size // world))
        share = Share(loop.batch_size, micro, accelerator.process_index, world)
        device = accelerator.device
        return MaskedBatches(
            self.data.training(share, seed), self.data.masker(self.masking, seed, device), device
        )


def prepare_data(data: DataConfig, tokenizer: Any, accelerator: Accelerator, log: RunLog) -> PreparedData:
    """Tokenise the corpus (or open what was tokenised before) and set held-out text aside.

    Raises `UserError` for a corpus that cannot be read, is empty, or does not fit the tokenizer.
    """
    assert data.corpus is not None
    facts = TokenizerFacts.from_tokenizer(tokenizer)
    with accelerator.main_process_first():
        if data.validation is not None:
            _require_other_text(data, data.corpus, data.validation)
        if data.streaming:
            if data.validation is None:
                raise UserError(
                    "data.streaming needs data.validation: held-out text cannot be cut off a stream"
                )
            corpus = _open(data.corpus, data)
            counts = sample_token_counts(corpus, tokenizer)
            held_out = _held_out(data.validation, data, tokenizer, log)
            rows = np.arange(len(held_out))[: data.max_validation_sequences]

            def stream(share: Share, seed: int) -> TokenSource:
                return StreamBatches(corpus, tokenizer, data.max_length, share, seed)

            return PreparedData(tokenizer, facts, counts, held_out, rows, stream, None)

        store = _store(data.corpus, data, tokenizer, log, split=data.split, limit=data.max_sequences)
        if data.validation is not None:
            held_out = _held_out(data.validation, data, tokenizer, log)
            training_rows, rows = np.arange(len(store)), np.arange(len(held_out))
            rows = rows[: data.max_validation_sequences]
        else:
            held_out = store
            training_rows, rows = store.split(data.validation_fraction)
        training_rows = training_rows[: data.max_sequences]  # a prepared store may have more

    def stored(share: Share, seed: int) -> TokenSource:
        return StoreBatches(store, training_rows, share, seed)

    log.say(
        f"data: {store.meta.num_tokens / 1e6:,.2f} M tokens of {data.corpus} in {len(store):,} sequences of "
        f"{data.max_length}; {len(rows):,} sequences held out"
    )
    return PreparedData(tokenizer, facts, store.token_counts, held_out, rows, stored, len(training_rows))


class Texts:
    """The text of each stage of a run, prepared once."""

    def __init__(self, tokenizer: Any, accelerator: Accelerator, log: RunLog) -> None:
        self._arguments = tokenizer, accelerator, log
        self._prepared: dict[str, PreparedData] = {}

    def __call__(self, data: DataConfig) -> PreparedData:
        key = data.model_dump_json()
        if key not in self._prepared:
            self._prepared[key] = prepare_data(data, *self._arguments)
        return self._prepared[key]


def prepare_tokenizer(config: RunConfig, model_tokenizer: Any | None, accelerator: Accelerator) -> Any:
    """The tokenizer of a run: the model's; else the one that `data` names; else one trained on the corpus."""
    data = config.data
    if data.tokenizer is not None:
        named = load_tokenizer(data.tokenizer)
        if model_tokenizer is not None:
            check_same_tokenizer(model_tokenizer, named, ("the model", "data.tokenizer"))
        return named
    if model_tokenizer is not None:
        return model_tokenizer
    if data.vocab_size is None:
        raise UserError(
            "give data.tokenizer or data.vocab_size: there is no model to take the tokenizer from"
        )
    return _trained_tokenizer(config, data.vocab_size, accelerator)


def check_length(model: Any, max_length: int, key: str) -> None:
    """Raise `UserError` if sequences are longer than the model's positions."""
    positions = max_positions(model)
    if max_length > positions:
        raise UserError(f"data.max_length is {max_length}, but {key} has only {positions} positions")


def _trained_tokenizer(config: RunConfig, vocab_size: int, accelerator: Accelerator) -> Any:
    """Trained once a run and kept in the output folder: a resumed run must have the same ids."""
    from transformers import AutoTokenizer

    folder = config.output / "tokenizer"
    with accelerator.main_process_first():
        if not folder.exists():
            assert config.data.corpus is not None
            partial = folder.with_name(".writing-tokenizer")
            shutil.rmtree(partial, ignore_errors=True)
            train_wordpiece(_open(config.data.corpus, config.data), vocab_size).save_pretrained(str(partial))
            publish(partial, folder)
    return AutoTokenizer.from_pretrained(str(folder))


def _open(spec: str, data: DataConfig) -> Corpus:
    return open_corpus(spec, text_column=data.text_column, split=data.split, streaming=data.streaming)


def _require_other_text(data: DataConfig, corpus: str, validation: str) -> None:
    """Raise `UserError` where what is held out is trained on."""
    paths = [Path(spec).expanduser().resolve() for spec in (corpus, validation)]
    if any((path / "meta.json").is_file() for path in paths):  # prepared
        shared = [corpus] if paths[0] == paths[1] else []
    else:
        ours = _open(corpus, data)
        theirs = open_corpus(validation, text_column=data.text_column, split=data.validation_split)
        if isinstance(ours, FileCorpus) and isinstance(theirs, FileCorpus):
            files = {file.resolve() for file in ours.files} & {file.resolve() for file in theirs.files}
            shared = sorted(map(str, files))
        else:
            shared = [corpus] if ours.fingerprint == theirs.fingerprint else []
    if shared:
        raise UserError(f"data.validation: {shared[0]} is text that is trained on, too; hold out another")


def _held_out(spec: str, data: DataConfig, tokenizer: Any, log: RunLog) -> TokenStore:
    limit = data.max_validation_sequences
    return _store(spec, data, tokenizer, log, split=data.validation_split, limit=limit)


def _store(
    spec: str, data: DataConfig, tokenizer: Any, log: RunLog, *, split: str, limit: int | None
) -> TokenStore:
    if (Path(spec).expanduser() / "meta.json").is_file():
        spec = str(Path(spec).expanduser())
        return open_token_store(spec, tokenizer, max_length=data.max_length, pairs=data.sentence_pairs)
    corpus = open_corpus(spec, text_column=data.text_column, split=split, streaming=False)
    log.say(f"reading {spec}")
    if data.sentence_pairs:
        return cached_pair_store(
            corpus,
            tokenizer,
            max_length=data.max_length,
            seed=0,  # of the pairs, which are the same for all seeds of a run
            document_column=data.document_column,
            short_probability=data.short_probability,
            max_sequences=limit,
            cache_dir=data.cache_dir,
        )
    return cached_token_store(
        corpus, tokenizer, max_length=data.max_length, max_sequences=limit, cache_dir=data.cache_dir
    )
