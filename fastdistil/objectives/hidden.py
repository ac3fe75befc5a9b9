"""Make the student's hidden states those of the teacher, up to a learned projection or up to their length."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdistil.functional import hidden_mse
from fastdistil.models.layers import LayerPairs
from fastdistil.models.taps import Taps, Wanted
from fastdistil.objectives.base import Objective, ObjectiveLoss, count_tokens, weight_per_token

if TYPE_CHECKING:
    from fastdistil.data.masking import MaskedBatch


class HiddenObjective(nn.Module, Objective):
    """`weight` times the sum over the layer pairs of the mean squared error of their outputs.

    With a `projection`, one for all pairs, the student's states go through it first (TinyBERT, Jiao et al.
    2020, equation 8). With `normalize` both states are divided by their L2 norm (BERT-PKD, Sun et al. 2019,
    equation 7). Each mean is over all tokens but padding and over the teacher's width. Its term is called
    "hidden".
    """

    def __init__(
        self,
        pairs: LayerPairs,
        width: int,  # of the teacher
        projection: nn.Linear | None = None,
        normalize: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.pairs = pairs
        self.width = width
        self.projection = projection
        self.normalize = normalize
        self.weight = weight

    @property
    def terms(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def student_taps(self) -> Wanted:
        return Wanted(hidden=frozenset(student for student, _ in self.pairs))

    @property
    def teacher_taps(self) -> Wanted:
        return Wanted(hidden=frozenset(teacher for _, teacher in self.pairs))

    def counts(self, batch: "MaskedBatch") -> dict[str, Tensor]:
        """Of one layer pair, so that each layer's mean has the same weight."""
        return {"hidden": count_tokens(batch) * self.width}

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "MaskedBatch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        assert teacher is not None
        sums = [
            squared_error(
                student.hidden[ours],
                teacher.hidden[theirs],
                batch.attention_mask,
                self.projection,
                self.normalize,
            )
            for ours, theirs in self.pairs
        ]
        total = torch.stack(sums).sum()
        return ObjectiveLoss(
            total * weight_per_token(self.weight, counts["hidden"]), {"hidden": total.detach()}
        )


def squared_error(
    student: Tensor,  # (B, L, Ds)
    teacher: Tensor,  # (B, L, D)
    mask: Tensor,  # (B, L)
    projection: nn.Linear | None,
    normalize: bool = False,
) -> Tensor:
    """Summed over the tokens of `mask` and D."""
    weight, bias = (None, None) if projection is None else (projection.weight, projection.bias)
    return hidden_mse(student, teacher, weight, bias, mask, normalize=normalize, reduction="sum")
