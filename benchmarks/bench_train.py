"""A whole training step: teacher forward, student forward and backward, clipping, AdamW.

fastdistil's step is the training loop's own parts (taps, objectives) against the step of DistilBERT's
distiller.py as it was: both heads on all positions, masked_select of both logits, one loss a term. Both do
DistilBERT's three terms (5 KD at T 2, 2 MLM, 1 cosine) from the same weights on the same masked batch; making
the batch is not timed. The original is in float32 with KD over all tokens, as in the paper; on a GPU its own
option `restrict_ce_to_mask` and bfloat16 autocast are measured beside it. fastdistil's teacher runs in
bfloat16 where the device is fast at it, which is the loop's default, also beside a float32 student; that step
with a float32 teacher is measured too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Variant, Work, cases, compare, device, matrix_rate
from records import ORIGINAL, OURS, VOCAB
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the models have fresh weights: nothing is fetched

from transformers import BertConfig, BertForMaskedLM

from fastdistil.data.masking import MaskedBatch
from fastdistil.models.student import make_student
from fastdistil.models.taps import fast_dtype, frozen_copy, tap, tap_teacher
from fastdistil.objectives import CosineObjective, Objective, VocabularyObjective
from fastdistil.ops.matmul import native_bf16_products

TEMPERATURE, KD_WEIGHT, CE_WEIGHT, COSINE_WEIGHT = 2.0, 5.0, 2.0, 1.0
MAX_GRAD_NORM = 5.0
IGNORED = -100
FLOAT32_TEACHER = "fastdistil, teacher in float32"
# Sanh et al. 2019, section 3: English Wikipedia and the Toronto Book Corpus in about 90 hours on 8 V100;
# 3 epochs are the code's default. Devlin et al. 2019 count 2.5 and 0.8 billion words;
# 1.3 WordPieces a word is a guess.
PAPER_TOKENS = 3 * 3.3e9 * 1.3


@dataclasses.dataclass(frozen=True)
class Case:
    dim: int
    batch: int
    length: int
    positions: str  # of the KD term: "masked" or "all"
    precision: str = "float32"
    vocab: int = VOCAB

    def __str__(self) -> str:
        return f"{self.positions}-{self.dim}-{self.batch}x{self.length}-{self.precision}"


CPU = [
    Case(384, 16, 128, "masked"),
    Case(384, 16, 128, "all"),
    Case(384, 16, 128, "masked", "bfloat16"),
    Case(384, 16, 128, "all", "bfloat16"),
]
GPU = [
    Case(768, 128, 128, "masked", "bfloat16"),
    Case(768, 128, 128, "all", "bfloat16"),
    Case(768, 32, 512, "masked", "bfloat16"),
    Case(768, 32, 512, "all", "bfloat16"),
]
QUICK = [Case(48, 2, 16, "masked", vocab=1003), Case(48, 2, 16, "all", vocab=1003)]


def make_teacher(case: Case) -> Any:
    config = BertConfig(
        vocab_size=case.vocab,
        hidden_size=case.dim,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=4 * case.dim,
        pad_token_id=0,
    )
    model: Any = BertForMaskedLM(config)
    return model.to(device()).eval()


def make_batch(case: Case) -> MaskedBatch:
    """Full sequences of which 15 % of the positions, the same number in each, are to be predicted."""
    on = device()
    random = torch.Generator(on).manual_seed(0)
    shape = (case.batch, case.length)
    tokens = torch.randint(5, case.vocab, shape, device=on, generator=random)
    picks = round(0.15 * case.length)
    positions = torch.rand(shape, device=on, generator=random).topk(picks).indices.sort().values
    position_labels = tokens.gather(1, positions)
    labels = torch.full_like(tokens, IGNORED).scatter(1, positions, position_labels)
    return MaskedBatch(
        input_ids=tokens.scatter(1, positions, 4),
        attention_mask=torch.ones(shape, dtype=torch.bool, device=on),
        labels=labels,
        positions=positions,
        position_labels=position_labels,
    )


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device().type, dtype or torch.bfloat16, enabled=dtype is not None)


def optimised(student: Any, *, fused: bool, loss: Callable[[], torch.Tensor]) -> Variant:
    """A step's second half: backward, clipping, AdamW with DistilBERT's settings."""
    parameters = list(student.parameters())
    # A rate too small to move the weights within a benchmark: every round does the same work.
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-8, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=fused
    )

    def step() -> torch.Tensor:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def original_step(
    teacher: Any, student: Any, batch: MaskedBatch, positions: str, dtype: torch.dtype | None
) -> Variant:
    """Distiller.step of DistilBERT's code (huggingface/transformers, research_projects/distillation)."""
    kl_loss = nn.KLDivLoss(reduction="batchmean")
    mlm_loss = nn.CrossEntropyLoss(ignore_index=IGNORED)
    cosine_loss = nn.CosineEmbeddingLoss(reduction="mean")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}

    def loss() -> torch.Tensor:
        with autocast(dtype):
            student_out = student(**inputs, output_hidden_states=True)
            with torch.no_grad():
                teacher_out = teacher(**inputs, output_hidden_states=True)
            s_logits, t_logits = student_out.logits, teacher_out.logits
            if positions == "masked":  # restrict_ce_to_mask
                mask = (batch.labels > -1).unsqueeze(-1).expand_as(s_logits)
            else:
                mask = batch.attention_mask.unsqueeze(-1).expand_as(s_logits)
            s_selected = torch.masked_select(s_logits, mask).view(-1, s_logits.size(-1))
            t_selected = torch.masked_select(t_logits, mask).view(-1, s_logits.size(-1))
            kd = TEMPERATURE**2 * kl_loss(
                F.log_softmax(s_selected / TEMPERATURE, dim=-1), F.softmax(t_selected / TEMPERATURE, dim=-1)
            )
            mlm = mlm_loss(s_logits.view(-1, s_logits.size(-1)), batch.labels.view(-1))

            s_hidden, t_hidden = student_out.hidden_states[-1], teacher_out.hidden_states[-1]
            mask = batch.attention_mask.unsqueeze(-1).expand_as(s_hidden)
            s_rows = torch.masked_select(s_hidden, mask).view(-1, s_hidden.size(-1))
            t_rows = torch.masked_select(t_hidden, mask).view(-1, s_hidden.size(-1))
            cosine = cosine_loss(s_rows, t_rows, s_rows.new_ones(s_rows.size(0)))
            total: torch.Tensor = KD_WEIGHT * kd + CE_WEIGHT * mlm + COSINE_WEIGHT * cosine
        for term in (total, kd, mlm, cosine):  # it logs each, every step
            term.item()
        if torch.isnan(total).any():
            raise FloatingPointError("NaN detected")
        return total

    return optimised(student, fused=False, loss=loss)


