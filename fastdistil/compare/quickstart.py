"""`fastdistil compare quickstart`: all methods on a small teacher and a task that are made here, in minutes.

The teacher is a BERT of 6 layers × 192 with a WordPiece vocabulary of its own, trained from random weights to
tell which library a sentence of documentation comes from (`fastdistil.data.machine_task`): no network and no
file of the user's is needed. It and its run lie beside the comparison's folder, in OUTPUT-teacher, where they
are found again by the next comparison.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdistil.compare.results import Comparison
from fastdistil.compare.run import CompareConfig, compare
from fastdistil.compare.steps import parse_chains
from fastdistil.errors import UserError
from fastdistil.train.checkpoint import save_model

TASK = "libraries"
METHODS = (
    "kd:3-layers",
    "prune-layers:2",
    "prune-heads:0.5",
    "prune-ffn:0.5",
    "prune-magnitude:0.8",
    "prune-2of4",
    "low-rank:0.25",
    "factorize-embeddings:48",
    "share-layers:2",
    "cluster:3",
    "int8",
    "bf16",
    "prune-ffn:0.5+onnx-int8",
    "kd:3-layers+onnx-int8",
    "kd:3-layers+prune-ffn:0.5+onnx-int8",
)
_VOCAB_SIZE = 6000
_POSITIONS = 128  # what models are timed at; the sentences are far shorter
_SIZES = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "max_position_embeddings": _POSITIONS,
}
_TEACHER = (
    "optimizer.lr=1e-3",
    "run.batch_size=64",
    "run.epochs=2",
    "run.log_every=100",
    f"task.max_length={_POSITIONS}",
)
# Of the distillation and of every recovery: a quarter of the examples, once. That is an epoch, so that the
# teacher is asked about each example once for all methods.
_BUDGET = (
    "train.task.max_examples=6400",
    "train.run.epochs=1",
    "train.run.batch_size=64",
    "train.run.log_every=100",
    "train.optimizer.lr=3e-4",
)
_ROUNDS = 5


def compare_quickstart(
    output: Path,
    methods: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 1,
    rounds: int | None = None,
) -> Comparison:
    """Make the teacher, unless it is there, and compare `methods` (default `METHODS`) on it.

    Raises what `compare` does, and UserError where OUTPUT-teacher holds something else.
    """
    config = quickstart_config(output, methods, overrides, seeds=seeds, rounds=rounds)
    make_teacher(_teacher_folder(config.output))
    return compare(config)


def quickstart_config(
    output: Path,
    methods: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 1,
    rounds: int | None = None,
) -> CompareConfig:
    """What the comparison is of. The user's `overrides` go after the quickstart's own."""
    output = output.expanduser()
    names = list(METHODS if methods is None else methods)
    # An override must be of use to a step, and some steps do not train.
    budget = _BUDGET if any(chain.trains for chain in parse_chains(names)) else ()
    return CompareConfig(
        teacher=str(_teacher_folder(output) / "model"),
        task=TASK,
        methods=names,
        output=output,
        seeds=seeds,
        overrides=[*budget, *overrides],
        rounds=rounds or _ROUNDS,
    )


def make_teacher(folder: Path) -> None:
    """Train the teacher, `folder`/model, or go on with that; nothing is done where it is finished."""
    if (folder / "results.json").exists() and (folder / "model").exists():
        return
    from fastdistil.train.config import load_config
    from fastdistil.train.run import CONFIG, run

    start = folder.with_name(f"{folder.name}-start")
    config = load_config("finetune", _TEACHER, teacher=str(start), task=TASK, output=folder)
    resume = (folder / CONFIG).exists()
    if not start.exists():
        if resume:
            raise UserError(f"{folder} is another run, or {start}, which it began with, is gone: remove it")
        _make_start(start)
    run(config, resume=resume)
    shutil.rmtree(start)


def _make_start(folder: Path) -> None:
    """An encoder of random weights, the same ones every time, and a vocabulary of the training sentences."""
    from transformers import BertConfig, BertModel

    from fastdistil.data.tasks import find_task, read_examples
    from fastdistil.data.tokenizer import train_wordpiece

    sentences = [sentence for (sentence,) in read_examples(find_task(TASK), None, "train").texts]
    tokenizer = train_wordpiece(sentences, _VOCAB_SIZE, max_length=_POSITIONS)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **_SIZES}
    torch.manual_seed(0)
    save_model(BertModel(BertConfig(**sizes)), tokenizer, folder)


def _teacher_folder(output: Path) -> Path:
    named = output.resolve() if output.name in ("", "..") else output
    return named.with_name(f"{named.name}-teacher")
