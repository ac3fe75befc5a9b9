"""How well a model does a task: GLUE's metrics, and SQuAD's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdistil.data.batches import to_device
from fastdistil.data.task_batches import read_task_batch, within_budget
from fastdistil.data.task_encoding import EncodedTask
from fastdistil.data.task_windows import Windows
from fastdistil.data.tasks import Task
from fastdistil.errors import UserError
from fastdistil.models.taps import accepted_inputs, task_logits

_MAX_ANSWER = 30  # tokens of a span, as in SQuAD's reference code


def evaluate_task(
    model: Any,
    task: Task,
    data: EncodedTask,
    *,
    dtype: torch.dtype | None = None,
    max_tokens: int = 16384,
) -> dict[str, float]:
    """The task's metrics on `data`, as fractions and correlations, on the model's device.

    The model is put back into the mode it was in.

    Args:
        model: with a head for the task, as transformers' `AutoModelForSequenceClassification` and its
            likes have it.
        dtype: autocast of the forward passes; default the precision of the weights.
        max_tokens: of a batch, padding counted.
    """
    training = model.training
    model.eval()
    try:
        batches = _forward(model, data, dtype, max_tokens)
        if data.windows is not None:
            return _span_scores(data.windows.answers, _answer_texts(data, data.windows, batches))
        logits = np.empty((len(data), task.num_labels), np.float32)
        for rows, batch_logits in batches:
            logits[rows] = batch_logits.reshape(len(rows), -1).float().cpu().numpy()
    finally:
        model.train(training)
    answers = logits[:, 0] if task.kind == "regression" else logits.argmax(axis=1)
    return _scores(task, answers, data.labels)


def mean_score(task: Task, scores: dict[str, float]) -> float:
    """The mean of the task's metrics, which is how GLUE makes one number of two."""
    return sum(scores[name] for name in task.metrics) / len(task.metrics)


def chance_score(task: Task, labels: np.ndarray) -> float:
    """The mean score of one who has not read the texts.

    Of each metric what the best class for it scores, if it is always the answer: the most frequent one for
    accuracy, the positive one for F1. For a choice 1 / C; 0 for correlations and for spans.

    Args:
        labels: (N,) of the examples that a model is scored on.
    """
    if task.kind == "choice":
        return 1 / task.num_labels
    if task.kind != "classification":
        return 0.0
    constant = [_scores(task, np.full_like(labels, number), labels) for number in range(task.num_labels)]
    return mean_score(task, {name: max(scores[name] for scores in constant) for name in task.metrics})


def check_teacher(
    source: str | None,
    task: Task,
    scores: dict[str, float],
    labels: np.ndarray,  # (N,) of the examples that `scores` were taken on
    say: Callable[[str], None],
    *,
    allow_weak: bool,
) -> None:
    """Say what a teacher scores; `UserError` for one no better than chance, unless that is allowed.

    N examples must show more than N^-0.5 above it, which of a few, or of one class, not even 1 would be.
    """
    score, chance = mean_score(task, scores), chance_score(task, labels)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    say(f"teacher {source} on {task.name}: {shown} (chance: {chance:.4f})")
    least = chance + len(labels) ** -0.5
    if least >= 1 and not allow_weak:
        raise UserError(
            f"{len(labels)} validation examples of {task.name} are too few to tell whether teacher {source} "
            f"is above chance, which is {chance:.4f}: give more, or add --allow-weak-teacher"
        )
    # Not "<=": a score that is not a number is weak, too.
    if not score > least and not allow_weak:
        raise UserError(
            f"teacher {source} scores {score:.4f} on {task.name}, and chance is {chance:.4f}: there is "
            f"nothing to learn from it; fine-tune it first (fastdistil train finetune --teacher {source} "
            f"--task {task.argument}), or add --allow-weak-teacher"
        )


