"""Predict whether the second segment of a text follows the first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdistil.errors import UserError
from fastdistil.models.heads import next_sentence_head
from fastdistil.models.taps import Taps
from fastdistil.objectives.base import Objective, ObjectiveLoss, count_rows, weight_per_token

if TYPE_CHECKING:
    from fastdistil.data.masking import MaskedBatch


@dataclass(frozen=True)
class NextSentenceObjective(Objective):
    """`weight` times the mean over the sequences of the cross-entropy of next-sentence prediction.

    BERT's second task (Devlin et al. 2019, section 3.1): from the pooled state of [CLS], class 0 if the
    second segment follows the first and 1 if it is a random one. Needs no teacher. Its term is called
    "next_sentence". The student must have the head for it, as `BertForPreTraining`, and the batch its labels:
    a `UserError` says so.
    """

    weight: float = 1.0

    @property
    def terms(self) -> tuple[str, ...]:
        return ("next_sentence",)

    @property
    def needs_teacher(self) -> bool:
        return False

    def counts(self, batch: "MaskedBatch") -> dict[str, Tensor]:
        return {"next_sentence": count_rows(batch.input_ids)}

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "MaskedBatch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        head = next_sentence_head(student.model)
        pooled = student.pooled
        if head is None or pooled is None:
            raise UserError(
                f"next_sentence needs a model with a head for it, which {type(student.model).__name__} does "
                "not have: take a BertForPreTraining, or leave the objective out"
            )
        if batch.next_sentence is None:
            raise UserError("next_sentence needs text in pairs of segments, and this has single ones")
        logits = nn.functional.linear(pooled, head.weight.to(pooled.dtype), head.bias.to(pooled.dtype))
        total = nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.next_sentence, reduction="sum"
        )
        loss = total * weight_per_token(self.weight, counts["next_sentence"])
        return ObjectiveLoss(loss, {"next_sentence": total.detach()})
