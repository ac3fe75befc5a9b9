"""The losses as modules, with the keywords of the functions fixed at construction."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdistil import functional as F
from fastdistil.ops import checks
from fastdistil.ops.terms import check_settings


class _VocabularyLoss(nn.Module):
    def __init__(
        self,
        *,
        temperature: float = 2.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        divergence: str = "forward_kl",
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        return_terms: bool = False,
    ) -> None:
        super().__init__()
        check_settings(temperature, divergence, jsd_beta, label_smoothing, reduction)
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "kd_weight": kd_weight,
            "ce_weight": ce_weight,
            "divergence": divergence,
            "jsd_beta": jsd_beta,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "return_terms": return_terms,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class KDLoss(_VocabularyLoss):
    """`functional.kd_loss` as a module: `KDLoss(temperature=2.0, ce_weight=0.4)(student_logits,
    teacher_logits, labels)`."""

    def forward(
        self,
        student_logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        labels: Tensor | None = None,  # (...)
        kd_mask: Tensor | None = None,  # (...)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return F.kd_loss(student_logits, teacher_logits, labels, kd_mask=kd_mask, **self.settings)


class LinearKDLoss(_VocabularyLoss):
    """`functional.linear_kd_loss` as a module. The vocabulary matrices belong to the models and are passed to
    each call."""

    def forward(
        self,
        student_hidden: Tensor,  # (..., Ds)
        student_weight: Tensor,  # (V, Ds)
        teacher_hidden: Tensor,  # (..., Dt)
        teacher_weight: Tensor,  # (V, Dt)
        labels: Tensor | None = None,  # (...)
        *,
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
        kd_mask: Tensor | None = None,  # (...)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return F.linear_kd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            kd_mask=kd_mask,
            **self.settings,
        )


class CosineLoss(nn.Module):
    """`functional.cosine_loss` as a module."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        self.reduction = reduction

    def forward(
        self,
        student_hidden: Tensor,  # (..., D)
        teacher_hidden: Tensor,  # (..., D)
        mask: Tensor | None = None,  # (...)
    ) -> Tensor:
        return F.cosine_loss(student_hidden, teacher_hidden, mask, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
