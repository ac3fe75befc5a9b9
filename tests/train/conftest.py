"""A small corpus, and a tiny teacher that reads it."""

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
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
def teacher_folder(make_tiny_bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a masked-LM head, random weights."""
    from transformers import BertForMaskedLM

    config, tokenizer = make_tiny_bert(120, 0.2)
    torch.manual_seed(0)
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


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[[list[str]], Any]]:
    """Start the command in a process of its own; the imports are paid once, in the server that forks it."""
    from fastdistil.cli import main

    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "modernbert")]
    context.set_forkserver_preload(["torch._dynamo", *models, "fastdistil.train.run", "fastdistil.cli"])

    def start(arguments: list[str]) -> Any:
        process = context.Process(target=main, args=(arguments,))
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # see one_thread
        yield start


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What each phase of the runs in this test starts from: first weights, and all that it reads."""
    import fastdistil.train.phases

    seen: dict[str, dict[str, Any]] = {}
    original = fastdistil.train.phases.train

    def spy(phase: Any, accelerator: Any, log: Any) -> None:
        if tmp_path in phase.checkpoints.parents:  # not that of a fixture
            seen[phase.name] = {
                "weights": {name: value.clone() for name, value in phase.model.state_dict().items()},
                "batches": [b for step in range(phase.steps) for b in phase.batches.micro_batches(step)],
                "phase": phase,
            }
        original(phase, accelerator, log)

    monkeypatch.setattr(fastdistil.train.phases, "train", spy)
    return seen


@pytest.fixture
def on_task(
    tasks: Path, task_keys: list[str], finetuned: Callable[[str], Path], tmp_path: Path
) -> Callable[..., Any]:
    """Configuration of a recipe on a task: 6 steps of a student of 2 layers; takes more overrides."""
    from fastdistil.train.config import load_config

    def make(
        recipe: str,
        *more: str,
        task: str = "sst2",
        teacher: Path | None = None,
        output: Path | None = None,
        **keywords: Any,
    ) -> Any:
        keys = ["student.num_layers=2", "student.teacher_layers=null", "run.steps=6", "optimizer.lr=1e-3"]
        return load_config(
            recipe,
            [*task_keys, *keys, *more],
            teacher=str(teacher or finetuned(task)),
            task=task,
            data=str(tasks),
            output=output or tmp_path / "run",
            **keywords,
        )

    return make
