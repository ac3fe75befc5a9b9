from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fastdistil.compress.encoded import code_of, parameter_of
from fastdistil.compress.prune_movement import METHODS, PruneMovementOptions
from fastdistil.compress.replacements import replacements
from fastdistil.compress.store import load
from fastdistil.errors import UserError
from fastdistil.train.checkpoint import load_weights, write_model

(METHOD,) = METHODS
PATH = "bert.encoder.layer.1.output.dense"


def train(model: Any, calibration: Any, steps: int, optimizer: Any = None, first: int = 0) -> Any:
    model.train()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(first, first + steps):
        torch.manual_seed(step)  # of the dropout
        calibration.loss(model, calibration.batches[step % 3]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return optimizer


def test_score_and_weight_have_the_gradients_of_the_paper(tiny_bert: Any) -> None:
    model = METHOD.apply(tiny_bert, PruneMovementOptions(sparsity=0.5, steps=1, warmup=0, cooldown=0.9), None)
    linear = model.get_submodule(PATH).train()
    weight, mask = parameter_of(linear), code_of(linear)
    linear(torch.zeros(1, 48))  # the first step's mask
    mask.mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    x, upstream = torch.randn(5, 48), torch.randn(5, 32)
    linear(x).backward(upstream)
    through = upstream.T @ x  # ∂L/∂W'
    torch.testing.assert_close(weight.grad, through * mask.mask)
    torch.testing.assert_close(mask.scores.grad.view_as(weight), through * weight.detach())


def test_one_step_keeps_the_weights_that_move_away_from_zero(tiny_bert: Any, calibration: Any) -> None:
    options = PruneMovementOptions(sparsity=0.6, start="zero", steps=1, warmup=0, cooldown=0.5)
    model = METHOD.apply(tiny_bert, options, None)
    before = parameter_of(model.get_submodule(PATH)).detach().clone()
    train(model, calibration, 1, torch.optim.SGD(model.parameters(), lr=1e-3))
    movement = (parameter_of(model.get_submodule(PATH)).detach() - before) * before
    after = METHOD.finish(model, options).get_submodule(PATH).weight
    kept = after != 0
    assert int(kept.sum()) == round(0.4 * kept.numel())
    scale = movement.abs().max()
    assert movement[kept].min() > movement[~kept].max() - 1e-3 * scale  # the weights are float32, scores too


def test_from_their_magnitudes_the_smallest_weights_go_first(tiny_bert: Any, calibration: Any) -> None:
    options = PruneMovementOptions(sparsity=0.6, steps=10, warmup=0, cooldown=0.9)
    model = METHOD.apply(tiny_bert, options, None)
    before = parameter_of(model.get_submodule(PATH)).detach().abs().clone()
    # Two steps: no mask after none, all of it after one, by scores that have moved by next to nothing.
    train(model, calibration, 2, torch.optim.SGD(model.parameters(), lr=1e-9))
    kept = model.get_submodule(PATH).weight != 0
    assert int(kept.sum()) == round(0.4 * kept.numel())
    assert before[kept].min() >= before[~kept].max()


def test_a_score_from_a_magnitude_moves_as_one_from_zero(build: Callable[..., Any], calibration: Any) -> None:
    moved = []
    for start in ("zero", "magnitude"):
        model = METHOD.apply(
            build("bert"), PruneMovementOptions(start=start, steps=99, warmup=0.9, cooldown=0), None
        )
        scores = code_of(model.get_submodule(PATH)).scores
        before = scores.detach().clone()
        train(model, calibration, 3, torch.optim.SGD(model.parameters(), lr=0.1))
        moved.append(scores.detach() - before)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-7)
    assert moved[0].abs().max() > 1e-4


def test_the_sparsity_is_that_of_the_schedule(tiny_bert: Any, calibration: Any) -> None:
    model = METHOD.apply(
        tiny_bert, PruneMovementOptions(sparsity=0.8, steps=10, warmup=0.2, cooldown=0.4), None
    )
    linear = model.get_submodule(PATH)
    found, optimizer = [], None
    for _ in range(8):
        optimizer = train(model, calibration, 1, optimizer)
        found.append(int((linear.weight == 0).sum()))
    rise = [min(1.0, max(0.0, (step - 2) / 4)) for step in range(8)]
    final = round(0.8 * linear.weight.numel())
    assert found == [round(final * (1 - (1 - r) ** 3)) for r in rise]


