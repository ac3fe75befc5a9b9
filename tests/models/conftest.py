"""Tiny random masked language models of every family that can be a student, and two that can be tapped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}


def build_tiny(family: str, head: str = "MaskedLM", **changes: Any) -> Any:
    """A model in eval mode whose weights are all random, so that a forgotten bias or norm shows.

    `head` is that of `transformers`' Auto classes: "MaskedLM", "SequenceClassification" and so on.
    """
    config: Any
    match family:
        case "bert":
            config = transformers.BertConfig(**SIZES)
        case "roberta":
            config = transformers.RobertaConfig(**SIZES)
        case "distilbert":
            config = transformers.DistilBertConfig(
                vocab_size=61, dim=16, n_layers=4, n_heads=2, hidden_dim=24, max_position_embeddings=40
            )
        case "electra":
            config = transformers.ElectraConfig(embedding_size=12, **SIZES)
        case "modernbert":
            special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
            config = transformers.ModernBertConfig(pad_token_id=0, local_attention=4, **special, **SIZES)
        case "albert":
            config = transformers.AlbertConfig(embedding_size=12, **SIZES)
        case "mobilebert":
            config = transformers.MobileBertConfig(
                embedding_size=12, intra_bottleneck_size=8, num_feedforward_networks=2, **SIZES
            )
    for name, value in changes.items():
        setattr(config, name, value)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def build() -> Callable[..., Any]:
    return build_tiny


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model and a tokenizer of `size` words to a folder."""

    def write(model: Any, name: str = "model", size: int = 61, **tokens: Any) -> Path:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, size))]
        tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, **tokens)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def tiny_pair() -> dict[str, torch.Tensor]:
    """Two pairs of sentences, `[CLS] A [SEP] B [SEP]`, the second with three tokens of padding."""
    ids = torch.randint(5, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 2
    types = torch.zeros_like(ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row, (first, length) in enumerate([(6, 12), (4, 9)]):
        ids[row, first - 1] = ids[row, length - 1] = 3
        types[row, first:length] = 1
        ids[row, length:], mask[row, length:] = 0, False
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.fixture(params=["bert", "roberta", "distilbert", "electra", "modernbert"])
def tiny_model(request: pytest.FixtureRequest) -> Any:
    return build_tiny(request.param)


@pytest.fixture
def tiny_batch() -> Callable[[Any], tuple[torch.Tensor, torch.Tensor]]:
    """Two sequences, the second padded with the model's own pad token (RoBERTa counts positions by it)."""

    def batch(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        ids[1, 5:], mask[1, 5:] = model.config.pad_token_id, 0
        return ids, mask

    return batch
