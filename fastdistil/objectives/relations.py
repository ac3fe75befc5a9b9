"""Make the student's tokens relate to each other as the teacher's do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdistil.errors import UserError
from fastdistil.functional import relation_kl
from fastdistil.models.taps import Taps, Wanted
from fastdistil.objectives.base import Objective, ObjectiveLoss, count_tokens, weight_per_token

if TYPE_CHECKING:
    from fastdistil.data.batches import Batch


@dataclass(frozen=True)
class RelationsObjective(Objective):
    """Weighted sum of the KL divergences of Q-Q, K-K and V-V relations of one layer of each model.

    MiniLMv2 (Wang et al. 2021, section 3.1). Each is a mean over the relation heads and all tokens but
    padding; its term is called "query", "key" or "value", with "_relation". Teacher and student may differ in
    width and in attention heads.

    What lies behind the queries, keys and values of `student_layer`, such as that layer's feed-forward
    network, is not trained.
    """

    student_layer: int  # 0-based
    teacher_layer: int
    num_heads: int = 48
    query_weight: float = 1.0
    key_weight: float = 1.0
    value_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("a relations objective needs query_weight, key_weight or value_weight above 0")

    @property
    def _weights(self) -> dict[str, float]:
        weights = {"query": self.query_weight, "key": self.key_weight, "value": self.value_weight}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(f"{name}_relation" for name in self._weights)

    @property
    def student_taps(self) -> Wanted:
        return Wanted(attention=frozenset({self.student_layer}))

    @property
    def teacher_taps(self) -> Wanted:
        return Wanted(attention=frozenset({self.teacher_layer}))

    def counts(self, batch: "Batch") -> dict[str, Tensor]:
        rows = count_tokens(batch) * self.num_heads
        return dict.fromkeys(self.terms, rows)

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "Batch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        assert teacher is not None
        ours, theirs = student.attention[self.student_layer], teacher.attention[self.teacher_layer]
        losses, sums = [], {}
        for name, weight in self._weights.items():
            term = f"{name}_relation"
            states = ours.relation(name), theirs.relation(name)
            total = relation_kl(*states, self.num_heads, batch.attention_mask, reduction="sum")
            losses.append(total * weight_per_token(weight, counts[term]))
            sums[term] = total.detach()
        return ObjectiveLoss(torch.stack(losses).sum(), sums)
