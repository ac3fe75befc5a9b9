"""Prediction of tasks against a plain float64 computation from the logits of both models."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastdistil.data.task_batches import TaskBatch
from fastdistil.errors import UserError
from fastdistil.models.taps import Taps, tap, tap_teacher
from fastdistil.objectives import PredictionObjective

T, KD, TASK = 3.0, 0.7, 0.4
KINDS = ("classification", "choice", "regression", "span")
LENGTHS = torch.tensor([11, 4, 7, 9])


def task_batch(kind: str) -> TaskBatch:
    """Four examples, three of a choice: the last has no label, and of a span the second has none either."""
    generator = torch.Generator().manual_seed(0)
    choices = 3 if kind == "choice" else 1
    lengths = LENGTHS.repeat_interleave(choices)
    mask = torch.arange(11) < lengths[:, None]
    ids = torch.randint(5, 61, mask.shape, generator=generator).masked_fill(~mask, 0)
    labels = {
        "regression": torch.tensor([0.5, 2.0, -1.5, torch.nan]),
        "span": torch.tensor([[2, 10], [-100, -100], [0, 3], [5, -100]]),
    }.get(kind, torch.tensor([2, 0, 1, -100]))
    return TaskBatch(ids, mask, torch.zeros_like(ids), labels, choices)


def random_logits(kind: str, batch: TaskBatch, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = {"regression": (4, 1), "span": (4, 2, 11)}.get(kind, (4, 3))
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.masked_fill(~batch.attention_mask[:, None], -torch.inf) if kind == "span" else logits


def taps(logits: Tensor) -> Taps:
    return Taps(torch.empty(0), model=None, logits=logits)


def part(batch: TaskBatch, rows: slice) -> TaskBatch:
    sequences = slice(rows.start * batch.num_choices, rows.stop * batch.num_choices)
    names = ("input_ids", "attention_mask", "token_type_ids")
    changed = {name: getattr(batch, name)[sequences] for name in names}
    return replace(batch, labels=batch.labels[rows], **changed)


def reference(
    kind: str, distance: str, student: Tensor, teacher: Tensor, batch: TaskBatch
) -> dict[str, Tensor]:
    """Means of both terms, one row after the other."""
    kd, task = [], []
    labels = batch.labels.flatten().tolist()
    for i, (s, t) in enumerate(zip(student.flatten(0, -2), teacher.flatten(0, -2), strict=True)):
        if kind == "span":
            s, t = s[: LENGTHS[i // 2]], t[: LENGTHS[i // 2]]
        if kind == "regression" or distance == "mse":
            kd.append((s - t).square().mean())
        else:
            q, p = (t / T).softmax(0), (s / T).softmax(0)
            kd.append(T**2 * (q * (q / p).log()).sum())
        if kind == "regression":
            if labels[i] == labels[i]:
                task.append((s[0] - labels[i]).square())
        elif labels[i] >= 0:
            task.append(-s.softmax(0)[labels[i]].log())
    return {"kd": torch.stack(kd).mean(), "task": torch.stack(task).mean()}


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_terms_and_the_gradient_equal_the_plain_formula(kind, distance):
    batch = task_batch(kind)
    student = random_logits(kind, batch, 1).requires_grad_()
    teacher = random_logits(kind, batch, 2)
    objective = PredictionObjective(KD, TASK, T, distance)
    counts = objective.counts(batch)
    result = objective.loss(taps(student), taps(teacher), batch, counts)
    (3 * result.loss).backward()

    exact = student.detach().clone().requires_grad_()
    terms = reference(kind, distance, exact, teacher, batch)
    expected = KD * terms["kd"] + TASK * terms["task"]
    (3 * expected).backward()
    # The weights are divided by the counts in float32.
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=0)
    for term, count in counts.items():
        torch.testing.assert_close(result.sums[term] / count, terms[term], rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, exact.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kd_weight", [0.0, KD])
@pytest.mark.parametrize("kind", KINDS)
def test_one_term_alone(kind, kd_weight):
    batch = task_batch(kind)
    student, teacher = (random_logits(kind, batch, seed) for seed in (1, 2))
    objective = PredictionObjective(kd_weight, 0.0 if kd_weight else TASK, T)
    taught = taps(teacher) if kd_weight else None
    result = objective.loss(taps(student.requires_grad_()), taught, batch, objective.counts(batch))
    (term,) = objective.terms
    assert (term == "kd") == objective.needs_teacher == objective.teacher_taps.logits == bool(kd_weight)
    expected = reference(kind, "kl", student, teacher, batch)[term]
    torch.testing.assert_close(result.loss, (kd_weight or TASK) * expected, rtol=1e-6, atol=0)
    assert set(result.sums) == set(objective.counts(batch)) == {term}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_divergence_is_that_of_kd_loss(divergence):
    batch = task_batch("classification")
    student, teacher = (random_logits("classification", batch, seed) for seed in (1, 2))
    objective = PredictionObjective(1, 0, T, divergence=divergence, jsd_beta=0.3)
    loss = objective.loss(taps(student), taps(teacher), batch, objective.counts(batch)).loss
    q, p = (teacher / T).softmax(-1), (student / T).softmax(-1)
    m = 0.3 * q + 0.7 * p
    expected = {
        "forward_kl": q * (q / p).log(),
        "reverse_kl": p * (p / q).log(),
        "jsd": 0.3 * q * (q / m).log() + 0.7 * p * (p / m).log(),
    }[divergence]
    torch.testing.assert_close(loss, T**2 * expected.sum(-1).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_unequal_counts_add_up_to_the_whole(kind, distance):
    batch = task_batch(kind)
    student, teacher = (random_logits(kind, batch, seed) for seed in (1, 2))
    objective = PredictionObjective(KD, TASK, T, distance)
    counts = objective.counts(batch)
    student.requires_grad_()
    whole = objective.loss(taps(student), taps(teacher), batch, counts)
    whole.loss.backward()
    expected, student.grad = student.grad, None

    rows = [slice(0, 1), slice(1, 4)]
    for term, count in counts.items():
        assert count.dtype == torch.int64
        assert count == sum(objective.counts(part(batch, r))[term] for r in rows)
    results = [objective.loss(taps(student[r]), taps(teacher[r]), part(batch, r), counts) for r in rows]
    for result in results:
        result.loss.backward()
    torch.testing.assert_close(sum(r.loss for r in results), whole.loss)
    for term in counts:
        torch.testing.assert_close(sum(r.sums[term] for r in results), whole.sums[term])
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_label_the_task_term_is_zero_and_gradients_are_finite(kind):
    batch = task_batch(kind)
    unknown = torch.nan if kind == "regression" else -100
    batch = replace(batch, labels=torch.full_like(batch.labels, unknown))
    student = random_logits(kind, batch, 1).requires_grad_()
    objective = PredictionObjective(0, 1)
    result = objective.loss(taps(student), None, batch, objective.counts(batch))
    result.loss.backward()
    assert objective.counts(batch)["task"] == 0
    assert result.sums["task"] == 0
    assert (student.grad == 0).all()


def test_logits_of_padding_count_for_neither_distance():
    """They are -inf in both models; were they anything else, the squared error would still not see them."""
    batch = task_batch("span")
    student, teacher = (random_logits("span", batch, seed) for seed in (1, 2))
    objective = PredictionObjective(1, 0, distance="mse")
    counts = objective.counts(batch)
    expected = objective.loss(taps(student), taps(teacher), batch, counts).loss
    other = student.masked_fill(student.isinf(), torch.nan)
    assert objective.loss(taps(other), taps(teacher), batch, counts).loss == expected
    for distance in ("kl", "mse"):
        objective = PredictionObjective(1, 1, distance=distance)
        leaf = student.clone().requires_grad_()
        objective.loss(taps(leaf), taps(teacher), batch, objective.counts(batch)).loss.backward()
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[student.isinf()] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_stay_close(kind):
    batch = task_batch(kind)
    student, teacher = (random_logits(kind, batch, seed) for seed in (1, 2))
    objective = PredictionObjective(KD, TASK, T)
    counts = objective.counts(batch)
    exact = objective.loss(taps(student), taps(teacher), batch, counts)
    leaf = student.bfloat16().requires_grad_()
    result = objective.loss(taps(leaf), taps(teacher.bfloat16()), batch, counts)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss.double(), exact.loss, rtol=0.03, atol=0)
    assert leaf.grad.isfinite().all()


def task_model(kind: str, num_labels: int = 3):
    """A tiny BERT with the head of `transformers` for the kind, without dropout in effect."""
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels={"regression": 1, "span": 2}.get(kind, num_labels),
        initializer_range=0.5,
        problem_type="regression" if kind == "regression" else None,
    )
    name = {"span": "QuestionAnswering", "choice": "MultipleChoice"}.get(kind, "SequenceClassification")
    return getattr(transformers, f"BertFor{name}")(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_term_is_the_models_own_loss(kind):
    """So fine-tuning is that of `transformers`; of a span, its mean of the start's and the end's loss."""
    torch.manual_seed(0)
    model, batch = task_model(kind), task_batch(kind)
    batch = part(batch, slice(0, 3))
    if kind == "span":
        batch = replace(batch, labels=torch.tensor([[2, 10], [1, 1], [0, 3]]))
    objective = PredictionObjective(0, 1)
    result = objective.loss(
        tap(model, batch.inputs, objective.student_taps), None, batch, objective.counts(batch)
    )
    result.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    labels = {"labels": batch.labels}
    if kind == "span":
        labels = dict(zip(("start_positions", "end_positions"), batch.labels.unbind(1), strict=True))
    expected = model(**batch.inputs, **labels).loss
    if kind == "span":
        # transformers gives the padding a share of the softmax.
        ends = model(**batch.inputs)
        rows = torch.stack([ends.start_logits, ends.end_logits], 1)
        rows = rows.masked_fill(~batch.attention_mask[:, None], -torch.inf)
        expected = nn.functional.cross_entropy(rows.flatten(0, 1), batch.labels.flatten())
    expected.backward()
    torch.testing.assert_close(result.loss, expected)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_no_distance(kind):
    torch.manual_seed(0)
    model, batch = task_model(kind), task_batch(kind)
    for distance in ("kl", "mse"):
        objective = PredictionObjective(1, 0, distance=distance)
        taught = tap_teacher(model, batch.inputs, wanted=objective.teacher_taps)
        result = objective.loss(
            tap(model, batch.inputs, objective.student_taps), taught, batch, objective.counts(batch)
        )
        assert abs(result.loss) < 1e-6
        result.loss.backward()


@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_heads_with_different_classes_are_refused(distance):
    batch = task_batch("classification")
    objective = PredictionObjective(1, 1, distance=distance)
    with pytest.raises(UserError, match="student's head has 2 classes and the teacher's 3"):
        objective.loss(taps(torch.zeros(4, 2)), taps(torch.zeros(4, 3)), batch, objective.counts(batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kd_weight": 0.0}, "kd_weight or task_weight above 0"),
        ({"distance": "l1"}, "distance must be 'kl' or 'mse', got 'l1'"),
    ],
)
def test_useless_prediction_objectives_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        PredictionObjective(**arguments)
