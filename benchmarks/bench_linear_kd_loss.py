"""linear_kd_loss, forward + backward, from hidden states: KL at T 2 with CE and biases, against
PyTorch, Liger and TRL.

The work cannot do without four matrix products: both projections (N, D) x (D, V), and the gradients of the
hidden states and of the vocabulary matrix. The bound is those four, bare, into memory that is already there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from bench_kd_loss import CE_WEIGHT, KD_WEIGHT, TEMPERATURE, plain_loss, upcast_loss
from harness import Variant, Work, cases, compare, compiled, device
from records import FOUR_PRODUCTS, LIGER_JSD, OURS, VOCAB

from fastdistil.functional import linear_kd_loss
from fastdistil.ops.matmul import native_bf16_products

LIGER_CHUNKED = "Liger, chunked JSD loss"


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    dim: int
    dtype: str = "float32"
    # False is the work that all rivals can do: no CE and no biases.
    ce_and_bias: bool = True
    vocab: int = VOCAB
    memory: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.dim}-{self.dtype}{'' if self.ce_and_bias else '-kl-only'}"

    def small(self) -> Self:
        return dataclasses.replace(self, rows=min(self.rows, 32))


CPU = [
    Case(256, 384),
    Case(256, 768),
    Case(256, 768, "bfloat16"),
    Case(1024, 384),
    Case(1024, 768),
    Case(2048, 384),
    Case(4096, 768, memory=True),
    Case(4096, 768, "bfloat16"),
]
GPU = [
    Case(4915, 768, "bfloat16"),
    Case(4915, 768, "bfloat16", ce_and_bias=False),
    Case(256, 768, "bfloat16"),
    Case(1024, 768, "bfloat16"),
    Case(4096, 384, "bfloat16"),
    Case(4096, 768, "bfloat16"),
]
QUICK = [Case(48, 64, vocab=1003, memory=True), Case(33, 64, ce_and_bias=False, vocab=1000)]


@dataclasses.dataclass
class Inputs:
    student_hidden: torch.Tensor  # (N, D)
    student_weight: torch.Tensor  # (V, D)
    student_bias: torch.Tensor | None  # (V,)
    teacher_hidden: torch.Tensor  # (N, D)
    teacher_weight: torch.Tensor  # (V, D)
    teacher_bias: torch.Tensor | None  # (V,)
    labels: torch.Tensor | None  # (N,)

    def trained(self) -> list[torch.Tensor]:
        given = (self.student_hidden, self.student_weight, self.student_bias)
        return [tensor for tensor in given if tensor is not None]


def make_inputs(case: Case) -> Inputs:
    on = device()
    random = torch.Generator(on).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=on, generator=random) * scale).to(dtype)

    weight_scale = 2 * case.dim**-0.5  # logits with a standard deviation of 2
    inputs = Inputs(
        student_hidden=normal(case.rows, case.dim),
        student_weight=normal(case.vocab, case.dim, scale=weight_scale),
        student_bias=normal(case.vocab) if case.ce_and_bias else None,
        teacher_hidden=normal(case.rows, case.dim),
        teacher_weight=normal(case.vocab, case.dim, scale=weight_scale),
        teacher_bias=normal(case.vocab) if case.ce_and_bias else None,
        labels=torch.randint(case.vocab, (case.rows,), device=on, generator=random)
        if case.ce_and_bias
        else None,
    )
    for tensor in inputs.trained():
        tensor.requires_grad_()
    return inputs


def ours(x: Inputs) -> torch.Tensor:
    loss = linear_kd_loss(
        x.student_hidden,
        x.student_weight,
        x.teacher_hidden,
        x.teacher_weight,
        x.labels,
        student_bias=x.student_bias,
        teacher_bias=x.teacher_bias,
        temperature=TEMPERATURE,
        kd_weight=KD_WEIGHT,
        ce_weight=CE_WEIGHT if x.labels is not None else 0.0,
    )
    assert isinstance(loss, torch.Tensor)
    return loss


def project(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if device().type == "cpu" and not native_bf16_products(
        device()
    ):  # what anyone would do here: the products are 50 times faster
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    return F.linear(hidden, weight, bias)


def plain_linear(x: Inputs) -> torch.Tensor:
    student = project(x.student_hidden, x.student_weight, x.student_bias)
    teacher = project(x.teacher_hidden, x.teacher_weight, x.teacher_bias)
    return plain_loss(student, teacher, x.labels, "forward_kl")


def compiled_linear() -> Callable[[Inputs], torch.Tensor]:
    loss = compiled(upcast_loss)  # the products are the library's either way

    def call(x: Inputs) -> torch.Tensor:
        student = project(x.student_hidden, x.student_weight, x.student_bias)
        teacher = project(x.teacher_hidden, x.teacher_weight, x.teacher_bias)
        return loss(student, teacher, x.labels, "forward_kl")

    return call


def liger_chunked() -> Callable[[Inputs], torch.Tensor]:
    """PyTorch operations in compiled chunks, on any device. It has no T², so its weight carries it."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=CE_WEIGHT,
        weight_soft_loss=KD_WEIGHT * TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
    )

    def call(x: Inputs) -> torch.Tensor:
        value: torch.Tensor = loss(
            x.student_hidden,
            x.student_weight,
            x.teacher_hidden,
            x.teacher_weight,
            x.labels,
            x.student_bias,
            x.teacher_bias,
        )
        return value

    return call


