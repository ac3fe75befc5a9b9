"""attention_kl, forward + backward: KL of the student's attention distributions from the teacher's, against
attention maps in PyTorch, eager and compiled, row blocks that are computed again in the backward, and the
loss composed of flash attention passes.

The work cannot do without four matrix products a head: both models' scores, and the gradients of the
student's queries and keys. The bound is those four, bare, as many heads at a time as keep a map in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention import Case, Inputs, bare_map_products, make_inputs
from harness import Variant, Work, cases, compare, compiled, device, matrix_rate
from records import FLASH, FOUR_PRODUCTS, OURS, ROW_BLOCKS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdistil.functional import attention_kl

aten = torch.ops.aten

CPU = [
    Case(8, 128),
    Case(8, 512, memory=True),
    Case(8, 512, masked=True),
    Case(4, 1024, memory=True),
]
GPU = [Case(32, 512, "bfloat16"), Case(32, 2048, "bfloat16")]
QUICK = [
    Case(2, 48, heads=2, memory=True),
    Case(3, 33, masked=True, heads=2, student_dim=26),
]
# Query rows of a block: its maps stay near the cache, and a block is still worth a kernel launch.
BLOCK_ROWS = {"cpu": 64, "cuda": 256}


def sum_of_kl(
    student_q: Tensor,  # (B, H, rows, ds)
    student_k: Tensor,  # (B, H, L, ds)
    teacher_q: Tensor,  # (B, H, rows, dt)
    teacher_k: Tensor,  # (B, H, L, dt)
    keys: Tensor | None,  # (B, L)
    rows: Tensor | None,  # (B, rows)
) -> Tensor:
    """As it is usually written: two maps, masked as transformers masks them, a softmax and a log-softmax."""
    return _sum_of_kl(_scores(student_q, student_k), _scores(teacher_q, teacher_k), keys, rows)


def upcast_sum_of_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    keys: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """With the softmaxes in float32 whatever the dtype, as attention_kl's: free where it is fused."""
    student, teacher = _scores(student_q, student_k).float(), _scores(teacher_q, teacher_k).float()
    return _sum_of_kl(student, teacher, keys, rows)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT) * q.shape[-1] ** -0.5


def _sum_of_kl(student: Tensor, teacher: Tensor, keys: Tensor | None, rows: Tensor | None) -> Tensor:
    if keys is None or rows is None:
        return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")
    padding = ~keys[:, None, None]
    student, teacher = (
        scores.masked_fill(padding, torch.finfo(scores.dtype).min) for scores in (student, teacher)
    )
    of_rows = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    return torch.where(rows[:, None], of_rows, 0).sum()


def row_blocks(x: Inputs) -> Tensor:
    """Blocks of query rows, each computed again in the backward: without new ops, the least memory."""
    size = BLOCK_ROWS[x.student_q.device.type]
    student_blocks, teacher_blocks = x.student_q.split(size, dim=2), x.teacher_q.split(size, dim=2)
    masks = [None] * len(student_blocks) if x.mask is None else x.mask.split(size, dim=1)
    total = x.student_q.new_zeros((), dtype=torch.float32)
    for student_q, teacher_q, rows in zip(student_blocks, teacher_blocks, masks, strict=True):
        total = total + checkpoint(
            sum_of_kl, student_q, x.student_k, teacher_q, x.teacher_k, x.mask, rows, use_reentrant=False
        )
    return total


