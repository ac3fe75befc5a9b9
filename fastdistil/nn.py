"""The losses as modules, with the keywords of the functions fixed at construction."""

from __future__ import annotations

from collections.abc import Callable
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

    def __init__(self, *, chunk_size: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        checks.check_chunk_size(chunk_size)
        self.settings["chunk_size"] = chunk_size

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


class _ReducedLoss(nn.Module):
    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class CosineLoss(_ReducedLoss):
    """`functional.cosine_loss` as a module."""

    def forward(
        self,
        student_hidden: Tensor,  # (..., D)
        teacher_hidden: Tensor,  # (..., D)
        mask: Tensor | None = None,  # (...)
    ) -> Tensor:
        return F.cosine_loss(student_hidden, teacher_hidden, mask, reduction=self.reduction)


class HiddenMSE(_ReducedLoss):
    """`functional.hidden_mse` as a module. The projection belongs to the caller, as a rule a
    `torch.nn.Linear`, whose weight and bias are passed to each call."""

    def __init__(self, *, normalize: bool = False, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.normalize = normalize

    def forward(
        self,
        student_hidden: Tensor,  # (..., Ds)
        teacher_hidden: Tensor,  # (..., D)
        projection: Tensor | None = None,  # (D, Ds)
        bias: Tensor | None = None,  # (D,)
        mask: Tensor | None = None,  # (...)
    ) -> Tensor:
        return F.hidden_mse(
            student_hidden,
            teacher_hidden,
            projection,
            bias,
            mask,
            normalize=self.normalize,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}, {super().extra_repr()}"


class _AttentionLoss(_ReducedLoss):
    _function: Callable[..., Tensor]

    def __init__(
        self,
        *,
        student_scale: float | None = None,
        teacher_scale: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        self.scales = {"student_scale": student_scale, "teacher_scale": teacher_scale}

    def forward(
        self,
        student_q: Tensor,  # (B, H, L, ds)
        student_k: Tensor,  # (B, H, L, ds)
        teacher_q: Tensor,  # (B, H, L, dt)
        teacher_k: Tensor,  # (B, H, L, dt)
        mask: Tensor | None = None,  # (B, L) or (B, L, L)
    ) -> Tensor:
        inputs = student_q, student_k, teacher_q, teacher_k, mask
        return self._function(*inputs, reduction=self.reduction, **self.scales)

    def extra_repr(self) -> str:
        scales = (f"{name}={scale!r}" for name, scale in self.scales.items())
        return ", ".join([*scales, super().extra_repr()])


class AttentionMSE(_AttentionLoss):
    """`functional.attention_mse` as a module."""

    _function = staticmethod(F.attention_mse)


class AttentionKL(_AttentionLoss):
    """`functional.attention_kl` as a module."""

    _function = staticmethod(F.attention_kl)


class RelationKL(_ReducedLoss):
    """`functional.relation_kl` as a module: `RelationKL(48)(student_values, teacher_values, mask)`."""

    def __init__(self, num_heads: int, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.num_heads = num_heads

    def forward(
        self,
        student_states: Tensor,  # (B, L, Ds)
        teacher_states: Tensor,  # (B, L, Dt)
        mask: Tensor | None = None,  # (B, L)
    ) -> Tensor:
        return F.relation_kl(student_states, teacher_states, self.num_heads, mask, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {super().extra_repr()}"