def test_from_zero_a_factor_on_the_scores_rate_changes_no_mask(
    build: Callable[..., Any], calibration: Any
) -> None:
    masks = []
    for factor in (1, 256):  # a power of two, so that rounding is the same
        model = METHOD.apply(build("bert"), PruneMovementOptions(start="zero", steps=6), None)
        scores = [p for name, p in model.named_parameters() if name.endswith("scores")]
        others = [p for name, p in model.named_parameters() if not name.endswith("scores")]
        groups = [{"params": others}, {"params": scores, "lr": 1e-2 * factor, "weight_decay": 0.0}]
        train(model, calibration, 6, torch.optim.AdamW(groups, lr=1e-2))
        masks.append(code_of(model.get_submodule(PATH)).mask)
    assert torch.equal(masks[0], masks[1])


def test_scores_have_one_dimension_which_weight_decay_leaves_out(tiny_bert: Any) -> None:
    model = METHOD.apply(tiny_bert, PruneMovementOptions(steps=1), None)
    assert {p.ndim for name, p in model.named_parameters() if name.endswith("scores")} == {1}


def test_reloads_bit_equal_without_scores(
    tiny_bert: Any, calibration: Any, reload_equal: Callable[[Any], Any]
) -> None:
    options = PruneMovementOptions(sparsity=0.7, steps=4, embeddings=True)
    model = METHOD.apply(tiny_bert, options, None)
    train(model, calibration, 4)
    loaded = reload_equal(METHOD.finish(model, options))
    assert {spec["kind"] for _, spec in replacements(loaded)} == {"sparse"}
    assert not [name for name in loaded.state_dict() if "scores" in name]


def test_a_trained_folder_can_be_finished_later(
    tiny_bert: Any, calibration: Any, save: Callable[..., Path], run: Callable[[Any], Tensor]
) -> None:
    options = PruneMovementOptions(sparsity=0.7, steps=1)
    model = METHOD.apply(tiny_bert, options, None)
    train(model, calibration, 1)
    loaded = load(save(model))
    assert torch.equal(run(METHOD.finish(loaded, options)), run(METHOD.finish(model, options)))


@pytest.mark.parametrize("stop", [1, 4])
def test_resuming_gives_the_masks_of_an_unbroken_training(
    build: Callable[..., Any], calibration: Any, tmp_path: Path, stop: int
) -> None:
    whole, broken, resumed = (
        METHOD.apply(build("bert"), PruneMovementOptions(steps=6), None) for _ in range(3)
    )
    for model, first, steps in ((whole, 0, 6), (broken, 0, stop), (resumed, stop, 6 - stop)):
        if model is resumed:
            write_model(tmp_path, broken)
            load_weights(resumed, tmp_path / "model.safetensors")
        train(model, calibration, steps, torch.optim.SGD(model.parameters(), lr=0.1), first)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_without_recovery_steps_it_is_refused(tiny_bert: Any) -> None:
    with pytest.raises(UserError, match="give it recovery steps"):
        METHOD.apply(tiny_bert, PruneMovementOptions(), None)


def test_finishing_what_was_not_trained_is_refused(tiny_bert: Any) -> None:
    options = PruneMovementOptions(start="zero", steps=3)
    model = METHOD.apply(tiny_bert, options, None)
    with pytest.raises(UserError, match="the model was not trained"):
        METHOD.finish(model, options)


def test_a_forward_pass_alone_is_no_training(tiny_bert: Any, run: Callable[[Any], Tensor]) -> None:
    options = PruneMovementOptions(start="zero", steps=3)
    model = METHOD.apply(tiny_bert, options, None)
    run(model.train())
    with pytest.raises(UserError, match="the model was not trained"):
        METHOD.finish(model, options)


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"warmup": 0.6, "cooldown": 0.4}, {"steps": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        PruneMovementOptions(**options)


def test_pruning_what_is_masked_is_refused(tiny_bert: Any) -> None:
    METHOD.apply(tiny_bert, PruneMovementOptions(steps=1), None)
    with pytest.raises(UserError, match="is pruned already"):
        METHOD.apply(tiny_bert, PruneMovementOptions(steps=1), None)
