"""Match the teacher's distribution over the vocabulary, and predict the masked tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdistil.errors import UserError
from fastdistil.functional import linear_kd_loss
from fastdistil.models.taps import Taps, flat_rows
from fastdistil.objectives.base import IGNORED, Objective, ObjectiveLoss, count_tokens, weight_per_token

if TYPE_CHECKING:
    from fastdistil.data.masking import MaskedBatch


@dataclass(frozen=True)
class VocabularyObjective(Objective):
    """`kd_weight * T^2 * D(teacher || student) + ce_weight * CE(student, masked tokens)`, each term a mean.

    CE is over the masked tokens. KD (Hinton et al. 2015) is over the same tokens with `positions="masked"`,
    or over all tokens but padding with "all" (Sanh et al. 2019). With "masked" only those rows are gathered
    and sent through the heads; both terms come from one pass over the logits. With `kd_weight=0` it is
    plain masked language modelling and the teacher is not touched. The terms are called "kd" (with the
    factor T^2) and "ce".
    """

    kd_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 2.0
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    positions: str = "masked"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("a vocabulary objective needs kd_weight or ce_weight above 0")
        if self.positions not in ("masked", "all"):
            raise UserError(f"positions must be 'masked' or 'all', got {self.positions!r}")

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(name for name, weight in (("kd", self.kd_weight), ("ce", self.ce_weight)) if weight > 0)

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0

    def counts(self, batch: "MaskedBatch") -> dict[str, Tensor]:
        masked = (batch.position_labels != IGNORED).sum()
        kd = count_tokens(batch) if self.positions == "all" else masked
        return {name: kd if name == "kd" else masked for name in self.terms}

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "MaskedBatch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        if not self.needs_teacher:
            return self._masked_language_model(student, batch, counts["ce"])
        if teacher is None:
            raise ValueError("a vocabulary objective with kd_weight > 0 needs the teacher's taps")
        if self.positions == "all":
            rows, labels, kd_mask = None, batch.labels.flatten(), batch.attention_mask.flatten().ne(0)
        else:
            rows, labels = (
                flat_rows(batch.positions, batch.input_ids.shape[1]),
                batch.position_labels.flatten(),
            )
            kd_mask = labels != IGNORED
        hidden, weight, bias = student.vocabulary_operands(rows)
        teacher_hidden, teacher_weight, teacher_bias = teacher.vocabulary_operands(rows)
        with_ce = "ce" in self.terms
        loss, kd, ce = linear_kd_loss(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            labels if with_ce else None,
            student_bias=bias,
            teacher_bias=teacher_bias,
            chunk_size=self.chunk_size,
            temperature=self.temperature,
            kd_weight=weight_per_token(self.kd_weight, counts["kd"]),
            ce_weight=weight_per_token(self.ce_weight, counts["ce"]) if with_ce else 0.0,
            divergence=self.divergence,
            jsd_beta=self.jsd_beta,
            kd_mask=kd_mask,
            ignore_index=IGNORED,
            reduction="sum",
            return_terms=True,
        )
        return ObjectiveLoss(loss, {"kd": kd, "ce": ce} if with_ce else {"kd": kd})

    def _masked_language_model(self, student: Taps, batch: "MaskedBatch", count: Tensor) -> ObjectiveLoss:
        hidden, weight, bias = student.vocabulary_operands(
            flat_rows(batch.positions, batch.input_ids.shape[1])
        )
        bias = None if bias is None else bias.to(hidden.dtype)
        logits = nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
        ce = nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            batch.position_labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        return ObjectiveLoss(ce * weight_per_token(self.ce_weight, count), {"ce": ce.detach()})
