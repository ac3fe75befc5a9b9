"""A part of an epoch of task distillation on SST-2: teacher forward, student forward and backward, clipping,
AdamW, for batches of 32 sentences.

Three kinds: "kd" (logits and labels: Hinton et al. 2015), "pkd" (and the normalised [CLS] states of
intermediate layers, PKD-Skip of Sun et al. 2019) and "tinybert" (the intermediate stage of Jiao et al. 2020:
raw attention scores, projected hidden states, embeddings; uniform mapping), with the recipes' weights.

- fastdistil: one iteration of the training loop a batch, on its own length-grouped batches. Making a batch is
  timed, for the others it is not.
- The original step, after TinyBERT's task_distill.py: the same batches padded to 128, both models called for
  all hidden states and attentions, which makes their attention eager, and losses over the lists of all
  layers. Where transformers returns probabilities TinyBERT's BERT returns raw scores, so for "tinybert" the
  attention function is an eager one that returns those. It is spared the unfused optimiser and the teacher's
  dropout. BERT-PKD's code reads the teacher's outputs from a file that an earlier pass over the data wrote;
  here it runs in the step.
- Plain PyTorch: random batches padded to their longest text, SDPA, hidden states only where they are
  compared, and hooks on queries and keys for "tinybert".
- The epochs of fastdistil after the first, and all epochs of further runs: of "kd" and "pkd" the teacher's
  answers are in the cache (fastdistil.train.answers), and no teacher runs.

All start from the same weights. Without dropout their losses agree, which is asserted before anything is
timed; only TinyBERT's code averages over padding too, so its step is compared on full sequences alone.

An epoch has 2,105 steps. Those that are timed stand for it: its batches, sorted by their longest text, are
cut into as many equal parts, and each part gives the batch that is nearest to the part's mean. The record
says how many tokens a step has, padding included, in the sample and in the whole epoch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_train import FLOAT32_TEACHER, autocast, optimised
from harness import Variant, Work, cases, compare, device
from records import ORIGINAL, OURS, VOCAB
from sst2 import fitted, read_texts, representative
from torch import Tensor, nn
from transformers import AttentionInterface, BertConfig, BertForSequenceClassification
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from fastdistil.data.batches import to_device
from fastdistil.data.noise import permutation
from fastdistil.data.task_batches import TaskBatch, TaskBatches, read_task_batch
from fastdistil.data.task_encoding import EncodedTask, TeacherAnswers
from fastdistil.models.layers import layer_pairs
from fastdistil.models.student import make_student
from fastdistil.models.taps import Wanted, answered, fast_dtype, frozen_copy, tap, tap_teacher
from fastdistil.objectives import (
    AttentionTransferObjective,
    EmbeddingsObjective,
    HiddenObjective,
    Objective,
    PredictionObjective,
)
from fastdistil.ops.matmul import native_bf16_products

PLAIN = "plain PyTorch, SDPA, random batches"
ANSWERED = "fastdistil, later epochs"
TEACHER_LAYERS, STUDENT_LAYERS, HEADS = 12, 6, 12
SKIP = layer_pairs("skip", STUDENT_LAYERS, TEACHER_LAYERS)
UNIFORM = layer_pairs("uniform", STUDENT_LAYERS, TEACHER_LAYERS)
KD_WEIGHT, TASK_WEIGHT, TEMPERATURE, PATIENT_WEIGHT = 0.5, 0.5, 5.0, 100.0
MAX_TOKENS = 4096  # of a micro-batch: TaskConfig's default
SEED = 0

# How far two losses may be apart, relatively: sums are in another order, and bfloat16 products are rounded.
SLACK, BFLOAT16_SLACK = 1e-4, 5e-2

RAW_SCORES = "raw_scores"


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str  # "kd", "pkd" or "tinybert"
    dim: int
    precision: str = "float32"
    steps: int = 6
    batch: int = 32
    length: int = 128  # that the original pads to
    vocab: int = VOCAB

    def __str__(self) -> str:
        return f"{self.kind}-{self.dim}-{self.steps}x{self.batch}-{self.precision}"


KINDS = ("kd", "pkd", "tinybert")
CPU = [Case(kind, 384, precision) for kind in KINDS for precision in ("float32", "bfloat16")]
GPU = [Case(kind, 768, "bfloat16") for kind in KINDS]
QUICK = [Case(kind, 48, steps=2, batch=4, length=72, vocab=1003) for kind in KINDS]


@dataclasses.dataclass
class Way:
    """One way to train a student."""

    learner: nn.ModuleList  # the student and TinyBERT's projection
    loss: Callable[[TaskBatch], Tensor]
    read: Callable[[], Iterable[TaskBatch]]  # the batches of the part of the epoch
    bfloat16: bool  # whether a model's products are in it


def full_batch(case: Case) -> TaskBatch:
    """Sequences without padding."""
    random = torch.Generator().manual_seed(SEED)
    ids = torch.randint(5, case.vocab, (4, case.length), generator=random)
    labels = torch.randint(2, (4,), generator=random)
    mask, types = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    return to_device(TaskBatch(ids, mask, types, labels), device())


def make_teacher(case: Case) -> Any:
    config = BertConfig(
        vocab_size=case.vocab,
        hidden_size=case.dim,
        num_hidden_layers=TEACHER_LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * case.dim,
        pad_token_id=0,
    )
    model: Any = BertForSequenceClassification(config)
    # A confident one, so that a wrong loss on its logits would show in the sum of the terms.
    nn.init.normal_(model.classifier.weight, std=0.5)
    return model.to(device()).eval()


def call(model: Any, batch: TaskBatch, **keywords: bool) -> Any:
    mask = batch.attention_mask.long()
    return model(
        input_ids=batch.input_ids, attention_mask=mask, token_type_ids=batch.token_type_ids, **keywords
    )


def raw_score_attention(
    module: Any,
    query: Tensor,  # (B, H, L, d)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention, but for its second result: the masked scores before the softmax."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = F.dropout(scores.softmax(-1), dropout, module.training)
    return (shares @ value).transpose(1, 2).contiguous(), scores


AttentionInterface.register(RAW_SCORES, raw_score_attention)
AttentionMaskInterface.register(RAW_SCORES, eager_mask)


def prediction_loss(student: Any, teacher: Any, batch: TaskBatch) -> Tensor:
    ours, theirs = student.logits.float(), teacher.logits.float()
    kd = F.kl_div(
        F.log_softmax(ours / TEMPERATURE, dim=-1),
        F.softmax(theirs / TEMPERATURE, dim=-1),
        reduction="batchmean",
    )
    return KD_WEIGHT * TEMPERATURE**2 * kd + TASK_WEIGHT * F.cross_entropy(ours, batch.labels)


def patient_loss(student: Any, teacher: Any) -> Tensor:
    ours = torch.stack([student.hidden_states[layer + 1][:, 0] for layer, _ in SKIP], dim=1)
    theirs = torch.stack([teacher.hidden_states[layer + 1][:, 0] for _, layer in SKIP], dim=1)
    return PATIENT_WEIGHT * F.mse_loss(F.normalize(ours, dim=2), F.normalize(theirs, dim=2))


def original_way(
    kind: str, teacher: Any, learner: nn.ModuleList, batches: list[TaskBatch], dtype: torch.dtype | None
) -> Way:
    teacher = copy.deepcopy(teacher)
    student: Any
    project: Any
    student, project = learner
    for model in (teacher, student):
        model.set_attn_implementation(RAW_SCORES if kind == "tinybert" else "eager")
    per_block = TEACHER_LAYERS // STUDENT_LAYERS

    def without_padding(scores: Tensor) -> Tensor:
        return torch.where(scores <= -1e2, torch.zeros_like(scores), scores)

    def intermediate_losses(of_student: Any, of_teacher: Any) -> list[Tensor]:
        """Means over all positions: the scores of padding as keys are 0, those of its queries are not."""
        maps = zip(of_student.attentions, of_teacher.attentions[per_block - 1 :: per_block], strict=True)
        states = zip(of_student.hidden_states, of_teacher.hidden_states[::per_block], strict=True)
        attention = [F.mse_loss(without_padding(ours), without_padding(theirs)) for ours, theirs in maps]
        hidden = [F.mse_loss(project(ours), theirs) for ours, theirs in states]
        return [torch.stack(attention).sum(), torch.stack(hidden).sum()]

    def loss(batch: TaskBatch) -> Tensor:
        everything = {"output_hidden_states": True, "output_attentions": True}
        with autocast(dtype):
            of_student = call(student, batch, **everything)
            with torch.no_grad():
                of_teacher = call(teacher, batch, **everything)
            if kind == "tinybert":
                terms = intermediate_losses(of_student, of_teacher)
            else:
                terms = [prediction_loss(of_student, of_teacher, batch)]
            if kind == "pkd":
                terms.append(patient_loss(of_student, of_teacher))
            for term in terms:  # they log each, every step
                term.item()
            return torch.stack(terms).sum()

    return Way(learner, loss, lambda: batches, bfloat16=dtype is not None)


def plain_way(
    kind: str, teacher: Any, learner: nn.ModuleList, batches: list[TaskBatch], dtype: torch.dtype | None
) -> Way:
    teacher = copy.deepcopy(teacher)
    student: Any
    project: Any
    student, project = learner
    states: dict[nn.Module, Tensor] = {}  # (B, L, D) of the last forward pass

    def keep(module: nn.Module, _: object, output: Tensor) -> None:
        states[module] = output

    def attention(model: Any, layer: int) -> Any:
        return model.bert.encoder.layer[layer].attention.self

    def scores(model: Any, layer: int) -> Tensor:
        module = attention(model, layer)
        q, k = (states[m].unflatten(2, (HEADS, -1)).transpose(1, 2) for m in (module.query, module.key))
        return q @ k.mT * module.scaling

    if kind == "tinybert":
        for ours, theirs in UNIFORM:
            for module in (attention(student, ours), attention(teacher, theirs)):
                module.query.register_forward_hook(keep)
                module.key.register_forward_hook(keep)

    def intermediate_loss(of_student: Any, of_teacher: Any, mask: Tensor) -> Tensor:
        tokens, pairs = mask[:, :, None], mask[:, None, :, None] & mask[:, None, None, :]
        token_count, pair_count = mask.sum(), mask.sum(1).square().sum()
        terms = []
        for ours, theirs in UNIFORM:
            gap = scores(student, ours) - scores(teacher, theirs)
            terms.append(torch.where(pairs, gap.float(), 0).square().sum() / (pair_count * HEADS))
        for ours, theirs in ((-1, -1), *UNIFORM):
            gap = project(of_student.hidden_states[ours + 1]) - of_teacher.hidden_states[theirs + 1]
            terms.append(torch.where(tokens, gap.float(), 0).square().sum() / (token_count * gap.shape[-1]))
        return torch.stack(terms).sum()

    def loss(batch: TaskBatch) -> Tensor:
        def run(model: Any) -> Any:
            called = model.bert if kind == "tinybert" else model
            return call(called, batch, output_hidden_states=kind != "kd")

        with autocast(dtype):
            of_student = run(student)
            with torch.no_grad():
                of_teacher = run(teacher)
            if kind == "tinybert":
                return intermediate_loss(of_student, of_teacher, batch.attention_mask)
            total = prediction_loss(of_student, of_teacher, batch)
            return total + patient_loss(of_student, of_teacher) if kind == "pkd" else total

    return Way(learner, loss, lambda: batches, bfloat16=dtype is not None)


def our_objectives(kind: str, width: int, projection: nn.Linear) -> list[Objective]:
    if kind == "tinybert":
        return [
            AttentionTransferObjective(UNIFORM, HEADS),
            HiddenObjective(UNIFORM, width, projection),
            EmbeddingsObjective(width, projection),
        ]
    prediction = PredictionObjective(KD_WEIGHT, TASK_WEIGHT, TEMPERATURE)
    if kind == "kd":
        return [prediction]
    patient = HiddenObjective(
        SKIP, width, normalize=True, weight=PATIENT_WEIGHT, tokens="first", layer_reduction="mean"
    )
    return [prediction, patient]


def our_way(
    kind: str,
    teacher: Any,
    learner: nn.ModuleList,
    read: Callable[[], Iterable[TaskBatch]],
    dtype: torch.dtype | None,
    teacher_dtype: torch.dtype | None,
) -> Way:
    """One iteration of fastdistil.train.loop a batch, without its logging."""
    teacher = frozen_copy(teacher, teacher_dtype)
    student: Any
    projection: Any
    student, projection = learner
    objectives = our_objectives(kind, teacher.config.hidden_size, projection)
    student_wanted = Wanted.union(objective.student_taps for objective in objectives)
    teacher_wanted = Wanted.union(objective.teacher_taps for objective in objectives)

    def loss(batch: TaskBatch) -> Tensor:
        counts = {name: count for objective in objectives for name, count in objective.counts(batch).items()}
        if (known := batch.answers) is not None:
            teacher_taps = answered(known.logits, known.first, known.layers)
        else:
            teacher_taps = tap_teacher(teacher, batch.inputs, teacher_dtype, teacher_wanted)
        with autocast(dtype):
            taps = tap(student, batch.inputs, student_wanted)
            return torch.stack(
                [objective.loss(taps, teacher_taps, batch, counts).loss for objective in objectives]
            ).sum()

    return Way(learner, loss, read, bfloat16=(dtype or teacher_dtype) is not None)


def with_answers(
    kind: str, teacher: Any, data: EncodedTask, parts: Sequence[np.ndarray], dtype: torch.dtype | None
) -> EncodedTask:
    """The same data with the teacher's answers to the examples of `parts`, as the cache has them."""
    layers = tuple(layer for _, layer in SKIP) if kind == "pkd" else ()
    labels, width = data.task.num_labels, teacher.config.hidden_size
    answers = np.zeros((len(data), labels + len(layers) * width), np.float32)
    teacher = frozen_copy(teacher, dtype)
    wanted = Wanted(hidden=frozenset(layers), logits=True)
    for rows in parts:
        taps = tap_teacher(teacher, to_device(read_task_batch(data, rows), device()).inputs, dtype, wanted)
        assert taps.logits is not None
        first = [taps.hidden[layer][:, 0] for layer in layers]
        answers[rows] = torch.cat([taps.logits, *first], dim=1).float().cpu().numpy()
    return dataclasses.replace(data, answers=TeacherAnswers(answers, layers))


