from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastdistil.data.tokenizer import train_wordpiece

SHARED = Path(__file__).parents[4] / "shared"


@pytest.fixture(scope="session")
def wordpiece(documents: list[str]) -> transformers.BertTokenizer:
    """93 of its pieces are whole words, so that most words of the documents are one of them."""
    return train_wordpiece(documents, 250)


@pytest.fixture(scope="session")
def model(wordpiece: transformers.BertTokenizer) -> Any:
    """A random BERT in float64, where no two candidates are so close that a batch's rounding swaps them."""
    config = transformers.BertConfig(
        vocab_size=len(wordpiece),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    model = transformers.BertForMaskedLM(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture(scope="session")
def sst2() -> list[tuple[str, ...]]:
    return _sentences("sst2", "sentence")


@pytest.fixture(scope="session")
def mrpc() -> list[tuple[str, ...]]:
    return _sentences("mrpc", "sentence1", "sentence2")


def _sentences(task: str, *columns: str) -> list[tuple[str, ...]]:
    path = SHARED / "data" / "glue" / task / "train.parquet"
    if not path.is_file():
        pytest.skip("the real data is not beside the repository")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path, columns=list(columns)).slice(0, 1500)
    return list(zip(*(table[column].to_pylist() for column in columns), strict=True))


@pytest.fixture
def encoder() -> tuple[Any, Any]:
    """The real encoder and its tokenizer."""
    folder = SHARED / "models" / "encoder-12x384"
    if not folder.is_dir():
        pytest.skip("the real encoder is not beside the repository")
    return transformers.AutoModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def shrink_chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes a module work on three examples at a time."""
    return lambda module: monkeypatch.setattr(module, "_CHUNK", 3)
