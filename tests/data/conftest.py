from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import BertTokenizer, PreTrainedTokenizerFast

from fastdistil.data.tokenizer import TokenizerFacts, train_wordpiece

SENTENCES = (
    "The student learns from the teacher's soft targets.",
    "A temperature above one flattens the teacher's distribution over the vocabulary.",
    "Masked language modelling predicts fifteen per cent of the tokens.",
    "Distillation keeps most of the quality at half of the depth.",
    "Unbelievably, smaller encoders answer questions nearly as well as larger ones.",
)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """150 documents of 1 to 9 sentences."""
    return [
        " ".join(SENTENCES[(i + j) % 5] for j in range(1 + i * 7 % 9)) + f" Number {i}." for i in range(150)
    ]


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> BertTokenizer:
    """WordPiece, small enough that many words are split."""
    return train_wordpiece(documents, 120)


@pytest.fixture(scope="session")
def facts(tokenizer: BertTokenizer) -> TokenizerFacts:
    return TokenizerFacts.from_tokenizer(tokenizer)


@pytest.fixture(scope="session")
def roberta_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with RoBERTa's special tokens."""
    backend = ByteLevelBPETokenizer(add_prefix_space=True)
    backend.train_from_iterator(
        documents, 320, show_progress=False, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[str, list[str]], Path]:
    def write(name: str, lines: list[str]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
