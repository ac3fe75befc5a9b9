"""Everything `fastdistil evaluate` tells of one model: quality on text or on a task, and cost."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdistil.compress.store import is_compressed, load
from fastdistil.data.corpus import open_corpus
from fastdistil.data.task_encoding import encode
from fastdistil.data.tasks import Task, find_task, read_examples
from fastdistil.data.token_store import cached_token_store, open_token_store
from fastdistil.data.tokenizer import TokenizerFacts
from fastdistil.errors import UserError
from fastdistil.evaluate.cost import (
    BATCH_SIZES,
    LENGTH,
    Latency,
    bytes_on_disk,
    count_parameters,
    measure_latency,
    measure_peak_memory,
    model_folder,
)
from fastdistil.evaluate.masked_lm import MaskedLMScore, evaluate_masked_lm
from fastdistil.evaluate.task import chance_score, evaluate_task, mean_score
from fastdistil.models.load import load_masked_lm, max_positions
from fastdistil.models.task import load_task_model


@dataclass(frozen=True)
class TextQuality:
    """How well a model predicts masked tokens of held-out text."""

    score: MaskedLMScore
    sequences: int  # that the score was taken on

    def rows(self) -> Iterator[tuple[str, str]]:
        """Label and value, with its unit."""
        score = self.score
        yield "held-out text", f"{score.tokens:,} masked tokens of {self.sequences:,} sequences"
        yield "loss", f"{score.loss:.4f} nats a token"
        yield "accuracy", f"{score.accuracy:.2%}"
        yield "perplexity", f"{score.perplexity:.2f}"
        if score.next_sentence_accuracy is not None:
            yield "next-sentence accuracy", f"{score.next_sentence_accuracy:.2%}"

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self.score), "perplexity": self.score.perplexity, "sequences": self.sequences}


@dataclass(frozen=True)
class TaskQuality:
    """How well a model does a task."""

    task: Task
    split: str
    scores: dict[str, float]  # fractions and correlations
    mean: float
    chance: float  # `mean` of one who has not read the texts
    examples: int
    left_out: int  # incomplete
    texts: int  # of which each option of a choice is one
    truncated: int  # of these; of a span task, whose contexts are read in windows, questions that were cut
    max_length: int  # tokens

    def rows(self) -> Iterator[tuple[str, str]]:
        """Label and value, with its unit; GLUE, too, shows its correlations in per cent."""
        left_out = f", {self.left_out:,} incomplete ones left out" if self.left_out else ""
        yield "task", f"{self.task.name}, {self.examples:,} examples of split {self.split}{left_out}"
        if self.task.kind == "span":
            rest = f"questions; contexts are read in windows of {self.max_length} tokens"
        else:
            rest = f"texts, to {self.max_length} tokens"
        yield "truncated", f"{self.truncated:,} of {self.texts:,} {rest}"
        for metric, value in self.scores.items():
            yield {"f1": "F1"}.get(metric, metric.replace("_", " ")), f"{value:.2%}"
        if len(self.scores) > 1:
            yield "mean", f"{self.mean:.2%}"
        yield "chance", f"{self.chance:.2%}"

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            **{name: value for name, value in vars(self).items() if name != "task"},
            "name": self.task.name,
        }


@dataclass(frozen=True)
class Summary:
    """Quality is None where it was not asked for. Cost is that of the encoder, by device."""

    source: str
    parameters: int
    disk_bytes: int
    quality: TextQuality | TaskQuality | None
    latency: dict[str, list[Latency]]
    peak_bytes: dict[str, int]  # at the largest of the batch sizes

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, with its unit."""
        rows = [
            ("model", self.source),
            ("parameters", f"{self.parameters / 1e6:.2f} M"),
            ("size on disk", f"{self.disk_bytes / 1e6:.1f} MB"),
        ]
        if self.quality is None:
            rows.append(("quality", "not measured: give --corpus or --task"))
        else:
            rows += self.quality.rows()
        for device, latencies in self.latency.items():
            rows += [
                (
                    f"latency, {device}",
                    f"p50 {latency.p50_ms:.2f} ms, p95 {latency.p95_ms:.2f} ms at {latency.batch_size} × "
                    f"{latency.length} tokens" + (f", {latency.threads} threads" if device == "cpu" else ""),
                )
                for latency in latencies
            ]
            shape = f"{latencies[-1].batch_size} × {latencies[-1].length}"
            rows.append(
                (f"peak memory, {device}", f"{self.peak_bytes[device] / 1e6:.1f} MB at {shape} tokens")
            )
        return rows

    def plain(self) -> dict[str, Any]:
        """JSON-able: `task` or `text`, where one was asked for, and the cost."""
        kind = "task" if isinstance(self.quality, TaskQuality) else "text"
        return {
            "model": self.source,
            "parameters": self.parameters,
            "disk_bytes": self.disk_bytes,
            **({} if self.quality is None else {kind: self.quality.plain()}),
            "latency": {device: [asdict(one) for one in all_] for device, all_ in self.latency.items()},
            "peak_bytes": self.peak_bytes,
        }