def gathered_step(teacher: Any, student: Any, batch: MaskedBatch, dtype: torch.dtype | None) -> Variant:
    """Plain PyTorch that gathers the masked rows before the heads: the best one does without new ops."""
    mask, labels = batch.attention_mask, batch.position_labels.flatten()
    index = batch.positions.unsqueeze(-1)

    def rows_of(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.gather(1, index.expand(-1, -1, hidden.size(-1))).flatten(0, 1)

    def loss() -> torch.Tensor:
        with autocast(dtype):
            with torch.no_grad():
                t_hidden = teacher.bert(batch.input_ids, mask).last_hidden_state
                t_logits = teacher.cls(rows_of(t_hidden))
            s_hidden = student.distilbert(batch.input_ids, mask).last_hidden_state
            transformed = student.activation(student.vocab_transform(rows_of(s_hidden)))
            s_logits = student.vocab_projector(student.vocab_layer_norm(transformed))
            kd = F.kl_div(
                F.log_softmax(s_logits / TEMPERATURE, dim=-1),
                F.softmax(t_logits / TEMPERATURE, dim=-1),
                reduction="batchmean",
            )
            mlm = F.cross_entropy(s_logits, labels)
            cosine = (1 - F.cosine_similarity(s_hidden, t_hidden, dim=-1)).mean()
            return KD_WEIGHT * TEMPERATURE**2 * kd + CE_WEIGHT * mlm + COSINE_WEIGHT * cosine

    return optimised(student, fused=True, loss=loss)


def our_step(
    teacher: Any,
    student: Any,
    batch: MaskedBatch,
    positions: str,
    dtype: torch.dtype | None,
    teacher_dtype: torch.dtype | None,
) -> Variant:
    """One iteration of fastdistil.train.loop without its logging."""
    teacher = frozen_copy(teacher, teacher_dtype)
    objectives: list[Objective] = [
        VocabularyObjective(KD_WEIGHT, CE_WEIGHT, TEMPERATURE, positions=positions),
        CosineObjective(COSINE_WEIGHT),
    ]

    def loss() -> torch.Tensor:
        counts = {name: count for objective in objectives for name, count in objective.counts(batch).items()}
        teacher_taps = tap_teacher(teacher, batch.inputs, dtype=teacher_dtype)
        with autocast(dtype):
            taps = tap(student, batch.inputs)
            return torch.stack(
                [objective.loss(taps, teacher_taps, batch, counts).loss for objective in objectives]
            ).sum()

    return optimised(student, fused=True, loss=loss)


def product_flops(case: Case) -> int:
    """Of the matrix products that the step needs: 2 a multiply-add, the backward twice the forward."""
    tokens, dim = case.batch * case.length, case.dim
    layer = 2 * tokens * (4 * dim**2 + 8 * dim**2 + 2 * case.length * dim)
    rows = tokens if case.positions == "all" else case.batch * round(0.15 * case.length)
    head = 2 * rows * (dim**2 + case.vocab * dim)
    teacher, student = 12 * layer + head, 6 * layer + head
    return teacher + 3 * student


def build(case: Case) -> Work:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.precision == "bfloat16" else None
    teacher, batch = make_teacher(case), make_batch(case)

    def student() -> Any:
        return make_student(teacher, num_layers=6).to(device()).train()

    def original(positions: str, precision: torch.dtype | None) -> Variant:
        return original_step(teacher, student(), batch, positions, precision)

    work = Work(
        variants={
            ORIGINAL: original("all", None),
            # As `run.teacher_precision: auto` has it: the teacher in bfloat16 where the device is fast at it.
            OURS: our_step(teacher, student(), batch, case.positions, dtype, fast_dtype(device())),
        },
        tokens=case.batch * case.length,
        flops=product_flops(case),
        launch_ahead=False,
    )
    if dtype is None and fast_dtype(device()) is not None:
        work.variants[FLOAT32_TEACHER] = our_step(teacher, student(), batch, case.positions, None, None)
    if dtype is not None:
        work.variants[f"{ORIGINAL}, bfloat16"] = original("all", dtype)
    if case.positions == "masked" and device().type == "cuda":
        work.variants[f"{ORIGINAL}, restrict_ce_to_mask"] = original("masked", dtype)
    if case.positions == "masked":
        work.variants["plain PyTorch, rows gathered"] = gathered_step(teacher, student(), batch, dtype)
    return work


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_training_step(benchmark: Any, case: Case) -> None:
    if case.precision == "bfloat16" and not native_bf16_products(device()):
        pytest.skip("not measurable on this CPU: it has no bfloat16 matrix instructions")

    def with_matrix_rate(case: Case) -> Work:
        work = build(case)
        if device().type == "cuda":
            work.notes["matrix_flops_per_second"] = matrix_rate()
            work.notes["paper_tokens"] = PAPER_TOKENS
        return work

    compare(benchmark, "train", case, with_matrix_rate)
