"""Held-out text of forty words."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdistil.data.token_store import build_token_store

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizer():
    words = [*SPECIAL, *(f"w{i}" for i in range(40))]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, SPECIAL, strict=True)))


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    words = np.random.default_rng(0).integers(0, 40, 400)
    documents = [" ".join(f"w{i}" for i in part) for part in np.array_split(words, 7)]
    return build_token_store(documents, tokenizer, tmp_path_factory.mktemp("text") / "store", 16)
