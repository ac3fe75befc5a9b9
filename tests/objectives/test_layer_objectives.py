"""Objectives of single layers against plain float64 formulas on what hooks catch inside the models."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from fastdistil.data.masking import MaskedBatch
from fastdistil.errors import UserError
from fastdistil.models.student import make_student
from fastdistil.models.taps import Wanted, tap, tap_teacher
from fastdistil.objectives import (
    AttentionTransferObjective,
    EmbeddingsObjective,
    FeatureMapsObjective,
    HiddenObjective,
    Objective,
    RelationsObjective,
)

HEADS = 2
PAIRS = ((0, 1), (1, 3))  # student's layer, teacher's layer


def encoders(student_width: int):
    """(student, teacher): 2 layers of that width, 4 of width 16; different weights, no dropout in effect."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    teacher = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    sizes = {"hidden_size": student_width, "num_attention_heads": HEADS, "init": "random"}
    student = make_student(teacher, num_layers=2, **sizes).eval().requires_grad_(True)
    with torch.no_grad():
        for parameter in [*teacher.parameters(), *student.parameters()]:
            parameter += 0.3 * torch.randn_like(parameter)
    return student, teacher


@pytest.fixture
def models():
    """A student of the teacher's width but half its depth."""
    return encoders(16)


@pytest.fixture
def narrow():
    """A student of width 12: head size 6 against 8."""
    return encoders(12)


@pytest.fixture
def batch() -> MaskedBatch:
    """Three sequences of 11, two of them padded: 11, 4 and 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 61, (3, 11), generator=generator)
    mask = torch.arange(11) < torch.tensor([[11], [4], [7]])
    none = ids.new_empty(3, 0)
    return MaskedBatch(ids, mask, torch.full_like(ids, -100), none, none)


def part(batch: MaskedBatch, rows: slice) -> MaskedBatch:
    return MaskedBatch(**{name: value[rows] for name, value in vars(batch).items() if value is not None})


def run(objective: Objective, student, teacher, batch, counts=None):
    ours = tap(student, batch.inputs, objective.student_taps)
    theirs = tap_teacher(teacher, batch.inputs, wanted=objective.teacher_taps)
    return objective.loss(ours, theirs, batch, counts or objective.counts(batch))


def inside(model, batch: MaskedBatch) -> dict[str, list[Tensor]]:
    """What the layers compute: "query", "key", "value" (B, L, D), and "hidden" with the embeddings first."""
    caught: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    for name, module in model.named_modules():
        for kind in caught:
            if name.endswith((f"self.{kind}", f"{kind[0]}_lin")):
                module.register_forward_hook(
                    lambda module, inputs, output, kind=kind: caught[kind].append(output)
                )
    output = model(batch.input_ids, batch.attention_mask.long(), output_hidden_states=True)
    return caught | {"hidden": list(output.hidden_states)}


def scores(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """(B, heads, L, L) scaled."""
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    return q @ k.mT / q.shape[-1] ** 0.5


def kl_rows(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of each valid row of scores (B, H, L, L), keys masked: (rows,)."""
    s, t = (x.masked_fill(~mask[:, None, None, :], -torch.inf).log_softmax(-1) for x in (student, teacher))
    kl = (t.exp() * (t - s)).nan_to_num(0.0).sum(-1)  # a masked key is 0 * (-inf + inf)
    return kl.transpose(0, 1)[:, mask].flatten()


def relations_reference(student, teacher, batch, weights) -> Tensor:
    ours, theirs = inside(student, batch), inside(teacher, batch)
    total = torch.zeros((), dtype=torch.float64)
    for kind, weight in weights.items():
        s, t = (scores(x[kind][-1], x[kind][-1], 4) for x in (ours, theirs))
        total = total + weight * kl_rows(s, t, batch.attention_mask).mean()
    return total


def transfer_reference(student, teacher, batch, distance) -> Tensor:
    ours, theirs = inside(student, batch), inside(teacher, batch)
    mask = batch.attention_mask
    valid = (mask[:, None, :, None] & mask[:, None, None, :]).expand(-1, HEADS, -1, -1)
    total = torch.zeros((), dtype=torch.float64)
    for i, j in PAIRS:
        s = scores(ours["query"][i], ours["key"][i], HEADS)
        t = scores(theirs["query"][j], theirs["key"][j], HEADS)
        term = (s - t)[valid].square().mean() if distance == "mse" else kl_rows(s, t, mask).mean()
        total = total + term
    return total


