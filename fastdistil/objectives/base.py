"""What every objective offers to the training loop.

Normalisation is global: the loop adds `counts` over all micro-batches and all processes of one optimiser
step and hands the totals to each `loss`, whose values then simply add up to the step's loss, however it was
split.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from fastdistil.models.taps import Taps

if TYPE_CHECKING:
    from fastdistil.data.masking import MaskedBatch


class ObjectiveLoss(NamedTuple):
    loss: Tensor  # 0-dim, sum over the terms of weight * sum / global count, to be back-propagated
    sums: dict[str, Tensor]  # term -> 0-dim, detached, unweighted sum over this batch, for the logs


class Objective(Protocol):
    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms with a weight above 0: the keys of `counts` and of `ObjectiveLoss.sums`."""

    @property
    def needs_teacher(self) -> bool: ...

    def counts(self, batch: "MaskedBatch") -> dict[str, Tensor]:
        """Term -> how many tokens of this batch it uses, 0-dim int64 on the batch's device (no host sync)."""

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "MaskedBatch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        """This batch's share of the loss, given the counts of the whole optimiser step."""


def weight_per_token(weight: float, count: Tensor) -> Tensor:
    """`weight / count` as a 0-dim float32 tensor; a step without such tokens has sums of 0, which stay 0."""
    return weight / count.clamp(min=1).float()
