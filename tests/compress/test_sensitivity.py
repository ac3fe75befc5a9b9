import itertools
import math

import pytest
import torch

from fastdistil.compress.sensitivity import (
    allocate_ranks,
    factorise,
    largest_saving_rank,
    output_changes,
    second_moments,
)

SHAPES = [(12, 8), (8, 8), (7, 13)]  # (out, in): tall, square, wide


def _weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(width, count=40):
    """Of very different sizes in different directions, as activations are."""
    mixing = _weight((width, width), seed=1) * torch.logspace(0, -2, width, dtype=torch.float64)[:, None]
    return _weight((count, width), seed=2) @ mixing


def _moment(weight, inputs):
    states = inputs if weight.shape[1] < weight.shape[0] else inputs @ weight.mT
    return states.mT @ states / len(inputs)


def _truncated(factors, rank):
    return factors.basis[:, :rank] @ factors.parts[:rank]


def _loss(weight, approximation, inputs):
    return ((inputs @ (weight - approximation).mT) ** 2).sum(1).mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_factorisation_loses_the_tail_of_the_singular_values(shape):
    weight = _weight(shape)
    singular = torch.linalg.svdvals(weight)
    factors = factorise(weight)
    for rank in (1, 3, min(shape) - 1):
        error = torch.linalg.norm(weight - _truncated(factors, rank))
        torch.testing.assert_close(error, singular[rank:].norm())  # Eckart and Young


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("data", [False, True])
def test_all_directions_give_the_weight_back(shape, data):
    weight = _weight(shape)
    factors = factorise(weight, _moment(weight, _inputs(shape[1])) if data else None)
    torch.testing.assert_close(factors.basis @ factors.parts, weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_data_aware_loss_is_the_closed_form(shape):
    """The tail of the singular values of W C^½, C the inputs' second moment (DRONE, SVD-LLM)."""
    weight, inputs = _weight(shape), _inputs(shape[1])
    factors = factorise(weight, _moment(weight, inputs))
    cholesky = torch.linalg.cholesky(inputs.mT @ inputs / len(inputs))
    singular = torch.linalg.svdvals(weight @ cholesky)
    for rank in (1, 3, min(shape) - 1):
        loss = _loss(weight, _truncated(factors, rank), inputs)
        torch.testing.assert_close(loss, (singular[rank:] ** 2).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_data_aware_loss_is_below_that_of_the_plain_svd(shape):
    weight, inputs = _weight(shape), _inputs(shape[1])
    moment = _moment(weight, inputs)
    aware, plain = factorise(weight, moment), factorise(weight)
    for rank in (1, 3):
        loss = _loss(weight, _truncated(aware, rank), inputs)
        assert loss < 0.9 * _loss(weight, _truncated(plain, rank), inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_in_a_part_of_their_space_are_factorised_without_loss(shape):
    weight = _weight(shape)
    inputs = _inputs(shape[1])[:, :2] @ _weight((2, shape[1]), seed=3)  # of rank 2
    factors = factorise(weight, _moment(weight, inputs))
    assert _loss(weight, _truncated(factors, 2), inputs) < 1e-20 * _loss(weight, 0 * weight, inputs)


@pytest.mark.parametrize(
    ("family", "paths"),  # a tall and a wide matrix, with bias and without
    [
        ("bert", ["encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"]),
        ("modernbert", ["layers.1.mlp.Wi", "layers.1.mlp.Wo"]),
    ],
)
def test_second_moments_are_those_of_all_tokens_but_padding(build, batches, family, paths):
    model = build(family).double()
    linears = {path: model.base_model.get_submodule(path) for path in paths}
    moments = second_moments(model, linears, batches)
    seen = {path: [] for path in paths}

    def keep(path, module, states):
        outputs = states[0] @ module.weight.mT
        seen[path].append((states[0] if module.in_features < module.out_features else outputs)[mask])

    for path, linear in linears.items():
        linear.register_forward_pre_hook(lambda m, args, path=path: keep(path, m, args))
    for batch in batches:
        mask = batch.attention_mask
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=mask)
    for path in paths:
        states = torch.cat(seen[path])
        assert len(states) == sum(int(batch.attention_mask.sum()) for batch in batches)
        torch.testing.assert_close(moments[path], states.mT @ states / len(states))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("bert", "encoder.layer.0.attention.self.value"),
        ("bert", "encoder.layer.0.output.dense"),
        ("modernbert", "layers.1.mlp.Wi"),
    ],
)
def test_output_changes_are_those_of_small_steps(build, batches, family, path, frozen):
    """With one logit its random sign drops out, so that the expectation is exact."""
    model = build(family, num_labels=1).double().requires_grad_(not frozen)
    linear = model.base_model.get_submodule(path)
    basis = factorise(linear.weight).basis
    changes = output_changes(model, {"a": linear}, {"a": basis}, batches)["a"]

    def logits(direction, step):
        u, bias = basis[:, direction], 0 if linear.bias is None else linear.bias
        handle = linear.register_forward_hook(
            lambda module, args, output: output - step * ((output - bias) @ u)[..., None] * u
        )
        with torch.no_grad():
            found = [model(input_ids=b.input_ids, attention_mask=b.attention_mask)[0] for b in batches]
        handle.remove()
        return torch.cat(found)

    for direction in (0, 1, 7):
        slope = (logits(direction, 1e-5) - logits(direction, -1e-5)) / 2e-5
        torch.testing.assert_close(changes[direction], slope.square().mean(), rtol=1e-5, atol=0)