def hidden_reference(student, teacher, batch, projection=None, normalize=False, mask=None) -> Tensor:
    ours, theirs = inside(student, batch)["hidden"], inside(teacher, batch)["hidden"]
    mask = batch.attention_mask if mask is None else mask
    total = torch.zeros((), dtype=torch.float64)
    for i, j in PAIRS:
        s, t = ours[i + 1][mask], theirs[j + 1][mask]
        s = s if projection is None else projection(s)
        if normalize:
            s, t = nn.functional.normalize(s, dim=-1), nn.functional.normalize(t, dim=-1)
        total = total + nn.functional.mse_loss(s, t)
    return total


def feature_reference(student, teacher, batch) -> dict[str, Tensor]:
    ours, theirs = inside(student, batch)["hidden"], inside(teacher, batch)["hidden"]
    terms = dict.fromkeys(("feature_maps", "feature_mean", "feature_variance"), 0.0)
    for i, j in PAIRS:
        s, t = ours[i + 1][batch.attention_mask], theirs[j + 1][batch.attention_mask]
        means = s.mean(-1, keepdim=True), t.mean(-1, keepdim=True)
        variances = tuple((x - m).square().mean(-1, keepdim=True) for x, m in zip((s, t), means, strict=True))
        normalised = [(x - m) / v.sqrt() for x, m, v in zip((s, t), means, variances, strict=True)]
        terms["feature_maps"] += (normalised[0] - normalised[1]).square().mean()
        terms["feature_mean"] += (means[0] - means[1]).square().mean()
        terms["feature_variance"] += (variances[0] - variances[1]).abs().mean()
    return terms


def embeddings_reference(student, teacher, batch, projection=None) -> Tensor:
    s, t = (inside(model, batch)["hidden"][0][batch.attention_mask] for model in (student, teacher))
    return nn.functional.mse_loss(s if projection is None else projection(s), t)