def _forward(
    model: Any, data: EncodedTask, dtype: torch.dtype | None, max_tokens: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Rows and their logits, the longest examples first: what does not fit fails at once."""
    device = model.device
    order = np.argsort(-data.lengths, kind="stable")
    for rows in within_budget(data, order, max_tokens):
        batch = to_device(read_task_batch(data, rows), device)
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = model(**accepted_inputs(model, batch.inputs))
            logits = task_logits(output, batch.attention_mask)
        yield rows, logits


def _answer_texts(
    data: EncodedTask, windows: Windows, batches: Iterable[tuple[np.ndarray, Tensor]]
) -> list[str]:
    """Each example's best span of all its windows, as text; "" where the context has no token."""
    answers = [""] * len(windows.contexts)
    best = np.full(len(answers), -np.inf)
    for rows, logits in batches:
        first = torch.from_numpy(data.offsets[rows])
        place = first[:, None] + torch.arange(logits.shape[-1])
        inside = torch.from_numpy(windows.characters[:, 0])[place.clamp(max=len(windows.characters) - 1)] >= 0
        inside &= place < torch.from_numpy(data.offsets[rows + 1])[:, None]
        values, starts, ends = best_spans(logits.float(), inside.to(logits.device))
        for i, (value, start, end) in enumerate(
            zip(values.tolist(), starts.tolist(), ends.tolist(), strict=True)
        ):
            example, token = windows.example[rows[i]], data.offsets[rows[i]]
            if value > best[example]:
                best[example] = value
                begin, stop = windows.characters[token + start, 0], windows.characters[token + end, 1]
                answers[example] = windows.contexts[example][begin:stop]
    return answers


def best_spans(logits: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score, first and last token of each row's best span: max of start[i] + end[j], i <= j < i + 30, both
    in the context (Devlin et al. 2019, section 4.2).

    All pairs are tried, of which the n-best search of SQuAD's reference code tries the 20 x 20 most probable.

    Args:
        logits: (B, 2, L) of starts and ends.
        inside: (B, L) bool, true on tokens of the context.

    Returns:
        (B,) each; the score is -inf where no token is in the context.
    """
    start, end = logits.masked_fill(~inside[:, None], -torch.inf).unbind(1)
    length = start.shape[1]
    score = start.new_full((len(start),), -torch.inf)
    first = last = torch.zeros_like(score, dtype=torch.int64)
    for distance in range(min(_MAX_ANSWER, length)):
        value, place = (start[:, : length - distance] + end[:, distance:]).max(dim=1)
        better = value > score
        score = torch.where(better, value, score)
        first = torch.where(better, place, first)
        last = torch.where(better, place + distance, last)
    return score, first, last


def _span_scores(answers: list[tuple[str, ...]], given: list[str]) -> dict[str, float]:
    from torchmetrics.functional.text import squad

    predictions = [{"id": str(i), "prediction_text": text} for i, text in enumerate(given)]
    targets = [
        {"id": str(i), "answers": {"text": list(right), "answer_start": [0] * len(right)}}
        for i, right in enumerate(answers)
    ]
    per_cent = squad(predictions, targets)  # type: ignore[arg-type]
    return {name: value.item() / 100 for name, value in per_cent.items()}


def _scores(task: Task, answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    given, right = torch.from_numpy(answers), torch.from_numpy(labels)
    if task.kind == "regression":
        given, right = given.double(), right.double()
    return {name: _METRICS[name](given, right) for name in task.metrics}


def _accuracy(answers: Tensor, labels: Tensor) -> float:
    return (answers == labels).double().mean().item()


def _f1(answers: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional.classification import binary_f1_score

    return binary_f1_score(answers, labels).item()


def _macro_f1(answers: Tensor, labels: Tensor) -> float:
    """The mean of the classes' F1, over those that are answered or right."""
    from torchmetrics.functional.classification import multiclass_f1_score

    classes = int(torch.maximum(answers.max(), labels.max())) + 1
    return multiclass_f1_score(answers, labels, max(2, classes), average="macro").item()


def _matthews(answers: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef

    if _constant(answers, labels):
        return 0.0
    classes = int(torch.maximum(answers.max(), labels.max())) + 1
    return multiclass_matthews_corrcoef(answers, labels, classes).item()


def _pearson(answers: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional.regression import pearson_corrcoef

    return 0.0 if _constant(answers, labels) else pearson_corrcoef(answers, labels).item()


def _spearman(answers: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional.regression import spearman_corrcoef

    return 0.0 if _constant(answers, labels) else spearman_corrcoef(answers, labels).item()


def _constant(*values: Tensor) -> bool:
    """Whether one of them never changes. Its correlation is undefined, and taken for what it tells: 0."""
    return any(bool((value == value[0]).all()) for value in values)


_METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
