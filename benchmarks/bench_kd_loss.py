"""kd_loss, forward + backward, from logits: KL (or reverse KL, JSD) at T 2 with CE, against
PyTorch and Liger.

The work must read the student's and the teacher's logits and write a gradient of that size: three passes over
(N, V). The bound is torch.add of the two into fresh memory, the same three passes, in the same round.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from harness import Variant, Work, cases, compare, compiled, device
from records import OURS, THREE_PASSES, TWO_PASSES, VOCAB

from fastdistil.functional import kd_loss

TEMPERATURE, KD_WEIGHT, CE_WEIGHT = 2.0, 5.0, 2.0  # DistilBERT's


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    dtype: str = "float32"
    divergence: str = "forward_kl"
    ce: bool = True
    vocab: int = VOCAB
    memory: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab}-{self.dtype}-{self.divergence}{'-ce' if self.ce else ''}"

    def small(self) -> Self:
        return dataclasses.replace(self, rows=min(self.rows, 32))


CPU = [
    Case(256),
    Case(768),
    Case(1024),
    Case(4096, memory=True),
    Case(768, divergence="jsd"),
    Case(1024, "bfloat16"),
]
GPU = [
    Case(4915, "bfloat16"),
    Case(4915, "bfloat16", ce=False),
    Case(256, "bfloat16"),
    Case(1024, "bfloat16"),
    Case(4096, "bfloat16"),
    Case(4915, "bfloat16", divergence="jsd"),
    Case(4915, "float32"),
]
QUICK = [Case(48, vocab=1003, memory=True), Case(33, "bfloat16", "jsd", ce=False, vocab=1000)]


def plain_loss(
    student: torch.Tensor,  # (N, V)
    teacher: torch.Tensor,  # (N, V)
    labels: torch.Tensor | None,  # (N,)
    divergence: str,
) -> torch.Tensor:
    """The loss as it is usually written: a line a term."""
    s, t = student / TEMPERATURE, teacher / TEMPERATURE
    if divergence == "forward_kl":
        kd = F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")
    elif divergence == "reverse_kl":
        kd = F.kl_div(F.log_softmax(t, -1), F.log_softmax(s, -1), log_target=True, reduction="batchmean")
    else:
        log_s, log_t = F.log_softmax(s, -1), F.log_softmax(t, -1)
        log_m = torch.logaddexp(log_s, log_t) - math.log(2)
        kd = 0.5 * (
            F.kl_div(log_m, log_t, log_target=True, reduction="batchmean")
            + F.kl_div(log_m, log_s, log_target=True, reduction="batchmean")
        )
    loss = KD_WEIGHT * TEMPERATURE**2 * kd
    return loss if labels is None else loss + CE_WEIGHT * F.cross_entropy(student, labels)


def upcast_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, divergence: str
) -> torch.Tensor:
    """In float32 whatever the logits' dtype: the accuracy that kd_loss has, and free where it is fused."""
    return plain_loss(student.float(), teacher.float(), labels, divergence)


def liger_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, divergence: str
) -> torch.Tensor:
    """Liger's kernels take log-probabilities, so the softmaxes stay PyTorch's; so does the CE."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    log_s = F.log_softmax(student / TEMPERATURE, -1)
    if divergence == "forward_kl":
        kd = LigerKLDIVLoss(reduction="batchmean")(log_s, F.softmax(teacher / TEMPERATURE, -1))
    else:
        beta = {"reverse_kl": 1.0, "jsd": 0.5}[divergence]
        kd = LigerJSD(beta=beta)(log_s, F.log_softmax(teacher / TEMPERATURE, -1))
    loss = KD_WEIGHT * TEMPERATURE**2 * kd
    return loss if labels is None else loss + CE_WEIGHT * F.cross_entropy(student, labels)


def build(case: Case) -> Work:
    on = device()
    random = torch.Generator(on).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    shape = (case.rows, case.vocab)
    student = (torch.randn(shape, device=on, generator=random) * 2).to(dtype).requires_grad_()
    teacher = (torch.randn(shape, device=on, generator=random) * 2).to(dtype)
    labels = torch.randint(case.vocab, (case.rows,), device=on, generator=random) if case.ce else None
    plain, raw = [student], student.detach()

    def backward(loss: Any) -> Variant:
        return lambda: torch.autograd.grad(loss(student, teacher, labels, case.divergence), plain)

    def ours() -> object:
        loss = kd_loss(
            student,
            teacher,
            labels,
            temperature=TEMPERATURE,
            kd_weight=KD_WEIGHT,
            ce_weight=CE_WEIGHT if case.ce else 0.0,
            divergence=case.divergence,
        )
        return torch.autograd.grad(loss, plain)

    work = Work(
        variants={
            "eager": backward(plain_loss),
            "torch.compile": backward(compiled(upcast_loss)),
            THREE_PASSES: lambda: torch.add(raw, teacher),
            OURS: ours,
        },
        bound=THREE_PASSES,
        bytes_moved=3 * raw.nbytes,
        compiled=frozenset({"torch.compile"}),
    )
    if on.type == "cuda":
        work.variants["Liger"] = backward(liger_loss)
        # Its bandwidth, 2 passes / time, is the machine's; three passes at that rate are the tighter bound.
        into = torch.empty_like(raw)
        work.variants[TWO_PASSES] = lambda: into.copy_(teacher)
    else:
        work.skipped["Liger"] = "its kernels are Triton and need a GPU"
    work.skipped["TRL"] = "1.16 has no divergence of given logits; see linear_kd_loss"
    return work


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_kd_loss(benchmark: Any, case: Case) -> None:
    compare(benchmark, "kd_loss", case, build)
