from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastdistil.compress.encoded import code_of, weights_to_compress
from fastdistil.compress.prune_magnitude import METHODS, PruneMagnitudeOptions
from fastdistil.compress.replacements import replacements
from fastdistil.compress.store import load
from fastdistil.compress.weight_masks import cubic_sparsity, largest
from fastdistil.errors import UserError
from fastdistil.train.checkpoint import load_weights, write_model

(METHOD,) = METHODS
PATH = "bert.encoder.layer.1.output.dense"


def prune(model: Any, **options: Any) -> Any:
    chosen = PruneMagnitudeOptions(**options)
    return METHOD.finish(METHOD.apply(model, chosen, None), chosen)


def linears(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.base_model.named_modules() if isinstance(m, nn.Linear)}


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def train(
    model: Any, calibration: Any, steps: int, *, micro_batches: int = 1, optimizer: Any = None, first: int = 0
) -> Any:
    """Steps `first` and following, batches in turn, by AdamW over everything; returns the optimiser."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(steps):
        for part in range(micro_batches):
            torch.manual_seed(first + step)  # of the dropout
            calibration.loss(model, calibration.batches[(first + step + part) % 3]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return optimizer


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
def test_each_matrix_has_that_sparsity(build: Callable[..., Any], family: str, sparsity: float) -> None:
    model = prune(build(family), sparsity=sparsity)
    for linear in linears(model).values():
        assert zeros(linear.weight) == round(sparsity * linear.weight.numel())


def test_the_largest_weights_stay_as_they_are(tiny_bert: Any) -> None:
    before = tiny_bert.get_submodule(PATH).weight.detach().clone()
    prune(tiny_bert, sparsity=0.8)
    after = tiny_bert.get_submodule(PATH).weight
    kept = after != 0
    assert torch.equal(after[kept], before[kept])
    assert before[kept].abs().min() > before[~kept].abs().max()


def test_globally_the_smallest_of_all_go(tiny_bert: Any) -> None:
    tiny_bert.get_submodule(PATH).weight.data.mul_(0.5)
    before = {name: m.weight.detach().clone() for name, m in linears(tiny_bert).items()}
    pruned = linears(prune(tiny_bert, sparsity=0.6, scope="global"))
    every = torch.cat([weight.flatten() for weight in before.values()]).abs()
    threshold = every.sort().values[round(0.6 * len(every))]
    for name, weight in before.items():
        assert torch.equal(pruned[name].weight != 0, weight.abs() >= threshold)


def test_globally_each_matrix_keeps_a_weight(tiny_bert: Any) -> None:
    tiny_bert.get_submodule(PATH).weight.data.mul_(1e-6)
    model = prune(tiny_bert, sparsity=0.9, scope="global")
    weight = model.get_submodule(PATH).weight
    assert zeros(weight) == weight.numel() - 1


def test_head_and_embeddings_are_left_alone(tiny_bert: Any) -> None:
    prune(tiny_bert)
    assert zeros(tiny_bert.classifier.weight) == 0
    assert zeros(tiny_bert.get_input_embeddings().weight) == 0


def test_embeddings_are_pruned_on_demand(tiny_bert: Any, reload_equal: Callable[[Any], Any]) -> None:
    prune(tiny_bert, sparsity=0.75, embeddings=True)
    assert zeros(tiny_bert.get_input_embeddings().weight) == 75 * 32
    reload_equal(tiny_bert)


def test_reloads_bit_equal(
    build: Callable[..., Any], family: str, reload_equal: Callable[[Any], Any]
) -> None:
    model = prune(build(family), sparsity=0.7)
    assert {spec["kind"] for _, spec in replacements(model)} == {"sparse"}
    reload_equal(model)


def test_an_encoder_without_a_head_can_be_pruned(
    build: Callable[..., Any], reload_equal: Callable[[Any], Any]
) -> None:
    model = prune(build("bert", head=""), sparsity=0.7)
    assert replacements(model)[0][0] == "encoder.layer.0.attention.self.query"
    reload_equal(model)


def test_half_the_weights_take_less_than_the_file_did(
    tiny_bert: Any, save: Callable[..., Path], build: Callable[..., Any]
) -> None:
    plain = (save(build("bert"), "plain") / "model.safetensors").stat().st_size
    pruned = (save(prune(tiny_bert, sparsity=0.9), "pruned") / "model.safetensors").stat().st_size
    matrices = sum(linear.weight.numel() for linear in linears(build("bert")).values())
    saved = 0.9 * 4 * matrices - matrices / 8
    assert plain - pruned == pytest.approx(saved, abs=250 * len(linears(tiny_bert)))  # longer names


def test_a_mask_holds_in_training(tiny_bert: Any, calibration: Any) -> None:
    options = PruneMagnitudeOptions(sparsity=0.6, gradual=False)
    model = METHOD.apply(tiny_bert, options, calibration)
    masks = {name: m.weight != 0 for name, m in linears(model).items()}
    before = {name: m.weight.detach().clone() for name, m in linears(model).items()}
    train(model, calibration, steps=4)
    model = METHOD.finish(model, options)
    for name, linear in linears(model).items():
        assert torch.equal(linear.weight != 0, masks[name])
        assert not torch.equal(linear.weight, before[name])


def test_the_finished_model_computes_what_the_masked_one_did(
    tiny_bert: Any, calibration: Any, run: Callable[[Any], Tensor]
) -> None:
    options = PruneMagnitudeOptions(sparsity=0.6, gradual=False)
    model = METHOD.apply(tiny_bert, options, calibration)
    train(model, calibration, steps=2)
    masked = run(model)
    assert torch.equal(run(METHOD.finish(model, options)), masked)


def test_the_schedule_is_cubic_between_warmup_and_cooldown() -> None:
    values = [cubic_sparsity(step, 100, 0.8, 0.2, 0.4) for step in (0, 20, 40, 60, 100)]
    assert values == pytest.approx([0, 0, 0.8 * (1 - 0.5**3), 0.8, 0.8])


def test_the_sparsity_rises_by_optimiser_steps(tiny_bert: Any, calibration: Any) -> None:
    options = PruneMagnitudeOptions(sparsity=0.8, steps=10, cooldown=0.5)
    model = METHOD.apply(tiny_bert, options, calibration)
    linear = model.get_submodule(PATH)
    found = []
    optimizer = None
    for _ in range(6):
        optimizer = train(model, calibration, steps=1, micro_batches=2, optimizer=optimizer)
        found.append(zeros(linear.weight))
    size = linear.weight.numel()
    final = round(0.8 * size)
    assert found == [round(final * (1 - (1 - step / 5) ** 3)) for step in range(6)]


def test_a_full_mask_does_not_change_any_more(tiny_bert: Any, calibration: Any) -> None:
    options = PruneMagnitudeOptions(sparsity=0.5, steps=4, cooldown=0.5)
    model = METHOD.apply(tiny_bert, options, calibration)
    optimizer = train(model, calibration, steps=3)
    mask = code_of(model.get_submodule(PATH)).mask.clone()
    assert zeros(mask) == mask.numel() // 2
    train(model, calibration, steps=3, optimizer=optimizer)
    assert torch.equal(code_of(model.get_submodule(PATH)).mask, mask)


def test_training_that_ends_early_is_finished_at_the_full_sparsity(tiny_bert: Any, calibration: Any) -> None:
    options = PruneMagnitudeOptions(sparsity=0.5, steps=100)
    model = METHOD.apply(tiny_bert, options, calibration)
    train(model, calibration, steps=2)
    weight = METHOD.finish(model, options).get_submodule(PATH).weight
    assert zeros(weight) == weight.numel() // 2


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resuming_gives_the_masks_of_an_unbroken_training(
    build: Callable[..., Any], calibration: Any, tmp_path: Path, stop: int
) -> None:
    options = PruneMagnitudeOptions(sparsity=0.7, steps=6, cooldown=0.2)
    whole, broken, resumed = (METHOD.apply(build("bert"), options, None) for _ in range(3))
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, broken, resumed)
    ]  # without a state to restore
    train(whole, calibration, steps=6, optimizer=optimizers[0])
    train(broken, calibration, steps=stop, optimizer=optimizers[1])
    write_model(tmp_path, broken)
    load_weights(resumed, tmp_path / "model.safetensors")
    train(resumed, calibration, steps=6 - stop, optimizer=optimizers[2], first=stop)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_an_interrupted_step_begins_again(tiny_bert: Any, calibration: Any) -> None:
    model = METHOD.apply(tiny_bert, PruneMagnitudeOptions(sparsity=0.7, steps=6), None)
    name = f"{PATH}.parametrizations.weight.0.steps_begun"
    train(model, calibration, steps=2)
    assert model.state_dict()[name] == 2
    model.train()
    calibration.loss(model, calibration.batches[0]).backward()  # one micro-batch of the third step
    assert model.state_dict()[name] == 2


def test_a_layer_that_is_used_twice_counts_a_step_once(tiny_bert: Any, calibration: Any) -> None:
    tiny_bert.bert.encoder.layer[1] = tiny_bert.bert.encoder.layer[0]
    model = METHOD.apply(tiny_bert, PruneMagnitudeOptions(sparsity=0.7, steps=6), None)
    train(model, calibration, steps=2)
    assert code_of(model.bert.encoder.layer[0].output.dense).steps_begun == 2


def test_a_masked_model_is_a_folder_that_goes_on_training(
    tiny_bert: Any, calibration: Any, save: Callable[..., Path]
) -> None:
    options = PruneMagnitudeOptions(sparsity=0.7, gradual=False)
    model = METHOD.apply(tiny_bert, options, None)
    loaded = load(save(model))
    train(loaded, calibration, steps=2)
    train(model, calibration, steps=2)
    loaded, model = METHOD.finish(loaded, options), METHOD.finish(model, options)
    assert torch.equal(loaded.get_submodule(PATH).weight, model.get_submodule(PATH).weight)


def test_of_equal_values_exactly_as_many_are_kept() -> None:
    values = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    assert largest(values, 3).tolist() == [[True, True, True], [False, False, False]]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_the_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValidationError, match="sparsity"):
        PruneMagnitudeOptions(sparsity=sparsity)


def test_pruning_twice_is_refused(tiny_bert: Any) -> None:
    prune(tiny_bert)
    with pytest.raises(UserError, match=r"layer\.0\.attention\.self\.query is pruned already"):
        prune(tiny_bert)


def test_a_quantised_model_is_refused(tiny_bert: Any) -> None:
    tiny_bert.config.fastdistil = {"replacements": [[PATH, {"kind": "int8_linear", "static": False}]]}
    with pytest.raises(UserError, match=r"layer\.1\.output\.dense is quantised already"):
        prune(tiny_bert)


def test_int8_embeddings_are_no_obstacle_to_pruning_the_layers(tiny_bert: Any) -> None:
    path = "bert.embeddings.word_embeddings"
    tiny_bert.config.fastdistil = {"replacements": [[path, {"kind": "int8_embedding"}]]}
    assert len(weights_to_compress(tiny_bert, "x", embeddings=False)) == 13


def test_embeddings_that_are_an_output_matrix_are_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="embeddings of BertForMaskedLM are its output matrix"):
        prune(build("bert", head="MaskedLM"), embeddings=True)


def test_a_model_without_linear_layers_is_refused(tiny_bert: Any) -> None:
    tiny_bert.bert.encoder = tiny_bert.bert.pooler = None
    with pytest.raises(UserError, match="BertForSequenceClassification has no linear layers"):
        prune(tiny_bert)
