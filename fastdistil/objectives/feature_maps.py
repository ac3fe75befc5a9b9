"""Make the student's layers put out the teacher's feature maps, in direction and in statistics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdistil.errors import UserError
from fastdistil.functional import hidden_mse
from fastdistil.models.layers import LayerPairs
from fastdistil.models.taps import Taps, Wanted
from fastdistil.objectives.base import Objective, ObjectiveLoss, count_tokens, weight_per_token

if TYPE_CHECKING:
    from fastdistil.data.batches import Batch

# Of `tf.contrib.layers.layer_norm`, which MobileBERT's code normalises the feature maps with.
EPS = 1e-12


@dataclass(frozen=True)
class FeatureMapsObjective(Objective):
    """Weighted sum of three distances of the outputs of paired layers, each summed over the pairs.

    The feature map transfer of MobileBERT (Sun et al. 2020, section 3), split as in its code into
    normalised maps and their statistics. With mean m and variance v over the width of a token's states h, and
    n = (h - m) / sqrt(v + 1e-12): ::

        feature_weight * mean of (n_student - n_teacher) ** 2        # over the tokens and the width
        mean_weight * mean of (m_student - m_teacher) ** 2           # over the tokens
        variance_weight * mean of |v_student - v_teacher|            # over the tokens

    Padding does not count. The original compares each layer's statistics with those of all teacher layers;
    here it is the paired layer alone. The terms are called "feature_maps", "feature_mean" and
    "feature_variance". Both models must be equally wide.
    """

    pairs: LayerPairs
    width: int  # of both models
    feature_weight: float = 100.0
    mean_weight: float = 5000.0
    variance_weight: float = 5.0

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError(
                "a feature_maps objective needs feature_weight, mean_weight or variance_weight above 0"
            )

    @property
    def _weights(self) -> dict[str, float]:
        weights = {
            "feature_maps": self.feature_weight,
            "feature_mean": self.mean_weight,
            "feature_variance": self.variance_weight,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(self._weights)

    @property
    def student_taps(self) -> Wanted:
        return Wanted(hidden=frozenset(student for student, _ in self.pairs))

    @property
    def teacher_taps(self) -> Wanted:
        return Wanted(hidden=frozenset(teacher for _, teacher in self.pairs))

    def counts(self, batch: "Batch") -> dict[str, Tensor]:
        """Of one layer pair, so that each layer's mean has the same weight."""
        tokens = count_tokens(batch)
        return {term: tokens * self.width if term == "feature_maps" else tokens for term in self.terms}

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "Batch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        assert teacher is not None
        mask = batch.attention_mask.bool()
        pairs = [(_wide(student.hidden[ours]), _wide(teacher.hidden[theirs])) for ours, theirs in self.pairs]
        losses, sums = [], {}
        for term, weight in self._weights.items():
            distance = _DISTANCES[term]
            total = torch.stack([distance(ours, theirs, mask) for ours, theirs in pairs]).sum()
            losses.append(total * weight_per_token(weight, counts[term]))
            sums[term] = total.detach()
        return ObjectiveLoss(torch.stack(losses).sum(), sums)


def _wide(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def _normalised_maps(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    width = student.shape[-1:]
    ours, theirs = (nn.functional.layer_norm(hidden, width, eps=EPS) for hidden in (student, teacher))
    return hidden_mse(ours, theirs, mask=mask, reduction="sum")


def _means(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    ours, theirs = (hidden.mean(-1, keepdim=True) for hidden in (student, teacher))
    return hidden_mse(ours, theirs, mask=mask, reduction="sum")


def _variances(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    difference = student.var(-1, correction=0) - teacher.var(-1, correction=0)
    return torch.where(mask, difference.abs(), 0.0).sum()


_DISTANCES = {"feature_maps": _normalised_maps, "feature_mean": _means, "feature_variance": _variances}
