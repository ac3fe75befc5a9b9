"""A whole training step of MiniLMv2: teacher forward, student forward and backward, clipping, AdamW.

fastdistil's step is the training loop's own parts: queries, keys and values of the last layers are tapped
below SDPA, and no relation is formed. Microsoft never published its training code (microsoft/unilm issue
105). What people run instead, and what stands for the original here, is the way of Bloomberg's minilmv2.bb
(Apache-2.0, transformers): both models return all attentions and all hidden states, which makes their
attention eager; queries, keys and values of the last layer are projected a second time from the hidden states
before it; each relation is a (B, heads, L, L) map of both models, whose KL is taken one sequence after
another. Beside it stands the best that plain PyTorch does: SDPA, forward hooks on the projections, and
compiled relation maps.

All three have the same loss (Q-Q, K-K and V-V relations, weight 1 each, mean over relation heads and tokens),
from the same weights on the same full sequences, and the same fused AdamW; making the batch is not timed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import bench_train
import pytest
import torch
import torch.nn.functional as F
from bench_attention_kl import upcast_sum_of_kl
from bench_train import FLOAT32_TEACHER, autocast, make_batch, make_teacher, optimised
from harness import Variant, Work, cases, compare, compiled, device, matrix_rate
from records import HOOKS, OURS, OUTPUT_ATTENTIONS, VOCAB
from torch import Tensor, nn

from fastdistil.data.masking import MaskedBatch
from fastdistil.models.student import make_student
from fastdistil.models.taps import fast_dtype, frozen_copy, tap, tap_teacher
from fastdistil.objectives import RelationsObjective
from fastdistil.ops.matmul import native_bf16_products

TEACHER_LAYERS, STUDENT_LAYERS = 12, 6


@dataclasses.dataclass(frozen=True)
class Case:
    dim: int
    batch: int
    length: int
    precision: str = "float32"
    relation_heads: int = 48
    vocab: int = VOCAB

    def __str__(self) -> str:
        return f"{self.dim}-{self.batch}x{self.length}-{self.precision}"


CPU = [Case(384, 16, 128), Case(384, 16, 128, "bfloat16")]
GPU = [Case(768, 32, 512, "bfloat16")]
QUICK = [Case(48, 2, 16, relation_heads=24, vocab=1003)]


def projections(model: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Of queries, keys and values in the last layer of the teacher (BERT) or the student (DistilBERT)."""
    if model.config.model_type == "bert":
        layer = model.encoder.layer[-1].attention.self
        return layer.query, layer.key, layer.value
    layer = model.transformer.layer[-1].attention
    return layer.q_lin, layer.k_lin, layer.v_lin


