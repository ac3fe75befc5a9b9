"""Tiny random models of every supported family, a tokenizer for them, and examples to calibrate with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from fastdistil.compress.method import Calibration
from fastdistil.data.task_batches import TaskBatch

FAMILIES = ("bert", "roberta", "distilbert", "electra", "modernbert")
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
}


def build_tiny(family: str = "bert", head: str = "SequenceClassification", **changes: Any) -> Any:
    """A model in eval mode whose weights are all random, so that a forgotten bias or norm shows.

    `head` is that of `transformers`' Auto classes; "" is an encoder alone. `changes` go to the config.
    """
    config: Any
    match family:
        case "bert":
            config = transformers.BertConfig(**SIZES)
        case "roberta":
            config = transformers.RobertaConfig(**SIZES)
        case "distilbert":
            config = transformers.DistilBertConfig(
                vocab_size=100,
                dim=32,
                n_layers=2,
                n_heads=4,
                hidden_dim=48,
                max_position_embeddings=40,
                num_labels=3,
            )
        case "electra":
            config = transformers.ElectraConfig(embedding_size=24, **SIZES)
        case "modernbert":
            special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
            config = transformers.ModernBertConfig(pad_token_id=0, local_attention=4, **special, **SIZES)
    if head == "QuestionAnswering":
        config.num_labels = 2
    for name, value in changes.items():
        setattr(config, name, value)
    if family == "modernbert":
        layers = config.num_hidden_layers
        config.layer_types = ["sliding_attention" if i % 3 else "full_attention" for i in range(layers)]
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_batches(count: int = 3, seed: int = 0) -> list[TaskBatch]:
    """Of 4 examples of up to 16 tokens, with one of three labels."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(5, 100, (4, 16), generator=generator)
        lengths = torch.randint(6, 17, (4, 1), generator=generator)
        mask = torch.arange(16) < lengths
        types = torch.zeros_like(ids)
        labels = torch.randint(3, (4,), generator=generator)
        batches.append(TaskBatch(torch.where(mask, ids, 0), mask, types, labels))
    return batches


def inputs_of(model: Any, batch: TaskBatch) -> dict[str, torch.Tensor]:
    """What the model's forward is called with: DistilBERT and ModernBERT have no token types."""
    typed = model.config.model_type in ("bert", "roberta", "electra")
    return {k: v for k, v in batch.inputs.items() if typed or k != "token_type_ids"}


def cross_entropy(model: Any, batch: TaskBatch) -> torch.Tensor:
    return F.cross_entropy(model(**inputs_of(model, batch)).logits, batch.labels)


@pytest.fixture
def build() -> Callable[..., Any]:
    return build_tiny


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny_bert() -> Any:
    return build_tiny("bert")


@pytest.fixture
def tiny_modernbert() -> Any:
    return build_tiny("modernbert")


@pytest.fixture
def tiny_distilbert() -> Any:
    return build_tiny("distilbert")


@pytest.fixture
def batches() -> list[TaskBatch]:
    return make_batches()


@pytest.fixture
def calibration(batches: list[TaskBatch]) -> Calibration:
    """Three batches and the cross-entropy of their labels; fits every family."""
    return Calibration(batches, cross_entropy)


@pytest.fixture
def run() -> Callable[[Any], torch.Tensor]:
    """The logits (or the last hidden states) of a model on one padded batch."""

    def forward(model: Any) -> torch.Tensor:
        batch = make_batches(1, seed=7)[0]
        with torch.no_grad():
            return model(**inputs_of(model, batch))[0]

    return forward


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model and a tokenizer of its vocabulary to a folder."""

    def write(model: Any, name: str = "model") -> Path:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 100))]
        tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def reload_equal(save: Callable[..., Path], run: Callable[[Any], torch.Tensor]) -> Callable[[Any], Any]:
    """Saves and loads a model, asserts outputs equal to the last bit, and returns the loaded one."""

    def check(model: Any) -> Any:
        from fastdistil.compress.store import load

        loaded = load(save(model, "reloaded"))
        assert not loaded.training
        assert torch.equal(run(loaded), run(model))
        return loaded

    return check
