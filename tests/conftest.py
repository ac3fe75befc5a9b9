"""Triton's interpreter where there is no GPU, skips where a package of the training side is missing, and
small tasks with tiny models that know their words."""

import json
import os
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads this when it is imported, and any test module may be the first to do so.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# As on a machine kept for its GPU: files and folders below tests/ that cannot be imported without it.
NEEDS = {
    "data/test_corpus.py": "datasets",
    "data/test_streaming.py": "datasets",
    "compare": "pydantic",
    "compress": "pydantic",
    "data/augment": "nltk",
    "data/test_tasks.py": "pyarrow",
    "evaluate/test_task.py": "torchmetrics",
    "export": "onnxruntime",
    "recipes": "pydantic",
    "recipes/golden": "scipy",
    "train": "pydantic",
}


class SkippedModule(pytest.Module):
    package: str

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        pytest.skip(f"{self.package} is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    where = module_path.relative_to(Path(__file__).parent)
    for path in (where, *where.parents):
        package = NEEDS.get(str(path))
        if package is not None and find_spec(package) is None:
            module: SkippedModule = SkippedModule.from_parent(parent, path=module_path)
            module.package = package
            return module
    return None


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(150)]
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    lines = [" ".join(rng.choices(words, k=rng.randint(5, 30))) + "." for _ in range(400)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def make_tiny_bert(corpus: Path) -> Callable[[int, float], tuple[Any, Any]]:
    """From the size of a vocabulary and an initializer range: the configuration of a BERT of 4 layers × 32,
    dropout 0.1, and a tokenizer of the corpus."""

    def make(vocab_size: int, initializer_range: float) -> tuple[Any, Any]:
        from transformers import BertConfig

        from fastdistil.data.tokenizer import train_wordpiece

        tokenizer = train_wordpiece(corpus.read_text().splitlines(), vocab_size)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=40,
            initializer_range=initializer_range,
        )
        return config, tokenizer

    return make


@pytest.fixture(scope="session")
def tasks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small tasks, of the corpus's words: six of them are good and six are bad.

    sst2: which kind a sentence has more of. mrpc: the same of the second sentence of a pair, the first having
    neither. stsb: 5 times the share of good words. 45 training examples, so that a batch of 8 leaves a rest.
    """
    words = sorted({word for line in corpus.read_text().splitlines() for word in line[:-1].split()})
    good, bad, neither = words[:6], words[6:12], words[12:]
    root = tmp_path_factory.mktemp("tasks")

    def write(name: str, split: str, rows: list[dict[str, Any]]) -> None:
        file = root / name / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for seed, (split, count) in enumerate([("train", 45), ("validation", 40)]):
        rng = random.Random(seed)
        sentences, firsts, shares = [], [], []
        for row in range(count):
            length = rng.randint(3, 9)
            # As many of either label; the rows of a file are in no order.
            mostly, others = (good, bad) if row % 2 else (bad, good)
            some = rng.randint(0, (length - 1) // 2)
            chosen = [*rng.choices(others, k=some), *rng.choices(mostly, k=length - some)]
            rng.shuffle(chosen)
            sentences.append(" ".join(chosen))
            firsts.append(" ".join(rng.choices(neither, k=rng.randint(3, 9))))
            shares.append((length - some if row % 2 else some) / length)
        pairs = [{"sentence1": a, "sentence2": b} for a, b in zip(firsts, sentences, strict=True)]
        labels = [row % 2 for row in range(count)]
        write("sst2", split, [{"sentence": s, "label": n} for s, n in zip(sentences, labels, strict=True)])
        write("mrpc", split, [{**pair, "label": n} for pair, n in zip(pairs, labels, strict=True)])
        write("stsb", split, [{**pair, "score": 5 * x} for pair, x in zip(pairs, shares, strict=True)])
    return root


@pytest.fixture(scope="session")
def task_encoder(make_tiny_bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head, whose vocabulary has most of the corpus's words whole."""
    from transformers import BertModel

    config, tokenizer = make_tiny_bert(400, 0.1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("task-encoder") / "tiny"
    BertModel(config, add_pooling_layer=False).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def task_keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Any recipe on a task, in about a second."""
    return [
        "task.max_length=24",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "run.batch_size=8",
        "run.log_every=1",
        "run.precision=fp32",
        "run.teacher_precision=fp32",
    ]


@pytest.fixture(scope="session")
def finetuned(
    tasks: Path, task_encoder: Path, task_keys: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Of a task's name: the folder of the encoder, fine-tuned on it until it is far above chance."""
    from fastdistil.train.config import load_config
    from fastdistil.train.run import run

    made: dict[str, Path] = {}

    def folder(task: str) -> Path:
        if task not in made:
            output = tmp_path_factory.mktemp("finetuned") / task
            keys = [*task_keys, "run.steps=90", "optimizer.lr=3e-3", "run.log_every=90", "run.eval_every=90"]
            run(
                load_config(
                    "finetune", keys, teacher=str(task_encoder), task=task, data=str(tasks), output=output
                )
            )
            made[task] = output / "model"
        return made[task]

    return folder