def equals(objective: Objective, models, batch, weight: float, reference: Callable[..., Tensor]) -> None:
    """Value, logged term and all gradients, those of a projection too, with an upstream gradient of 3."""
    student, teacher = models
    result = run(objective, student, teacher, batch)
    (3 * result.loss).backward()

    exact, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    exact.zero_grad()
    projection = copy.deepcopy(getattr(objective, "projection", None))
    if projection is not None:
        projection.double().zero_grad()
    expected = reference(exact, teacher, batch, projection)
    (3 * weight * expected).backward()

    torch.testing.assert_close(result.loss.double(), weight * expected, rtol=1e-5, atol=0)
    if len(objective.terms) == 1:
        (term,) = objective.terms
        mean = result.sums[term].double() / objective.counts(batch)[term]
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=0)
    pairs = list(zip(student.named_parameters(), exact.parameters(), strict=True))
    if projection is not None:
        pairs += zip(objective.projection.named_parameters(), projection.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(
                ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("which", ["models", "narrow"])
def test_relations_equal_the_float64_terms_and_their_gradients(which, batch, request):
    weights = {"query": 1.0, "key": 0.5, "value": 2.0}
    objective = RelationsObjective(1, 3, 4, *weights.values())
    equals(
        objective,
        request.getfixturevalue(which),
        batch,
        1.0,
        lambda student, teacher, batch, _: relations_reference(student, teacher, batch, weights),
    )


@pytest.mark.parametrize("kind", ["query", "key", "value"])
def test_a_relation_with_weight_zero_is_left_out(models, batch, kind):
    weights = {name: float(name == kind) for name in ("query", "key", "value")}
    objective = RelationsObjective(1, 3, 4, *weights.values())
    assert objective.terms == (f"{kind}_relation",)
    assert set(run(objective, *models, batch).sums) == set(objective.terms)
    equals(objective, models, batch, 1.0, lambda s, t, b, _: relations_reference(s, t, b, {kind: 1.0}))


@pytest.mark.parametrize("which", ["models", "narrow"])
@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_attention_transfer_equals_the_float64_sum_over_layers(which, distance, batch, request):
    objective = AttentionTransferObjective(PAIRS, HEADS, distance, weight=0.7)
    pair = request.getfixturevalue(which)
    equals(objective, pair, batch, 0.7, lambda s, t, b, _: transfer_reference(s, t, b, distance))


@pytest.mark.parametrize("normalize", [False, True])
def test_hidden_equals_the_float64_sum_over_layers(models, batch, normalize):
    objective = HiddenObjective(PAIRS, 16, None, normalize, weight=0.7)
    equals(objective, models, batch, 0.7, lambda s, t, b, _: hidden_reference(s, t, b, None, normalize))


@pytest.mark.parametrize("normalize", [False, True])
def test_hidden_with_a_projection_trains_it(narrow, batch, normalize):
    objective = HiddenObjective(PAIRS, 16, nn.Linear(12, 16), normalize, weight=0.7)
    equals(objective, narrow, batch, 0.7, lambda s, t, b, p: hidden_reference(s, t, b, p, normalize))


@pytest.mark.parametrize("which", ["models", "narrow"])
@pytest.mark.parametrize("normalize", [False, True])
def test_hidden_of_the_first_tokens_is_a_mean_over_sequences_and_layers(which, batch, normalize, request):
    student, teacher = request.getfixturevalue(which)
    projection = nn.Linear(12, 16) if which == "narrow" else None
    objective = HiddenObjective(PAIRS, 16, projection, normalize, 0.7, "first", "mean")
    first = torch.zeros_like(batch.attention_mask)
    first[:, 0] = True

    def reference(student, teacher, batch, projection):
        return hidden_reference(student, teacher, batch, projection, normalize, first) / len(PAIRS)

    equals(objective, (student, teacher), batch, 0.7, reference)


def test_feature_maps_equal_the_float64_terms(models, batch):
    weights = {"feature_maps": 0.5, "feature_mean": 2.0, "feature_variance": 0.25}

    def reference(student, teacher, batch, _):
        terms = feature_reference(student, teacher, batch)
        return sum(weight * terms[name] for name, weight in weights.items())

    objective = FeatureMapsObjective(PAIRS, 16, *weights.values())
    assert objective.terms == tuple(weights)
    equals(objective, models, batch, 1.0, reference)


@pytest.mark.parametrize("term", ["feature_maps", "feature_mean", "feature_variance"])
def test_a_term_of_the_feature_maps_with_weight_zero_is_left_out(models, batch, term):
    names = ("feature_maps", "feature_mean", "feature_variance")
    objective = FeatureMapsObjective(PAIRS, 16, *(3.0 * (name == term) for name in names))
    assert objective.terms == (term,)
    assert set(run(objective, *models, batch).sums) == {term}
    equals(objective, models, batch, 3.0, lambda s, t, b, _: feature_reference(s, t, b)[term])


def test_embeddings_equal_the_float64_mean(models, batch):
    equals(EmbeddingsObjective(16, weight=0.7), models, batch, 0.7, embeddings_reference)


def test_embeddings_with_a_projection_train_it(narrow, batch):
    equals(EmbeddingsObjective(16, nn.Linear(12, 16), 0.7), narrow, batch, 0.7, embeddings_reference)


@pytest.mark.parametrize(
    "objective",
    [
        RelationsObjective(1, 3, 4),
        AttentionTransferObjective(PAIRS, HEADS, "mse"),
        AttentionTransferObjective(PAIRS, HEADS, "kl"),
        HiddenObjective(PAIRS, 16),
        HiddenObjective(PAIRS, 16, None, True, 1.0, "first", "mean"),
        FeatureMapsObjective(PAIRS, 16),
        EmbeddingsObjective(16),
    ],
    ids=["relations", "mse", "kl", "hidden", "first", "feature_maps", "embeddings"],
)
def test_micro_batches_of_unequal_counts_add_up_to_the_whole(models, batch, objective):
    # Gradients reach 70: float32 resolves no 1e-6 where such numbers cancel.
    student, teacher = (model.double() for model in models)
    counts = objective.counts(batch)
    whole = run(objective, student, teacher, batch)
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    micro = [part(batch, slice(0, 1)), part(batch, slice(1, 3))]
    for name, count in counts.items():
        assert count.dtype == torch.int64
        assert count == sum(objective.counts(b)[name] for b in micro)
    results = [run(objective, student, teacher, b, counts) for b in micro]
    for result in results:
        result.loss.backward()
    torch.testing.assert_close(sum(r.loss for r in results), whole.loss)
    for name in counts:
        torch.testing.assert_close(sum(r.sums[name] for r in results), whole.sums[name])
    for name, parameter in student.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_student_that_is_its_teacher_has_no_distance(models, batch):
    _, teacher = models
    same = ((0, 0), (3, 3))
    for objective in (
        RelationsObjective(3, 3, 4),
        AttentionTransferObjective(same, HEADS, "mse"),
        AttentionTransferObjective(same, HEADS, "kl"),
        HiddenObjective(same, 16),
        HiddenObjective(same, 16, normalize=True),
        HiddenObjective(same, 16, tokens="first"),
        FeatureMapsObjective(same, 16),
        EmbeddingsObjective(16),
    ):
        for total in run(objective, teacher, teacher, batch).sums.values():
            assert abs(total) < 1e-3


def test_under_autocast_the_terms_stay_close(models, batch):
    student, teacher = models
    for objective in (
        RelationsObjective(1, 3, 4),
        AttentionTransferObjective(PAIRS, HEADS, "mse"),
        FeatureMapsObjective(PAIRS, 16),
    ):
        exact = run(objective, student, teacher, batch)
        theirs = tap_teacher(teacher, batch.inputs, torch.bfloat16, objective.teacher_taps)
        with torch.autocast("cpu", torch.bfloat16):
            ours = tap(student, batch.inputs, objective.student_taps)
            result = objective.loss(ours, theirs, batch, objective.counts(batch))
        if ours.attention:
            assert ours.attention[1].query.dtype == theirs.attention[3].key.dtype == torch.bfloat16
        result.loss.backward()
        torch.testing.assert_close(result.loss, exact.loss, rtol=0.05, atol=0)
        assert student.get_input_embeddings().weight.grad.dtype == torch.float32


def test_what_several_objectives_want_is_tapped_once():
    objectives = [RelationsObjective(1, 3), HiddenObjective(PAIRS, 16), EmbeddingsObjective(16)]
    assert Wanted.union(o.teacher_taps for o in objectives) == Wanted(
        attention=frozenset({3}), hidden=frozenset({1, 3}), embeddings=True
    )
    assert Wanted.union([]) == Wanted()


def test_relation_heads_that_do_not_divide_a_width_are_named(models, batch):
    with pytest.raises(ValueError, match=r"num_heads must divide .* got 5"):
        run(RelationsObjective(1, 3, 5), *models, batch)


def test_relations_without_a_weight_are_refused():
    with pytest.raises(UserError, match="query_weight, key_weight or value_weight above 0"):
        RelationsObjective(1, 3, 4, 0, 0, 0)


def test_feature_maps_without_a_weight_are_refused():
    with pytest.raises(UserError, match="feature_weight, mean_weight or variance_weight above 0"):
        FeatureMapsObjective(PAIRS, 16, 0, 0, 0)


@pytest.mark.parametrize(
    "objective",
    [
        HiddenObjective(PAIRS, 16),
        HiddenObjective(PAIRS, 16, tokens="first"),
        FeatureMapsObjective(PAIRS, 16),
        EmbeddingsObjective(16),
    ],
    ids=["hidden", "first", "feature_maps", "embeddings"],
)
def test_states_of_padding_count_neither_in_value_nor_in_gradient(models, batch, objective):
    """Whatever the student's states of padding are: here they are 1,000 more than they were."""
    student, teacher = models
    ours = tap(student, batch.inputs, objective.student_taps)
    theirs = tap_teacher(teacher, batch.inputs, wanted=objective.teacher_taps)
    padding = ~batch.attention_mask[..., None]

    def moved(hidden: Tensor, by: float) -> Tensor:
        return (hidden.detach() + by * padding).requires_grad_()

    def loss(by: float):
        states = {layer: moved(hidden, by) for layer, hidden in ours.hidden.items()}
        embeddings = None if ours.embeddings is None else moved(ours.embeddings, by)
        changed = replace(ours, hidden=states, embeddings=embeddings)
        total = objective.loss(changed, theirs, batch, objective.counts(batch)).loss
        total.backward()
        return total, [*states.values(), *([] if embeddings is None else [embeddings])]

    plain, _ = loss(0.0)
    total, leaves = loss(1000.0)
    assert total == plain
    for leaf in leaves:
        assert (leaf.grad[~batch.attention_mask] == 0).all()
        assert (leaf.grad[:, 0] != 0).any()


def test_layers_that_see_a_window_are_refused(batch):
    from transformers import ModernBertConfig, ModernBertModel

    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    model = ModernBertModel(
        ModernBertConfig(pad_token_id=0, local_attention=4, num_attention_heads=HEADS, **special, **sizes)
    ).eval()
    run(AttentionTransferObjective(((0, 3),), HEADS), model, model, batch)
    with pytest.raises(UserError, match="layer 0 of the student or 1 of the teacher sees only a window"):
        run(AttentionTransferObjective(((0, 1),), HEADS), model, model, batch)