def test_measuring_leaves_no_hook_and_no_gradient_behind(build, batches):
    model = build("bert")
    linear = model.base_model.get_submodule("encoder.layer.0.output.dense")
    second_moments(model, {"a": linear}, batches)
    output_changes(model, {"a": linear}, {"a": factorise(linear.weight).basis}, batches)
    assert not linear._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("shape", "rank"), [((8, 8), 3), ((12, 8), 4), ((7, 13), 4), ((1, 9), 0)])
def test_the_largest_saving_rank(shape, rank):
    assert largest_saving_rank(*shape) == rank
    assert rank * sum(shape) < math.prod(shape) <= (rank + 1) * sum(shape)


LOSSES = [
    torch.tensor([100.0, 1.0, 0.5, 0.2, 0.1, 0.1, 0.05, 0.05]),  # one direction holds nearly all
    torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0]),  # no direction may go
    torch.tensor([8.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2]),
]
SPECTRA = [(12, 8), (8, 8), (7, 13)]


def _cost(ranks):
    return sum(
        math.prod(shape) if rank is None else rank * sum(shape)
        for rank, shape in zip(ranks, SPECTRA, strict=True)
    )


def _lost(ranks):
    return sum(0.0 if r is None else float(e[r:].sum()) for r, e in zip(ranks, LOSSES, strict=True))


def _all_allocations():
    return itertools.product(*([*range(1, largest_saving_rank(*shape) + 1), None] for shape in SPECTRA))


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5, 0.6, 0.75, 0.9])
def test_the_allocation_is_the_best_of_all_that_cost_no_more(ratio):
    budget = int(ratio * sum(math.prod(shape) for shape in SPECTRA))
    ranks = allocate_ranks(LOSSES, SPECTRA, budget)
    assert _cost(ranks) <= budget
    best = min(_lost(other) for other in _all_allocations() if _cost(other) <= _cost(ranks))
    assert _lost(ranks) == pytest.approx(best)


@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.6, 0.75])
def test_the_allocation_beats_uniform_ranks(ratio):
    budget = int(ratio * sum(math.prod(shape) for shape in SPECTRA))
    uniform = [int(ratio * math.prod(shape) / sum(shape)) for shape in SPECTRA]
    assert _lost(allocate_ranks(LOSSES, SPECTRA, budget)) < _lost(uniform)


def test_the_budget_is_used_up_to_less_than_one_rank():
    losses = [torch.rand(64, generator=torch.Generator().manual_seed(i)).sort()[0].flip(0) for i in range(6)]
    shapes = [(64, 64 + 32 * i) for i in range(6)]
    budget = sum(math.prod(shape) for shape in shapes) // 2
    ranks = allocate_ranks(losses, shapes, budget)
    cost = sum(
        math.prod(shape) if rank is None else rank * sum(shape)
        for rank, shape in zip(ranks, shapes, strict=True)
    )
    assert budget - max(map(sum, shapes)) < cost <= budget


def test_every_matrix_keeps_a_rank_on_the_smallest_budget():
    assert allocate_ranks(LOSSES, SPECTRA, sum(map(sum, SPECTRA))) == [1, 1, 1]


def test_nothing_is_factorised_where_the_budget_holds_everything():
    assert allocate_ranks(LOSSES, SPECTRA, sum(map(math.prod, SPECTRA))) == [None] * 3


def test_a_matrix_that_no_rank_makes_smaller_stays_dense():
    assert allocate_ranks([torch.ones(1), torch.ones(8)], [(1, 9), (8, 8)], 9 + 16) == [None, 1]