@torch.no_grad()
def require_same_loss(ways: dict[str, Way], batch: TaskBatch) -> None:
    """Without dropout, against fastdistil's in the precision of the case."""
    values = {}
    for name, way in ways.items():
        way.learner.eval()
        values[name] = way.loss(batch).item()
        way.learner.train()
    ours = FLOAT32_TEACHER if FLOAT32_TEACHER in ways else OURS
    for name, value in values.items():
        slack = BFLOAT16_SLACK if ways[name].bfloat16 or ways[ours].bfloat16 else SLACK
        assert math.isclose(value, values[ours], rel_tol=slack), f"{name}: {value}, {ours}: {values[ours]}"


@torch.no_grad()
def require_known_answers(way: Way, batch: TaskBatch) -> None:
    """That the answers in the batch give the loss that asking the teacher does."""
    way.learner.eval()
    known, asked = way.loss(batch).item(), way.loss(dataclasses.replace(batch, answers=None)).item()
    way.learner.train()
    assert math.isclose(known, asked, rel_tol=SLACK), f"answers known: {known}, asked: {asked}"


def part_of_epoch(way: Way, steps: int) -> Variant:
    def endless() -> Iterator[TaskBatch]:
        while True:
            yield from way.read()

    batches = endless()
    step = optimised(way.learner, fused=True, loss=lambda: way.loss(next(batches)))
    return lambda: [step() for _ in range(steps)]


