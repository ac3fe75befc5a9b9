"""Make the student attend to what the teacher attends to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fastdistil.errors import UserError
from fastdistil.functional import attention_kl, attention_mse
from fastdistil.models.layers import LayerPairs
from fastdistil.models.taps import Taps, Wanted
from fastdistil.objectives.base import Objective, ObjectiveLoss, count_tokens, weight_per_token

if TYPE_CHECKING:
    from fastdistil.data.batches import Batch


@dataclass(frozen=True)
class AttentionTransferObjective(Objective):
    """`weight` times the sum over the layer pairs of the distance of their attention.

    The distance is the mean squared error of the raw scores over heads and pairs of tokens ("mse": TinyBERT,
    Jiao et al. 2020, equation 7), or the mean over heads and tokens of KL(teacher || student) of the
    attention distributions ("kl": MobileBERT, Sun et al. 2020, section 3). Padding counts neither as query
    nor as key. Both models must have the same number of heads, and see whole sequences in these layers. Its
    term is called "attention".
    """

    pairs: LayerPairs
    num_heads: int  # of both models
    distance: Literal["mse", "kl"] = "mse"
    weight: float = 1.0

    @property
    def terms(self) -> tuple[str, ...]:
        return ("attention",)

    @property
    def student_taps(self) -> Wanted:
        return Wanted(attention=frozenset(student for student, _ in self.pairs))

    @property
    def teacher_taps(self) -> Wanted:
        return Wanted(attention=frozenset(teacher for _, teacher in self.pairs))

    def counts(self, batch: "Batch") -> dict[str, Tensor]:
        """Of one layer pair, so that each layer's mean has the same weight."""
        if self.distance == "kl":
            return {"attention": count_tokens(batch) * self.num_heads}
        return {"attention": batch.attention_mask.ne(0).sum(1).square().sum() * self.num_heads}

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "Batch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        assert teacher is not None
        distance = attention_mse if self.distance == "mse" else attention_kl
        sums = []
        for student_layer, teacher_layer in self.pairs:
            ours, theirs = student.attention[student_layer], teacher.attention[teacher_layer]
            if ours.window is not None or theirs.window is not None:
                raise UserError(
                    f"attention_transfer compares whole maps, but layer {student_layer} of the student or "
                    f"{teacher_layer} of the teacher sees only a window of each sequence: pair layers with "
                    "full attention, by a list of [student, teacher] layers"
                )
            sums.append(
                distance(
                    ours.query,
                    ours.key,
                    theirs.query,
                    theirs.key,
                    batch.attention_mask,
                    student_scale=ours.scale,
                    teacher_scale=theirs.scale,
                    reduction="sum",
                )
            )
        total = torch.stack(sums).sum()
        loss = total * weight_per_token(self.weight, counts["attention"])
        return ObjectiveLoss(loss, {"attention": total.detach()})
