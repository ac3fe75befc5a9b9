"""Make the student's hidden states those of the teacher, up to a learned projection or up to their length."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fastdistil.functional import hidden_mse
from fastdistil.models.layers import LayerPairs
from fastdistil.models.taps import Taps, Wanted
from fastdistil.objectives.base import Objective, ObjectiveLoss, count_rows, count_tokens, weight_per_token

if TYPE_CHECKING:
    from fastdistil.data.batches import Batch


class HiddenObjective(nn.Module, Objective):
    """`weight` times the sum or the mean over the layer pairs of the mean squared error of their outputs.

    With a `projection`, one for all pairs, the student's states go through it first (TinyBERT, Jiao et al.
    2020, equation 8: the sum over layers). With `normalize` both states are divided by their L2 norm
    (BERT-PKD, Sun et al. 2019, equation 7: of the first tokens, [CLS]; the mean over layers in its code).
    The mean squared error of a pair is a mean over all tokens but padding, or over the first one of each
    sequence, and over the teacher's width. Its term is called "hidden".
    """

    def __init__(
        self,
        pairs: LayerPairs,
        width: int,  # of the teacher
        projection: nn.Linear | None = None,
        normalize: bool = False,
        weight: float = 1.0,
        tokens: Literal["all", "first"] = "all",
        layer_reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__()
        self.pairs = pairs
        self.width = width
        self.projection = projection
        self.normalize = normalize
        self.weight = weight
        self.tokens = tokens
        self.layer_reduction = layer_reduction

    @property
    def terms(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def student_taps(self) -> Wanted:
        return Wanted(hidden=frozenset(student for student, _ in self.pairs))

    @property
    def teacher_taps(self) -> Wanted:
        return Wanted(hidden=frozenset(teacher for _, teacher in self.pairs))

    def counts(self, batch: "Batch") -> dict[str, Tensor]:
        """Of one layer pair, so that each layer's mean has the same weight."""
        tokens = count_rows(batch.input_ids) if self.tokens == "first" else count_tokens(batch)
        return {"hidden": tokens * self.width}

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "Batch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        assert teacher is not None
        # A slice: the op reads the first tokens where they lie.
        which = slice(1) if self.tokens == "first" else slice(None)
        sums = [
            squared_error(
                student.hidden[ours][:, which],
                teacher.hidden[theirs][:, which],
                batch.attention_mask[:, which],
                self.projection,
                self.normalize,
            )
            for ours, theirs in self.pairs
        ]
        over_layers = torch.stack(sums)
        total = over_layers.mean() if self.layer_reduction == "mean" else over_layers.sum()
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