def product_flops(case: Case, lengths: np.ndarray) -> int:
    """Of the matrix products that the encoders need without padding: 2 a multiply-add, the backward twice the
    forward. The losses' own are small beside them."""
    dim = case.dim
    layer = 2 * int(12 * dim**2 * lengths.sum() + 2 * dim * np.square(lengths).sum())
    return (TEACHER_LAYERS + 3 * STUDENT_LAYERS) * layer


def tokens_a_step(
    data: EncodedTask, grouped: Sequence[np.ndarray], random: Sequence[np.ndarray], case: Case
) -> dict[str, int]:
    """The mean over the epoch, padding included."""
    totals = {
        ORIGINAL: len(data) * case.length,
        PLAIN: sum(len(rows) * int(data.lengths[rows].max()) for rows in random),
        OURS: sum(read_task_batch(data, rows).input_ids.numel() for rows in grouped),
    }
    return {name: round(total / len(grouped)) for name, total in totals.items()}


def build(case: Case) -> Work:
    torch.manual_seed(SEED)
    dtype = torch.bfloat16 if case.precision == "bfloat16" else None
    data, text = read_texts(case.vocab, case.length)

    def batches_of(data: EncodedTask) -> TaskBatches:
        return TaskBatches(data, batch_size=case.batch, max_tokens=MAX_TOKENS, seed=SEED, device=device())

    grouped = batches_of(data)
    grouped_rows = [grouped.rows(step) for step in range(grouped.steps_per_epoch)]
    order = permutation(len(data), SEED, 0).numpy()
    random_rows = np.array_split(order, range(case.batch, len(order), case.batch))

    def longest(batches: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([data.lengths[rows].max() for rows in batches])

    def padded(rows: np.ndarray, length: int) -> TaskBatch:
        return to_device(fitted(read_task_batch(data, rows), length), device())

    steps = representative(longest(grouped_rows), case.steps)
    randoms = [random_rows[i] for i in representative(longest(random_rows), case.steps)]
    to_longest = [padded(rows, int(data.lengths[rows].max())) for rows in randoms]
    to_length = [padded(grouped_rows[step], case.length) for step in steps]

    def read(batches: TaskBatches) -> Iterator[TaskBatch]:
        for step in steps:
            (batch,) = batches.micro_batches(step)  # no step is above MAX_TOKENS
            yield batch

    teacher, projection = make_teacher(case), nn.Linear(case.dim, case.dim).to(device())

    def learner() -> nn.ModuleList:
        student = make_student(teacher, teacher_layers=range(STUDENT_LAYERS))
        return nn.ModuleList([student, copy.deepcopy(projection)]).train()

    def ours(teacher_dtype: torch.dtype | None, batches: TaskBatches = grouped) -> Way:
        return our_way(case.kind, teacher, learner(), lambda: read(batches), dtype, teacher_dtype)

    ways = {
        ORIGINAL: original_way(case.kind, teacher, learner(), to_length, dtype),
        PLAIN: plain_way(case.kind, teacher, learner(), to_longest, dtype),
        # As `run.teacher_precision: auto` has it: the teacher in bfloat16 where the device is fast at it.
        OURS: ours(fast_dtype(device())),
    }
    if dtype is None and fast_dtype(device()) is not None:
        ways[FLOAT32_TEACHER] = ours(None)
    require_same_loss(ways, full_batch(case))
    alike = {name: way for name, way in ways.items() if (case.kind, name) != ("tinybert", ORIGINAL)}
    require_same_loss(alike, padded(randoms[0][:4], case.length))
    if case.kind != "tinybert":  # whose losses are of all tokens: too many answers to keep
        parts = [grouped_rows[step] for step in steps]
        known = batches_of(with_answers(case.kind, teacher, data, parts, fast_dtype(device())))
        ways[ANSWERED] = ours(fast_dtype(device()), known)
        require_known_answers(ways[OURS], next(read(known)))

    sample = np.concatenate([data.lengths[grouped_rows[step]] for step in steps])
    return Work(
        variants={name: part_of_epoch(way, case.steps) for name, way in ways.items()},
        tokens=int(sample.sum()),
        flops=product_flops(case, sample),
        launch_ahead=False,
        notes={
            "text": text,
            "tokens_a_step": {
                name: round(sum(batch.input_ids.numel() for batch in way.read()) / case.steps)
                for name, way in ways.items()
            },
            "tokens_a_step_of_the_epoch": tokens_a_step(data, grouped_rows, random_rows, case),
        },
    )


@pytest.mark.parametrize("case", cases(GPU if device().type == "cuda" else CPU, QUICK), ids=str)
def test_part_of_epoch(benchmark: Any, case: Case) -> None:
    if case.precision == "bfloat16" and not native_bf16_products(device()):
        pytest.skip("not measurable on this CPU: it has no bfloat16 matrix instructions")
    op = "attention_mse_fwd" if case.kind == "tinybert" else "kd_loss_fwd"
    compare(benchmark, "train_task", case, build, op=op)
