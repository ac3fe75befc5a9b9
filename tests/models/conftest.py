"""Tiny random masked language models of every family that can be a student, and two that can be tapped."""

from collections.abc import Callable
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


def build_tiny(family: str, **changes: Any) -> Any:
    """A model in eval mode whose weights are all random, so that a forgotten bias or norm shows."""
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
    model = transformers.AutoModelForMaskedLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def build() -> Callable[..., Any]:
    return build_tiny


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
