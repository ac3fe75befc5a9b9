"""What every objective offers to the training loop.

Normalisation is global: the loop adds `counts` over all micro-batches and all processes of one optimiser
step and hands the totals to each `loss`, whose values then simply add up to the step's loss, however it was
split.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdistil.models.taps import Taps, Wanted

if TYPE_CHECKING:
    from fastdistil.data.batches import Batch

IGNORED = -100  # as a label: nothing to predict there


class ObjectiveLoss(NamedTuple):
    loss: Tensor  # 0-dim, sum over the terms of weight * sum / global count, to be back-propagated
    sums: dict[str, Tensor]  # term -> 0-dim, detached, unweighted sum over this batch, for the logs


class Objective(Protocol):
    """One that learns parameters of its own, such as a projection, is an `nn.Module` too.

    `batch` is what the data gives: each objective names the kind that it needs, most take any.
    """

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms with a weight above 0: the keys of `counts` and of `ObjectiveLoss.sums`."""

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def student_taps(self) -> Wanted:
        """What it compares of the student besides the last hidden states."""
        return Wanted()

    @property
    def teacher_taps(self) -> Wanted:
        return Wanted()

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """Term -> how many tokens, rows or pairs of this batch its mean is over.

        0-dim int64 on the batch's device (no host sync), known before the models run.
        """

    def loss(
        self, student: Taps, teacher: Taps | None, batch: Any, counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        """This batch's share of the loss, given the counts of the whole optimiser step."""


def weight_per_token(weight: float, count: Tensor) -> Tensor:
    """`weight / count` as a 0-dim float32 tensor; a step without such tokens has sums of 0, which stay 0."""
    return weight / count.clamp(min=1).float()


def count_tokens(batch: "Batch") -> Tensor:
    """All tokens but padding, 0-dim int64."""
    return batch.attention_mask.ne(0).sum()


def count_rows(rows: Tensor) -> Tensor:
    """The length of `rows`, 0-dim int64 on their device."""
    return torch.full((), len(rows), dtype=torch.int64, device=rows.device)


def projections(objectives: Iterable[Objective]) -> nn.ModuleList:
    """The objectives that learn parameters of their own."""
    return nn.ModuleList(objective for objective in objectives if isinstance(objective, nn.Module))