class FlashKL(torch.autograd.Function):
    """The sum of the KL from flash attention passes, whose values are the keys:

        KL_i = at qt·(Pt Kt) - LSEt - as qs·(Pt Ks) + LSEs
        dQs = as (Ps Ks - Pt Ks),  dKs = as (Psᵀ Qs - Ptᵀ Qs)

    Pᵀ Q is what a flash backward calls the gradient of the values, for the upstream gradient Q. Its gradients
    of queries and keys are thrown away, since no PyTorch op computes the one alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_q: Tensor,
        student_k: Tensor,
        teacher_q: Tensor,
        teacher_k: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.scale, teacher_scale = student_q.shape[-1] ** -0.5, teacher_q.shape[-1] ** -0.5
        # The passes want values as wide as the keys.
        padded = F.pad(student_k, (0, teacher_k.shape[-1] - student_k.shape[-1]))
        own, student_lse, ctx.student_pass = flash(student_q, student_k, student_k, ctx.scale, mask)
        cross, teacher_lse, ctx.teacher_pass = flash(teacher_q, teacher_k, padded, teacher_scale, mask)
        teachers, _, _ = flash(teacher_q, teacher_k, teacher_k, teacher_scale, mask)
        cross = cross[..., : student_k.shape[-1]]
        teacher_score = (teacher_q * teachers).sum(-1, dtype=torch.float32)
        student_score = (student_q * cross).sum(-1, dtype=torch.float32)
        kl = teacher_scale * teacher_score - teacher_lse - ctx.scale * student_score + student_lse
        ctx.save_for_backward(student_q, own - cross)
        ctx.mask, ctx.width = mask, teacher_k.shape[-1]
        return kl.sum() if mask is None else torch.where(mask[:, None], kl, 0).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student_q, grad_q = ctx.saved_tensors
        if ctx.mask is not None:
            tokens = ctx.mask[:, None, :, None]
            student_q, grad_q = torch.where(tokens, student_q, 0), torch.where(tokens, grad_q, 0)
        size = student_q.shape[-1]
        padded = F.pad(student_q, (0, ctx.width - size))
        grad_k = ctx.student_pass(student_q) - ctx.teacher_pass(padded)[..., :size]
        factor = ctx.scale * upstream
        return (grad_q * factor).to(student_q.dtype), (grad_k * factor).to(student_q.dtype), None, None, None


def flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """P V, the logsumexp of the rows, and the function G -> Pᵀ G."""
    if q.device.type == "cpu":
        bias = None if mask is None else torch.where(mask[:, None, None], 0.0, float("-inf"))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)

        def transposed(upstream: Tensor) -> Tensor:
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                upstream, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale
            )
            return grads[2]
    else:
        out, lse, *context, _ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        sequences, random = context[:4], context[4:]

        def transposed(upstream: Tensor) -> Tensor:
            grads = aten._scaled_dot_product_flash_attention_backward(
                upstream, q, k, v, out, lse, *sequences, 0.0, False, *random, scale=scale
            )
            return grads[2]

    return out, lse, transposed


def build(case: Case) -> Work:
    x = make_inputs(case)
    rows, trained, on = x.count_rows(), x.trained(), device()
    compiled_sum = compiled(upcast_sum_of_kl)

    def backward(total: Callable[[], Tensor]) -> Variant:
        return lambda: torch.autograd.grad(total() / rows, trained)

    bare, flops = bare_map_products(x)
    work = Work(
        variants={
            "eager": backward(lambda: sum_of_kl(*x.tensors(), x.mask, x.mask)),
            "torch.compile": backward(lambda: compiled_sum(*x.tensors(), x.mask, x.mask)),
            ROW_BLOCKS: backward(lambda: row_blocks(x)),
            FOUR_PRODUCTS: bare,
            OURS: lambda: torch.autograd.grad(attention_kl(*x.tensors(), x.mask), trained),
        },
        bound=FOUR_PRODUCTS,
        flops=flops,
        gradient_bytes=sum(tensor.nbytes for tensor in trained),
        compiled=frozenset({"torch.compile"}),
    )
    if on.type == "cuda" and (x.mask is not None or case.dtype == "float32"):
        work.skipped[FLASH] = "the CUDA flash op takes neither a padding mask nor float32"
    else:
        work.variants[FLASH] = backward(lambda: FlashKL.apply(*x.tensors(), x.mask))
    if on.type == "cuda":
        work.notes["matrix_flops_per_second"] = matrix_rate()
    return work


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_attention_kl(benchmark: Any, case: Case) -> None:
    compare(benchmark, "attention_kl", case, build, op="attention_kl_fwd")
