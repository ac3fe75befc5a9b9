"""Point the student's last hidden states the way the teacher's point."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fastdistil.errors import UserError
from fastdistil.functional import cosine_loss
from fastdistil.models.taps import Taps
from fastdistil.objectives.base import Objective, ObjectiveLoss, count_tokens, weight_per_token

if TYPE_CHECKING:
    from fastdistil.data.batches import Batch


@dataclass(frozen=True)
class CosineObjective(Objective):
    """`weight * mean(1 - cos(student, teacher))` of the last hidden states of all tokens but padding.

    The third term of DistilBERT (Sanh et al. 2019, section 3). Its term is called "cosine". Both models
    must have the same hidden size: a `UserError` says so.
    """

    weight: float = 1.0

    @property
    def terms(self) -> tuple[str, ...]:
        return ("cosine",)

    def counts(self, batch: "Batch") -> dict[str, Tensor]:
        return {"cosine": count_tokens(batch)}

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "Batch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        if teacher is None:
            raise ValueError("the cosine objective needs the teacher's taps")
        sizes = student.last_hidden.shape[-1], teacher.last_hidden.shape[-1]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the cosine objective needs hidden states of one width, but the student's are "
                f"{sizes[0]} wide and the teacher's {sizes[1]}: leave the objective out"
            )
        total = cosine_loss(student.last_hidden, teacher.last_hidden, batch.attention_mask, reduction="sum")
        return ObjectiveLoss(
            total * weight_per_token(self.weight, counts["cosine"]), {"cosine": total.detach()}
        )
