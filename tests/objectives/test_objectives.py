"""Objectives against a plain float64 computation from the models' own logits and hidden states."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from fastdistil.data.masking import MaskedBatch
from fastdistil.errors import UserError
from fastdistil.models.student import make_student
from fastdistil.models.taps import Taps, tap, tap_teacher
from fastdistil.objectives import CosineObjective, VocabularyObjective

T, KD, CE = 2.0, 5.0, 2.0


@pytest.fixture
def models():
    """(student, teacher): different weights, no dropout in effect, so that only the objective is tested."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    teacher = BertForMaskedLM(config).eval().requires_grad_(False)
    student = make_student(teacher).eval().requires_grad_(True)
    with torch.no_grad():
        for parameter in [*teacher.parameters(), *student.parameters()]:
            parameter += 0.3 * torch.randn_like(parameter)
    return student, teacher


@pytest.fixture
def batch() -> MaskedBatch:
    """Four sequences of 11 with three picks each; the second has padding and only one pick that counts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 61, (4, 11), generator=generator)
    mask = torch.ones(4, 11, dtype=torch.bool)
    mask[1, 4:] = False
    ids[1, 4:] = 0
    positions = torch.tensor([[1, 5, 8], [2, 4, 5], [3, 6, 7], [1, 2, 9]])
    position_labels = torch.randint(5, 61, (4, 3), generator=generator)
    position_labels[1, 1:] = -100
    labels = torch.full((4, 11), -100).scatter(1, positions, position_labels)
    return MaskedBatch(ids, mask, labels, positions, position_labels)


def part(batch: MaskedBatch, rows: slice) -> MaskedBatch:
    return MaskedBatch(**{name: value[rows] for name, value in vars(batch).items() if value is not None})


def reference(student, teacher, batch: MaskedBatch, positions: str) -> dict[str, torch.Tensor]:
    """Means of the three terms in float64, from whole logits, the way the DistilBERT code selects them."""
    student, teacher = student.double(), teacher.double()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    s = student(**inputs, output_hidden_states=True)
    t = teacher(**inputs, output_hidden_states=True)
    chosen = batch.attention_mask if positions == "all" else batch.labels != -100
    s_log, t_log = (x.logits[chosen].div(T).log_softmax(-1) for x in (s, t))
    tokens = batch.attention_mask
    return {
        "kd": T**2 * (t_log.exp() * (t_log - s_log)).sum(-1).mean(),
        "ce": nn.functional.cross_entropy(s.logits.flatten(0, 1), batch.labels.flatten()),
        "cosine": 1
        - nn.functional.cosine_similarity(
            s.hidden_states[-1][tokens], t.hidden_states[-1][tokens], dim=-1
        ).mean(),
    }


def run(objective, student, teacher, batch, counts=None):
    taps = tap(student, batch.inputs)
    taught = tap_teacher(teacher, batch.inputs) if objective.needs_teacher else None
    return objective.loss(taps, taught, batch, counts or objective.counts(batch))


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_vocabulary_equals_the_float64_terms_and_their_gradients(models, batch, positions):
    student, teacher = models
    objective = VocabularyObjective(kd_weight=KD, ce_weight=CE, temperature=T, positions=positions)
    result = run(objective, student, teacher, batch)
    (3 * result.loss).backward()
    ours = gradients(student)

    exact = copy.deepcopy(student)
    terms = reference(exact, teacher, batch, positions)
    expected = KD * terms["kd"] + CE * terms["ce"]
    (3 * expected).backward()

    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=0)
    for name, count in objective.counts(batch).items():
        torch.testing.assert_close(result.sums[name].double() / count, terms[name], rtol=1e-5, atol=0)
    theirs = gradients(exact)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name].double(), grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_without_kd_it_is_the_models_own_masked_language_model_loss(models, batch, positions):
    student, _ = models
    objective = VocabularyObjective(kd_weight=0, ce_weight=1, positions=positions)
    assert not objective.needs_teacher
    result = run(objective, student, None, batch)
    result.loss.backward()
    ours = gradients(student)
    expected = student(batch.input_ids, batch.attention_mask.long(), labels=batch.labels).loss
    expected.backward()
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=0)
    for name, grad in gradients(student).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_kd_alone_needs_no_ce(models, batch, positions):
    student, teacher = models
    objective = VocabularyObjective(kd_weight=KD, temperature=T, positions=positions)
    result = run(objective, student, teacher, batch)
    assert objective.terms == ("kd",)
    assert set(result.sums) == {"kd"}
    terms = reference(copy.deepcopy(student), teacher, batch, positions)
    torch.testing.assert_close(result.loss.double(), KD * terms["kd"], rtol=1e-5, atol=0)


def test_cosine_equals_the_float64_mean_over_tokens_and_its_gradient(models, batch):
    student, teacher = models
    result = run(CosineObjective(weight=3.0), student, teacher, batch)
    result.loss.backward()
    ours = gradients(student)
    exact = copy.deepcopy(student)
    expected = 3 * reference(exact, teacher, batch, "all")["cosine"]
    expected.backward()
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.sums["cosine"].double() / batch.attention_mask.sum(), expected / 3)
    for name, grad in gradients(exact).items():
        torch.testing.assert_close(ours[name].double(), grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        VocabularyObjective(kd_weight=KD, ce_weight=CE),
        VocabularyObjective(kd_weight=KD, ce_weight=CE, positions="all"),
        VocabularyObjective(kd_weight=0, ce_weight=1),
        CosineObjective(),
    ],
    ids=["masked", "all", "mlm", "cosine"],
)
def test_micro_batches_of_unequal_counts_add_up_to_the_whole(models, batch, objective):
    student, teacher = models
    counts = objective.counts(batch)
    whole = run(objective, student, teacher, batch)
    whole.loss.backward()
    expected = gradients(student)

    micro = [part(batch, slice(0, 1)), part(batch, slice(1, 4))]
    for name, count in counts.items():
        assert count == sum(objective.counts(b)[name] for b in micro)
    results = [run(objective, student, teacher, b, counts) for b in micro]
    for result in results:
        result.loss.backward()
    torch.testing.assert_close(sum(r.loss for r in results), whole.loss)
    for name in counts:
        torch.testing.assert_close(sum(r.sums[name] for r in results), whole.sums[name])
    for name, grad in gradients(student).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("kd_weight", [0.0, 1.0])
def test_a_step_without_any_pick_has_finite_gradients(models, batch, positions, kd_weight):
    student, teacher = models
    empty = MaskedBatch(
        batch.input_ids,
        batch.attention_mask,
        torch.full_like(batch.labels, -100),
        batch.positions,
        torch.full_like(batch.position_labels, -100),
    )
    result = run(VocabularyObjective(kd_weight, 1.0, positions=positions), student, teacher, empty)
    result.loss.backward()
    assert result.sums["ce"] == 0
    assert all(grad.isfinite().all() for grad in gradients(student).values())


def test_the_teacher_gets_no_gradient_and_its_head_sees_only_the_picked_rows(models, batch):
    student, teacher = models
    seen = []
    teacher.requires_grad_(True).cls.predictions.transform.register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    run(VocabularyObjective(kd_weight=1.0), student, teacher, batch).loss.backward()
    assert seen == [torch.Size([12, 16])]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_under_autocast_the_products_run_in_bfloat16_and_stay_close(models, batch):
    student, teacher = models
    objective = VocabularyObjective(kd_weight=KD, ce_weight=CE)
    exact = run(objective, student, teacher, batch)
    with torch.autocast("cpu", torch.bfloat16):
        taps = tap(student, batch.inputs)
    taught = tap_teacher(teacher, batch.inputs, torch.bfloat16)
    assert taps.vocabulary_operands()[0].dtype == torch.bfloat16
    assert taught.vocabulary_operands()[0].dtype == torch.bfloat16
    result = objective.loss(taps, taught, batch, objective.counts(batch))
    result.loss.backward()
    torch.testing.assert_close(result.loss, exact.loss, rtol=0.03, atol=0)
    assert student.get_input_embeddings().weight.grad.dtype == torch.float32


def test_a_teacher_in_training_mode_is_refused(models, batch):
    _, teacher = models
    with pytest.raises(ValueError, match="eval mode"):
        tap_teacher(teacher.train(), batch.inputs)


def test_cosine_of_different_widths_is_refused(models, batch):
    student, teacher = models
    taps = tap(student, batch.inputs)
    narrow = Taps(taps.last_hidden[..., :8], taps.model)
    objective = CosineObjective()
    with pytest.raises(UserError, match="student's are 8 wide and the teacher's 16"):
        objective.loss(narrow, tap_teacher(teacher, batch.inputs), batch, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kd_weight": 0.0}, "kd_weight or ce_weight"),
        ({"positions": "some"}, "'masked' or 'all', got 'some'"),
    ],
)
def test_useless_vocabulary_objectives_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        VocabularyObjective(**arguments)
