import copy
import io

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from fastdistil.compress.low_rank import METHODS, LowRankLinear, LowRankOptions, low_rank_linear
from fastdistil.compress.method import Calibration
from fastdistil.compress.replacements import replace, replacements
from fastdistil.compress.sensitivity import factorise
from fastdistil.errors import UserError

(METHOD,) = METHODS


def _apply(model, calibration=None, **options):
    return METHOD.finish(
        METHOD.apply(model, LowRankOptions(**options), calibration), LowRankOptions(**options)
    )


def _matrices(model):
    """Path -> linear layer or its low-rank form, of the encoder's layers."""
    thin = {m for module in model.modules() if isinstance(module, LowRankLinear) for m in module.children()}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | LowRankLinear) and ".layer" in path and module not in thin
    }


def _matrix_parameters(model):
    return sum(
        module.down.weight.numel() + module.up.weight.numel()
        if isinstance(module, LowRankLinear)
        else module.weight.numel()
        for module in _matrices(model).values()
    )


def _logits(model, batch):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def _output_loss(model, original, calibration):
    """The mean share of each matrix's output energy that is lost, on the inputs of the original model."""
    approximations = {path: module.weight.detach() for path, module in _matrices(model).items()}
    lost, whole = dict.fromkeys(approximations, 0.0), dict.fromkeys(approximations, 0.0)

    def measure(path, module, args):
        states = args[0][mask]
        weight = module.weight.detach()
        lost[path] += float(((states @ (weight - approximations[path]).mT) ** 2).sum())
        whole[path] += float(((states @ weight.mT) ** 2).sum())

    handles = [
        module.register_forward_pre_hook(lambda m, args, path=path: measure(path, m, args))
        for path, module in _matrices(original).items()
    ]
    for batch in calibration.batches:
        mask = batch.attention_mask
        with torch.no_grad():
            original(input_ids=batch.input_ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return sum(lost[path] / whole[path] for path in lost) / len(lost)


@pytest.mark.parametrize("shape", [(24, 8), (16, 16), (9, 20)])
def test_at_full_rank_the_factors_compute_what_the_layer_does(shape):
    linear = nn.Linear(shape[1], shape[0])
    factors = low_rank_linear(linear, factorise(linear.weight), min(shape))
    states = torch.randn(5, shape[1])
    torch.testing.assert_close(factors(states), linear(states))
    torch.testing.assert_close(factors.weight, linear.weight)
    assert torch.equal(factors.bias, linear.bias)


def test_both_factors_have_directions_of_the_same_length():
    linear = nn.Linear(16, 24)
    factors = low_rank_linear(linear, factorise(linear.weight), 5)
    torch.testing.assert_close(factors.up.weight.norm(dim=0), factors.down.weight.norm(dim=1))


def test_a_matrix_of_zeros_is_factorised():
    linear = nn.Linear(8, 8)
    nn.init.zeros_(linear.weight)
    factors = low_rank_linear(linear, factorise(linear.weight), 2)
    assert torch.equal(factors.weight, torch.zeros(8, 8))


def test_the_uniform_ratio_is_met_by_every_matrix(build, family):
    model = build(family)
    before = _matrices(model)
    sizes = {path: module.weight.numel() for path, module in before.items()}
    _apply(model, ratio=0.5)
    after = _matrices(model)
    assert after.keys() == before.keys()
    for path, module in after.items():
        assert isinstance(module, LowRankLinear)
        parameters = module.down.weight.numel() + module.up.weight.numel()
        one_rank = module.in_features + module.out_features
        assert sizes[path] / 2 - one_rank < parameters <= sizes[path] / 2


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_the_sensitive_ranks_meet_the_budget(build, calibration, family, ratio):
    model = build(family)
    budget = ratio * _matrix_parameters(model)
    largest = max(sum(module.weight.shape) for module in _matrices(model).values())
    _apply(model, calibration, ratio=ratio)
    assert budget - largest < _matrix_parameters(model) <= budget


def test_activation_and_sensitivity_are_the_default_with_examples(build, calibration):
    default = _apply(build("bert"), calibration)
    named = _apply(build("bert"), calibration, method="activation", ranks="sensitivity")
    assert replacements(default) == replacements(named)
    for a, b in zip(default.parameters(), named.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_rank_is_the_same_for_all_matrices_with_examples_too(build, calibration):
    model = _apply(build("bert"), calibration, rank=6)
    assert {module.rank for module in _matrices(model).values()} == {6}


def test_the_plain_svd_does_not_look_at_the_examples(build, calibration):
    alone = _apply(build("bert"), None, ratio=0.5)
    beside = _apply(build("bert"), calibration, ratio=0.5, method="svd", ranks="uniform")
    for a, b in zip(alone.parameters(), beside.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_activation_aware_factors_lose_less_of_the_outputs(build, calibration, family):
    original = build(family)
    plain = _apply(build(family), calibration, method="svd", ranks="uniform")
    aware = _apply(build(family), calibration, method="activation", ranks="uniform")
    assert _output_loss(aware, original, calibration) < 0.95 * _output_loss(plain, original, calibration)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("method", ["svd", "activation"])
def test_ranks_by_sensitivity_change_the_logits_less(build, batches, calibration, family, method):
    errors = {}
    for ranks in ("uniform", "sensitivity"):
        model = _apply(build(family), calibration, method=method, ranks=ranks, ratio=0.8)
        with torch.no_grad():
            errors[ranks] = sum(
                float((_logits(model, batch) - _logits(build(family), batch)).square().sum())
                for batch in batches
            )
    assert errors["sensitivity"] < errors["uniform"]


@pytest.mark.parametrize(
    ("modules", "expected"), [("attention", ["attention"]), ("ffn", ["ffn"]), ("all", ["attention", "ffn"])]
)
def test_modules_says_which_matrices_are_taken(build, family, modules, expected):
    model = _apply(build(family), modules=modules)
    names = ("attention", "attn")
    taken = {
        "attention" if any(part in names for part in path.split(".")) else "ffn"
        for path, _ in replacements(model)
    }
    assert sorted(taken) == expected
    assert len(replacements(model)) == sum(
        isinstance(module, LowRankLinear) for module in _matrices(model).values()
    )


def test_a_matrix_that_the_rank_does_not_make_smaller_stays_dense(build):
    model = _apply(build("bert"), rank=17)  # 32 × 32 needs < 16, 48 × 32 needs < 19.2
    dense = {path.rsplit(".", 1)[0] for path, module in _matrices(model).items() if type(module) is nn.Linear}
    assert {path.split(".", 4)[4] for path in dense} == {"attention.self", "attention.output"}
    assert len(replacements(model)) == 4


def test_reload_is_bit_equal(build, calibration, family, reload_equal):
    model = _apply(build(family), calibration, ratio=0.4)
    loaded = reload_equal(model)
    assert replacements(loaded) == replacements(model)


def test_the_file_holds_the_factors_alone(build, save):
    full, thin = save(build("bert"), "full"), save(_apply(build("bert"), ratio=0.3), "thin")
    saved = build("bert").num_parameters() - _apply(build("bert"), ratio=0.3).num_parameters()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, thin)]
    assert sizes[0] - sizes[1] > 3.8 * saved  # bytes; the header of the smaller one names more tensors


def test_pruned_linear_layers_are_factorised_and_reload(build, reload_equal):
    model = build("bert")
    for layer in (0, 1):
        prefix = f"bert.encoder.layer.{layer}"
        for path, sizes in ((f"{prefix}.intermediate.dense", (32, 20)), (f"{prefix}.output.dense", (20, 32))):
            spec = {"kind": "linear", "in_features": sizes[0], "out_features": sizes[1]}
            replace(model, path, nn.Linear(*sizes), spec)
    _apply(model, ratio=0.5, modules="ffn")
    loaded = reload_equal(model)
    factors = loaded.get_submodule("bert.encoder.layer.1.output.dense")
    assert (factors.in_features, factors.out_features, factors.rank) == (20, 32, 6)


def test_a_training_step_moves_both_factors(build, calibration):
    model = _apply(build("bert"), calibration, ratio=0.5)
    factors = model.get_submodule("bert.encoder.layer.0.output.dense")
    before = copy.deepcopy(factors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = calibration.loss(model, calibration.batches[0])
    first.backward()
    optimizer.step()
    assert not torch.equal(factors.up.weight, before.up.weight)
    assert not torch.equal(factors.down.weight, before.down.weight)
    assert calibration.loss(model, calibration.batches[0]) < first


def test_the_factors_run_under_bf16_autocast(build, run):
    model = _apply(build("bert"), ratio=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(model)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), run(model), rtol=0.05, atol=0.05)


def test_bf16_weights_stay_bf16(build, calibration):
    model = _apply(build("bert").to(torch.bfloat16), calibration, ratio=0.5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = _apply(build("bert"), calibration, ratio=0.5)
    path = "bert.encoder.layer.0.output.dense"
    torch.testing.assert_close(
        model.get_submodule(path).weight.float(), exact.get_submodule(path).weight, rtol=0.1, atol=0.05
    )


def test_the_factors_export_to_onnx(build, run):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = _apply(build("bert"), ratio=0.5).bert.encoder.layer[0].output.dense
    states = torch.randn(3, 7, 48)
    file = io.BytesIO()
    torch.onnx.export(model, (states,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {session.get_inputs()[0].name: states.numpy()})
    torch.testing.assert_close(torch.from_numpy(exported), model(states).detach())


def test_a_second_time_there_is_nothing_left(build):
    model = _apply(build("bert"))
    with pytest.raises(UserError, match="no dense linear layer of float weights is left"):
        _apply(model)


def test_a_rank_larger_than_the_matrix_is_refused(build):
    with pytest.raises(UserError, match=r"rank 33 is larger than the 32 × 32 matrix bert\.encoder\.layer\.0"):
        _apply(build("bert"), rank=33)


def test_a_rank_that_makes_no_matrix_smaller_is_refused(build):
    with pytest.raises(UserError, match="rank 20 makes no matrix smaller, ranks up to 19 do"):
        _apply(build("bert"), rank=20)


def test_a_ratio_below_rank_one_is_refused(build):
    with pytest.raises(
        UserError, match=r"ratio 0\.01 is below that of rank 1 for every matrix: at least 0\.0"
    ):
        _apply(build("bert"), ratio=0.01)


@pytest.mark.parametrize("options", [{"method": "activation"}, {"ranks": "sensitivity"}])
def test_what_looks_at_examples_is_refused_without(build, options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name} '{value}' needs examples"):
        _apply(build("bert"), **options)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_a_ratio_outside_of_0_to_1_is_refused(ratio):
    with pytest.raises(ValidationError, match="ratio"):
        LowRankOptions(ratio=ratio)


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValidationError, match="rank"):
        LowRankOptions(rank=0)


def test_rank_and_ratio_together_are_refused():
    with pytest.raises(ValidationError, match="give one of them"):
        LowRankOptions(rank=4, ratio=0.5)


def test_one_rank_and_ranks_by_sensitivity_are_refused():
    with pytest.raises(ValidationError, match="rank is the same for every matrix"):
        LowRankOptions(rank=4, ranks="sensitivity")


def test_coded_weights_are_refused(build):
    model = build("bert")
    path = "bert.encoder.layer.1.output.dense"
    nn.utils.parametrizations.weight_norm(model.get_submodule(path))
    with pytest.raises(UserError, match=rf"{path} is pruned or clustered already"):
        _apply(model)


def test_another_family_is_refused():
    config = transformers.AlbertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(
        UserError, match=r"'albert'.*supported: bert, distilbert, electra, modernbert, roberta"
    ):
        _apply(transformers.AlbertModel(config))


def test_an_encoder_alone_is_factorised(build, batches, reload_equal):
    model = _apply(
        build("bert", ""), Calibration(batches, lambda model, batch: model(**batch.inputs)[0].sum())
    )
    assert all(path.startswith("encoder.layer.") for path, _ in replacements(model))
    reload_equal(model)
