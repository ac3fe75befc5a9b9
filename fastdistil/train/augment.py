"""Augmented examples of a task, made once and kept in the cache."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastdistil.data.augment.bilstm import bilstm_augment
from fastdistil.data.augment.neighbours import Neighbours
from fastdistil.data.augment.tinybert import tinybert_augment
from fastdistil.data.tasks import Examples, Task
from fastdistil.errors import UserError
from fastdistil.models.load import load_encoder, load_masked_lm
from fastdistil.models.student import check_same_tokenizer
from fastdistil.train.cache import cache_file, model_fingerprint, write_aside
from fastdistil.train.logging import RunLog
from fastdistil.train.phases import autocast_dtype
from fastdistil.train.sections import AugmentConfig

Texts = list[tuple[str, ...]]


def augmented(
    examples: Examples,
    task: Task,
    config: AugmentConfig,
    tokenizer: Any,
    *,
    source: str,
    max_length: int,
    cache_dir: Path | None,
    device: torch.device,
    log: RunLog,
) -> Examples:
    """The examples and, after them, the copies made of them, whose labels are unknown.

    Args:
        tokenizer: of teacher and student.
        source: folder or hub id whose word embeddings stand in for word vectors.
        max_length: tokens of an example that the models read.
        cache_dir: None: ~/.cache/fastdistil.

    Raises:
        UserError: a task of spans or choices; what is wrong with the masked language model or the vectors.
    """
    if task.kind not in ("classification", "regression"):
        raise UserError(f"augment: {config.method} copies sentences and pairs; {task.name} is a {task.kind}")
    file = _cache_file(examples.texts, config, tokenizer.mask_token, source, max_length, cache_dir)
    if not file.exists():
        with Console(stderr=True).status(f"augmenting {task.name}") as status:

            def progress(done: int, total: int) -> None:
                status.update(f"augmenting {task.name}: {done:,} of {total:,} examples")

            if config.method == "bilstm":
                copies = _bilstm(examples.texts, config, tokenizer, progress)
            else:
                copies = _tinybert(examples.texts, config, tokenizer, source, max_length, device, progress)
        _write(file, [copy for own in copies for copy in own])
    texts = _read(file)
    log.say(f"{task.name}: {len(texts):,} copies of {len(examples):,} examples ({config.method}), {file}")
    unknown = np.full((len(texts), *examples.labels.shape[1:]), _unknown(examples), examples.labels.dtype)
    return replace(
        examples,
        texts=[*examples.texts, *texts],
        labels=np.concatenate([examples.labels, unknown]),
    )


def _unknown(examples: Examples) -> float:
    return float("nan") if examples.labels.dtype.kind == "f" else -100


def _bilstm(
    texts: Texts, config: AugmentConfig, tokenizer: Any, progress: Callable[[int, int], None]
) -> list[Texts]:
    if tokenizer.mask_token is None:
        raise UserError("augment: masks words, but the tokenizer has no mask token; set augment=null")
    return bilstm_augment(
        texts,
        mask_token=tokenizer.mask_token,
        copies=config.copies,
        mask_probability=config.mask_probability,
        pos_probability=config.pos_probability,
        ngram_probability=config.ngram_probability,
        seed=config.seed,
        on_progress=progress,
    )


def _tinybert(
    texts: Texts,
    config: AugmentConfig,
    tokenizer: Any,
    source: str,
    max_length: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> list[Texts]:
    model, own_tokenizer = None, tokenizer
    if config.masked_lm is not None:
        model, own_tokenizer = load_masked_lm(config.masked_lm)
        check_same_tokenizer(tokenizer, own_tokenizer, ("student", "augment.masked_lm"))
        model.to(device)
    if config.vectors is not None:
        neighbours = Neighbours.from_file(config.vectors)
    else:
        words = load_encoder(source)[0].get_input_embeddings().weight.detach()
        neighbours = Neighbours.from_embeddings(words, tokenizer)
    return tinybert_augment(
        texts,
        model=model,
        tokenizer=own_tokenizer,
        neighbours=neighbours,
        copies=config.copies,
        probability=config.probability,
        num_candidates=config.num_candidates,
        max_length=max_length,
        seed=config.seed,
        dtype=autocast_dtype("auto"),
        on_progress=progress,
    )


def _cache_file(
    texts: Texts,
    config: AugmentConfig,
    mask_token: str | None,
    source: str,
    max_length: int,
    cache_dir: Path | None,
) -> Path:
    """By everything that the copies depend on."""
    models = (config.masked_lm, config.vectors, source if config.method == "tinybert" else None)
    prints = [model_fingerprint(model) for model in models if model is not None]
    key = [config.model_dump(), mask_token, max_length, prints, texts]
    return cache_file("augmented", key, ".parquet", cache_dir)


def _write(file: Path, texts: Texts) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = zip(*texts, strict=True) if texts else ()
    table = pa.table({str(i): list(column) for i, column in enumerate(columns)})
    write_aside(file, lambda partial: pq.write_table(table, partial, compression="zstd"))


def _read(file: Path) -> Texts:
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