def liger_triton() -> Callable[[Inputs], torch.Tensor]:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)

    def call(x: Inputs) -> torch.Tensor:
        value: torch.Tensor = loss(
            x.student_hidden, x.student_weight, x.teacher_hidden, x.teacher_weight, None
        )
        return KD_WEIGHT * TEMPERATURE**2 * value

    return call


def trl() -> Callable[[Inputs], torch.Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def call(x: Inputs) -> torch.Tensor:
        rows, _ = ChunkedDivergenceFunction.apply(
            x.student_hidden,
            x.student_weight,
            x.student_bias,
            x.teacher_hidden,
            x.teacher_weight,
            x.teacher_bias,
            0.0,
            TEMPERATURE,
        )
        return KD_WEIGHT * TEMPERATURE**2 * rows.mean()

    return call


def bare_products(x: Inputs) -> Callable[[], None]:
    dtype = x.student_hidden.dtype if native_bf16_products(device()) else torch.float32
    h_s, w_s, h_t, w_t = (
        tensor.detach().to(dtype)
        for tensor in (x.student_hidden, x.student_weight, x.teacher_hidden, x.teacher_weight)
    )
    logits = torch.empty(len(h_s), len(w_s), dtype=dtype, device=h_s.device)
    gradient = (h_t @ w_t.t()).mul_(0.01)
    grad_hidden, grad_weight = torch.empty_like(h_s), torch.empty_like(w_s)

    def run() -> None:
        torch.mm(h_s, w_s.t(), out=logits)
        torch.mm(h_t, w_t.t(), out=logits)
        torch.mm(gradient, w_s, out=grad_hidden)
        torch.mm(gradient.t(), h_s, out=grad_weight)

    return run


def build(case: Case) -> Work:
    x = make_inputs(case)
    work = Work(
        variants={},
        bound=FOUR_PRODUCTS,
        flops=4 * 2 * case.rows * case.vocab * case.dim,
        compiled=frozenset({"torch.compile", LIGER_CHUNKED}),
    )
    losses: dict[str, Callable[[Inputs], torch.Tensor]] = {"eager": plain_linear}
    losses["torch.compile"] = compiled_linear()

    def rival(name: str, make: Callable[[], Callable[[Inputs], torch.Tensor]]) -> None:
        try:
            losses[name] = make()
        except ImportError as error:
            work.skipped[name] = f"not installed ({error})"

    if case.ce_and_bias and case.dim == 768:
        rival(LIGER_CHUNKED, liger_chunked)
    if case.ce_and_bias:
        work.skipped[LIGER_JSD] = work.skipped["TRL"] = "no CE (and Liger no bias): measured on the KL alone"
    elif device().type == "cuda":
        rival(LIGER_JSD, liger_triton)
        rival("TRL", trl)
    else:
        work.skipped[LIGER_JSD] = "its kernels are Triton and need a GPU"
        rival("TRL", trl)
    losses[OURS] = ours

    trained = x.trained()

    def backward(loss: Callable[[Inputs], torch.Tensor]) -> Variant:
        return lambda: torch.autograd.grad(loss(x), trained)

    work.variants = {name: backward(loss) for name, loss in losses.items()}
    work.variants[FOUR_PRODUCTS] = bare_products(x)
    if case.dtype == "bfloat16" and not native_bf16_products(device()):
        work.notes["bfloat16"] = (
            "this CPU has no bfloat16 matrix instructions (2 GFLOP/s), so everyone's products, the bare four "
            "too, run in float32 on upcast copies; the ratio to bare bfloat16 products is not measurable here"
        )
    return work


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_linear_kd_loss(benchmark: Any, case: Case) -> None:
    compare(benchmark, "linear_kd_loss", case, build)
