"""SST-2's training texts in batches, and which batches of an epoch stand for all of it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from records import VOCAB
from transformers import AutoTokenizer

from fastdistil.data.task_batches import TaskBatch
from fastdistil.data.task_encoding import EncodedTask, encode
from fastdistil.data.tasks import find_task, read_examples

SHARED = Path(__file__).parents[2] / "shared"
TEXTS, TOKENIZER = SHARED / "data" / "glue" / "sst2", SHARED / "models" / "encoder-12x384"
# Of the training split in BERT's uncased vocabulary, [CLS] and [SEP] counted: this share of the texts has at
# most this many tokens.
SIZE = 67_349
LENGTHS = {0: 3, 0.1: 4, 0.25: 6, 0.4: 8, 0.5: 10, 0.6: 13, 0.75: 18, 0.9: 27, 0.95: 33, 0.99: 44, 1: 66}


@functools.cache
def read_texts(vocab: int, max_length: int) -> tuple[EncodedTask, str]:
    """SST-2's training split, or where it is not there random tokens in texts of its lengths; and which."""
    task = find_task("sst2")
    if vocab == VOCAB and TEXTS.is_dir() and TOKENIZER.is_dir():
        examples = read_examples(task, TEXTS, "train")
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        return encode(task, examples, tokenizer, max_length), "SST-2's training split"
    random = np.random.default_rng(0)
    shares = (np.arange(SIZE) + 0.5) / SIZE
    lengths = np.interp(shares, list(LENGTHS), list(LENGTHS.values())).round().astype(np.int64)
    tokens = int(lengths.sum())
    data = EncodedTask(
        task,
        input_ids=random.integers(5, vocab, tokens, dtype=np.int32),
        token_type_ids=np.zeros(tokens, np.int8),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        labels=random.integers(0, 2, SIZE),
        pad_id=0,
        max_length=max_length,
        truncated=0,
    )
    return data, "random tokens, with the lengths of SST-2's training split"


def representative(longest: np.ndarray, steps: int) -> list[int]:
    """The batches that stand for an epoch, whose longest texts have `longest` tokens each."""
    parts = np.array_split(longest.argsort(kind="stable"), steps)
    return [int(part[np.abs(longest[part] - longest[part].mean()).argmin()]) for part in parts]


def fitted(batch: TaskBatch, length: int) -> TaskBatch:
    """The same with more padding or with less."""
    more = (0, length - batch.input_ids.shape[1])
    return dataclasses.replace(
        batch,
        input_ids=F.pad(batch.input_ids, more),
        attention_mask=F.pad(batch.attention_mask, more),
        token_type_ids=F.pad(batch.token_type_ids, more),
    )
