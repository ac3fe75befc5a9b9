"""Make what enters the student's first layer what enters the teacher's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastdistil.models.taps import Taps, Wanted
from fastdistil.objectives.base import Objective, ObjectiveLoss, count_tokens, weight_per_token
from fastdistil.objectives.hidden import squared_error

if TYPE_CHECKING:
    from fastdistil.data.batches import Batch


class EmbeddingsObjective(nn.Module, Objective):
    """`weight` times the mean squared error of the embeddings, over all tokens but padding and the width.

    TinyBERT (Jiao et al. 2020, equation 9). Embeddings are what enters the first layer: of word, position and
    type, normalised. The student's go through `projection`, which may be that of a `HiddenObjective`, as in
    TinyBERT's code. Its term is called "embeddings".
    """

    def __init__(
        self,
        width: int,  # of the teacher
        projection: nn.Linear | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.width = width
        self.projection = projection
        self.weight = weight

    @property
    def terms(self) -> tuple[str, ...]:
        return ("embeddings",)

    @property
    def student_taps(self) -> Wanted:
        return Wanted(embeddings=True)

    @property
    def teacher_taps(self) -> Wanted:
        return Wanted(embeddings=True)

    def counts(self, batch: "Batch") -> dict[str, Tensor]:
        return {"embeddings": count_tokens(batch) * self.width}

    def loss(
        self, student: Taps, teacher: Taps | None, batch: "Batch", counts: Mapping[str, Tensor]
    ) -> ObjectiveLoss:
        assert teacher is not None
        assert student.embeddings is not None
        assert teacher.embeddings is not None
        total = squared_error(student.embeddings, teacher.embeddings, batch.attention_mask, self.projection)
        return ObjectiveLoss(
            total * weight_per_token(self.weight, counts["embeddings"]), {"embeddings": total.detach()}
        )
