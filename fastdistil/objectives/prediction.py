"""Match the teacher's predictions of a task, and the task's labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdistil.errors import UserError
from fastdistil.functional import hidden_mse, kd_loss
from fastdistil.models.taps import Taps, Wanted
from fastdistil.objectives.base import IGNORED, Objective, ObjectiveLoss, count_rows, weight_per_token

if TYPE_CHECKING:
    from fastdistil.data.task_batches import TaskBatch


@dataclass(frozen=True)
class PredictionObjective(Objective):
    """`kd_weight * D(teacher, student) + task_weight * (loss on the labels)`, each term a mean.

    D compares the logits of the task head:

    - "kl": T^2 * D(teacher || student) of the softmax at T, over classes or choices (Hinton et al. 2015,
      section 2); of a span over the tokens, a mean over its two ends. At T = 1 it is the soft cross-entropy
      of TinyBERT (Jiao et al. 2020, equation 10) less the entropy of the teacher, which is a constant.
    - "mse": the mean squared error over the classes (Distilled BiLSTM, Tang et al. 2019, section 3.2).

    The loss on the labels is the cross-entropy at T = 1. A regression has squared errors for both, whatever
    `distance` says: its soft targets are the teacher's scores. KD is over all examples; examples without a
    label (-100, or NaN in a regression) are left out of the other term alone. The terms are called "kd" (with
    the factor T^2) and "task".

    Teacher and student must have the same number of classes: a `UserError` says so.
    """

    kd_weight: float = 1.0
    task_weight: float = 0.0
    temperature: float = 2.0
    distance: str = "kl"
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("a prediction objective needs kd_weight or task_weight above 0")
        if self.distance not in ("kl", "mse"):
            raise UserError(f"distance must be 'kl' or 'mse', got {self.distance!r}")

    @property
    def _weights(self) -> dict[str, float]:
        weights = {"kd": self.kd_weight, "task": self.task_weight}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(self._weights)

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0

    @property
    def student_taps(self) -> Wanted:
        return Wanted(logits=True)

    @property
    def teacher_taps(self) -> Wanted:
        return Wanted(logits=self.needs_teacher)

    def counts(self, batch: "TaskBatch") -> dict[str, Tensor]:
        """Examples; the two ends of a span are counted apart."""
        labels = batch.labels.flatten()
        counts = {"kd": count_rows(labels), "task": _labelled(labels).sum()}
        return {term: counts[term] for term in self.terms}

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "TaskBatch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        weights = {term: weight_per_token(weight, counts[term]) for term, weight in self._weights.items()}
        logits, labels = student.logits, batch.labels
        assert logits is not None
        sums = {}
        if self.needs_teacher:
            taught = _teacher_logits(logits, teacher)
            if self.distance == "kl" and not labels.is_floating_point():
                return self._distil(logits, taught, labels, weights)
            sums["kd"] = _squared_error(logits, taught, batch.attention_mask)
        if self.task_weight > 0:
            sums["task"] = task_loss(logits, labels)
        loss = torch.stack([total * weights[term] for term, total in sums.items()]).sum()
        return ObjectiveLoss(loss, {term: total.detach() for term, total in sums.items()})

    def _distil(
        self, logits: Tensor, taught: Tensor, labels: Tensor, weights: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        """Both terms from one read of the logits."""
        with_task = "task" in weights
        loss, kd, task = kd_loss(
            logits,
            taught,
            labels if with_task else None,
            temperature=self.temperature,
            kd_weight=weights["kd"],
            ce_weight=weights.get("task", 0.0),
            divergence=self.divergence,
            jsd_beta=self.jsd_beta,
            kd_mask=torch.ones_like(labels, dtype=torch.bool),
            ignore_index=IGNORED,
            reduction="sum",
            return_terms=True,
        )
        return ObjectiveLoss(loss, {"kd": kd, "task": task} if with_task else {"kd": kd})


def _labelled(labels: Tensor) -> Tensor:
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def _teacher_logits(logits: Tensor, teacher: Taps | None) -> Tensor:
    if teacher is None:
        raise ValueError("a prediction objective with kd_weight > 0 needs the teacher's taps")
    taught = teacher.logits
    assert taught is not None
    if taught.shape != logits.shape:
        raise UserError(
            f"prediction compares class by class, but the student's head has {logits.shape[-1]} classes and "
            f"the teacher's {taught.shape[-1]}: both need a head for the same task"
        )
    return taught


def _squared_error(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over each row's classes, summed over the rows (B, C), or over the tokens of (B, 2, L)."""
    if student.dim() == 2:
        return hidden_mse(student, teacher, reduction="sum") / student.shape[-1]
    tokens = attention_mask.bool().unsqueeze(1).expand(student.shape)
    squares = hidden_mse(student.unsqueeze(-1), teacher.unsqueeze(-1), mask=tokens, reduction="none")
    return (squares.sum(-1) / tokens.sum(-1)).sum()


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, or of float labels squared error, summed over the labelled rows."""
    if labels.is_floating_point():
        return hidden_mse(logits, labels.unsqueeze(-1), mask=_labelled(labels), reduction="sum")
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
