"""A small corpus, and a tiny teacher that reads it."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Models of this size gain nothing from threads, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(150)]
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    lines = [" ".join(rng.choices(words, k=rng.randint(5, 30))) + "." for _ in range(400)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def teacher_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 4 layers × 32 with a masked-LM head, random weights, dropout 0.1."""
    from transformers import BertConfig, BertForMaskedLM

    from fastdistil.data.tokenizer import train_wordpiece

    tokenizer = train_wordpiece(corpus.read_text().splitlines(), 120)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    BertForMaskedLM(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def encoder_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's encoder in a folder without a head."""
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    shutil.copytree(teacher_folder, folder)
    BertModel.from_pretrained(teacher_folder, add_pooling_layer=False).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Any recipe, in about a second."""
    return [
        "data.max_length=16",
        "data.validation_fraction=0.1",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "optimizer.lr=0.01",
        "run.steps=6",
        "run.batch_size=8",
        "run.micro_batch_size=4",
        "run.eval_every=3",
        "run.eval_sequences=8",
        "run.checkpoint_every=2",
        "run.log_every=1",
        "run.precision=fp32",
        "run.teacher_precision=fp32",
    ]


@pytest.fixture
def distil(corpus: Path, teacher_folder: Path, overrides: list[str], tmp_path: Path) -> Any:
    """Configuration of a DistilBERT run of the tiny teacher; takes more overrides."""
    from fastdistil.train.config import load_config

    def make(*more: str, output: Path | None = None) -> Any:
        sizes = ["student.num_layers=2", "student.teacher_layers=null"]
        return load_config(
            "distilbert",
            [*overrides, *sizes, *more],
            teacher=str(teacher_folder),
            corpus=str(corpus),
            output=output or tmp_path / "run",
        )

    return make


# Queries, keys and values, layers through a learned projection that the embeddings share, and attention maps.
LAYER_OBJECTIVES = (
    "objectives=["
    "{name: relations, num_heads: 4}, "
    "{name: hidden, layers: uniform}, "
    "{name: embeddings, share_projection: true}, "
    "{name: attention_transfer, layers: [[1, 3]]}]"
)
NARROW = ("student.init=random", "student.hidden_size=24", "student.num_attention_heads=2")


@pytest.fixture(scope="session")
def layer_objectives() -> list[str]:
    """A narrower student with every objective of single layers."""
    return [LAYER_OBJECTIVES, *NARROW]


@pytest.fixture
def relate(corpus: Path, encoder_folder: Path, overrides: list[str], tmp_path: Path) -> Any:
    """Configuration of a MiniLM run of the tiny encoder, which has no head; takes more overrides."""
    from fastdistil.train.config import load_config

    def make(*more: str, output: Path | None = None) -> Any:
        sizes = ["student.num_layers=2", "objectives.0.num_heads=4"]
        return load_config(
            "minilm",
            [*overrides, *sizes, *more],
            teacher=str(encoder_folder),
            corpus=str(corpus),
            output=output or tmp_path / "run",
        )

    return make