def summarize(
    source: str,
    corpus: str | None,
    *,
    max_length: int | None = None,
    max_sequences: int = 2000,
    text_column: str = "text",
    split: str = "test",
) -> Summary:
    """Measure the masked language model of a `transformers` folder or of the hub.

    Args:
        corpus: held-out text as `open_corpus` takes it, or a prepared token store; None: cost alone, of a
            model of any kind, compressed or not. A store of sentence pairs also gives the accuracy of a
            model's next-sentence head.
        max_length: tokens a sequence, of the score; None: 128, or what the model has positions for.
        max_sequences: the score is taken on the corpus's first so many.
        text_column, split: as of `open_corpus`.

    Raises:
        UserError: model or corpus cannot be read, or do not fit each other.
    """
    if corpus is None:
        model = load(source, dtype=None if is_compressed(source) else torch.float32)
        _length(source, model, max_length, LENGTH)
        return _summary(source, model, None)
    model, tokenizer = load_masked_lm(source, next_sentence=True)
    length = _length(source, model, max_length, LENGTH)
    if (Path(corpus).expanduser() / "meta.json").is_file():
        store = open_token_store(corpus, tokenizer, max_length=length)
    else:
        text = open_corpus(corpus, text_column=text_column, split=split)
        store = cached_token_store(text, tokenizer, max_length=length, max_sequences=max_sequences)
    sequences = min(len(store), max_sequences)
    facts = TokenizerFacts.from_tokenizer(tokenizer)
    score = evaluate_masked_lm(model.to(_devices()[-1]), facts, store, np.arange(sequences))
    return _summary(source, model, TextQuality(score, sequences))


def summarize_task(
    source: str, task: str, data: str | None, *, max_length: int | None = None, split: str = "validation"
) -> Summary:
    """Measure the model of a `transformers` folder or of the hub on a task that it has a head for.

    Args:
        task: its name, as of `find_task`.
        data, split: as of `read_examples`.
        max_length: tokens of an example, longer ones are truncated; None: 128, of a span task 384, or what
            the model has positions for.

    Raises:
        UserError: an unknown task, files that cannot be read or lack the split, a model without a head for
            the task.
    """
    found = find_task(task)
    examples = read_examples(found, data, split)
    model, tokenizer = load_task_model(source, found, new_head=False)
    length = _length(source, model, max_length, found.usual_length)
    encoded = encode(found, examples, tokenizer, length)
    scores = evaluate_task(model.to(_devices()[-1]), found, encoded)
    quality = TaskQuality(
        task=found,
        split=examples.split,
        scores=scores,
        mean=mean_score(found, scores),
        chance=chance_score(found, encoded.labels),
        examples=len(examples),
        left_out=examples.left_out,
        texts=len(examples) * encoded.num_choices,
        truncated=encoded.truncated,
        max_length=length,
    )
    return _summary(source, model, quality)


def _summary(source: str, model: Any, quality: TextQuality | TaskQuality | None) -> Summary:
    folder = model_folder(source)
    length = min(LENGTH, max_positions(model))
    latency, peak = {}, {}
    for device in _devices():
        latency[device] = measure_latency({source: model.to(device)}, length=length)[source]
        peak[device] = measure_peak_memory(folder, batch_size=max(BATCH_SIZES), length=length, device=device)
    return Summary(source, count_parameters(model), bytes_on_disk(folder), quality, latency, peak)


def _length(source: str, model: Any, wanted: int | None, usual: int) -> int:
    positions = max_positions(model)
    length = wanted or min(usual, positions)
    if length > positions:
        raise UserError(f"max_length is {length}, but {source} has only {positions} positions")
    return length


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