def split(states: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, heads, L, D / heads)"""
    return states.unflatten(2, (heads, -1)).transpose(1, 2)


def output_attentions_step(
    teacher: Any, student: Any, batch: MaskedBatch, heads: int, dtype: torch.dtype | None
) -> Variant:
    kl_loss = nn.KLDivLoss(reduction="sum")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}

    def last_states(model: Any) -> list[Tensor]:
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        return [split(project(out.hidden_states[-2]), heads) for project in projections(model)]

    def loss() -> Tensor:
        total = torch.zeros((), device=device())
        with autocast(dtype):
            with torch.no_grad():
                teacher_states = last_states(teacher)
            student_states = last_states(student)
            lengths = inputs["attention_mask"].sum(-1).tolist()
            for s, t in zip(student_states, teacher_states, strict=True):
                student_relation = s @ s.mT / s.shape[-1] ** 0.5
                teacher_relation = t @ t.mT / t.shape[-1] ** 0.5
                for i, length in enumerate(lengths):
                    log_p = F.log_softmax(student_relation[i, :, :length, :length], dim=-1)
                    p = F.softmax(teacher_relation[i, :, :length, :length], dim=-1)
                    total = total + kl_loss(log_p, p) / (heads * length * len(lengths))
        return total

    return optimised(student, fused=True, loss=loss)


def hooks_step(
    teacher: Any, student: Any, batch: MaskedBatch, heads: int, dtype: torch.dtype | None
) -> Variant:
    sum_of_kl: Callable[..., Tensor] = compiled(upcast_sum_of_kl)
    mask = batch.attention_mask
    rows = mask.numel() * heads
    states: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: object, output: Tensor) -> None:
        states[module] = split(output, heads)

    for model in (teacher, student):
        for module in projections(model):
            module.register_forward_hook(keep)

    def loss() -> Tensor:
        with autocast(dtype):
            with torch.no_grad():
                teacher(batch.input_ids, mask)
            student(batch.input_ids, mask)
            pairs = [
                (states[a], states[b]) for a, b in zip(*map(projections, (student, teacher)), strict=True)
            ]
            return torch.stack([sum_of_kl(s, s, t, t, None, None) for s, t in pairs]).sum() / rows

    return optimised(student, fused=True, loss=loss)


def our_step(
    teacher: Any,
    student: Any,
    batch: MaskedBatch,
    heads: int,
    dtype: torch.dtype | None,
    teacher_dtype: torch.dtype | None,
) -> Variant:
    """One iteration of fastdistil.train.loop without its logging."""
    teacher = frozen_copy(teacher, teacher_dtype)
    objective = RelationsObjective(STUDENT_LAYERS - 1, TEACHER_LAYERS - 1, heads)

    def loss() -> Tensor:
        counts = objective.counts(batch)
        teacher_taps = tap_teacher(teacher, batch.inputs, teacher_dtype, objective.teacher_taps)
        with autocast(dtype):
            taps = tap(student, batch.inputs, objective.student_taps)
            return objective.loss(taps, teacher_taps, batch, counts).loss

    return optimised(student, fused=True, loss=loss)


def product_flops(case: Case) -> int:
    """Of the matrix products that the step needs: 2 a multiply-add, the backward twice the forward.

    Of the last layers that is the queries, keys and values. A relation needs both models' scores and one
    product in the backward.
    """
    tokens, dim = case.batch * case.length, case.dim
    layer = 2 * tokens * (4 * dim**2 + 8 * dim**2 + 2 * case.length * dim)
    last = 2 * tokens * 3 * dim**2
    teacher = (TEACHER_LAYERS - 1) * layer + last
    student = (STUDENT_LAYERS - 1) * layer + last
    relations = 3 * 3 * 2 * tokens * case.length * dim
    return teacher + 3 * student + relations


def build(case: Case) -> Work:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.precision == "bfloat16" else None
    of_models = bench_train.Case(case.dim, case.batch, case.length, "masked", case.precision, case.vocab)
    teacher, batch = make_teacher(of_models).bert, make_batch(of_models)

    def student() -> Any:
        return make_student(teacher, num_layers=STUDENT_LAYERS).to(device()).train()

    eager_teacher, eager_student = copy.deepcopy(teacher), student()
    for model in (eager_teacher, eager_student):
        model.set_attn_implementation("eager")

    def step(make: Callable[..., Variant], its_teacher: Any, its_student: Any) -> Variant:
        return make(its_teacher, its_student, batch, case.relation_heads, dtype)

    def ours(teacher_dtype: torch.dtype | None) -> Variant:
        return our_step(teacher, student(), batch, case.relation_heads, dtype, teacher_dtype)

    work = Work(
        variants={
            OUTPUT_ATTENTIONS: step(output_attentions_step, eager_teacher, eager_student),
            HOOKS: step(hooks_step, copy.deepcopy(teacher), student()),
            OURS: ours(fast_dtype(device())),
        },
        tokens=case.batch * case.length,
        flops=product_flops(case),
        launch_ahead=False,
    )
    if dtype is None and fast_dtype(device()) is not None:
        work.variants[FLOAT32_TEACHER] = ours(None)
    if device().type == "cuda":
        work.notes["matrix_flops_per_second"] = matrix_rate()
    return work


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_minilm_step(benchmark: Any, case: Case) -> None:
    if case.precision == "bfloat16" and not native_bf16_products(device()):
        pytest.skip("not measurable on this CPU: it has no bfloat16 matrix instructions")
    compare(benchmark, "train_minilm", case, build, op="attention_kl_fwd")
