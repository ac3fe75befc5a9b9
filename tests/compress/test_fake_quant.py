"""Fake quantisation: its values, its gradients, and what it becomes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistil.compress.fake_quant import (
    FakeInt8Embedding,
    FakeInt8Linear,
    add_fake_quantisation,
    fake_quantize_blocks,
    fake_quantize_rows,
    fake_quantize_tensor,
    remove_fake_quantisation,
)
from fastdistil.compress.int8_modules import Int8Embedding, Int8Linear
from fastdistil.compress.method import Calibration
from fastdistil.compress.quantize import Int8QatOptions, apply_qat, finish_qat, layers_to_quantize
from fastdistil.compress.replacements import replacements
from fastdistil.compress.store import load

Run = Callable[[Any], Tensor]


def _values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rows_are_rounded_to_254ths_of_their_range() -> None:
    x = torch.tensor([[127.0, -0.6, 0.4], [1.27, 0.006, -0.014]])
    expected = torch.tensor([[127.0, -1.0, 0.0], [1.27, 0.01, -0.01]])
    torch.testing.assert_close(fake_quantize_rows(x), expected)


def test_a_tensor_is_rounded_to_255ths_of_its_range_with_zero() -> None:
    x = torch.tensor([[-2.0, 253.0], [0.6, 0.4]])
    torch.testing.assert_close(fake_quantize_tensor(x), torch.tensor([[-2.0, 253.0], [1.0, 0.0]]))
    # Zero is in the range, whatever the values are.
    torch.testing.assert_close(
        fake_quantize_tensor(torch.tensor([255.0, 254.6])), torch.tensor([255.0, 255.0])
    )


def test_a_block_is_rounded_to_sixteen_levels() -> None:
    """-8 is the end that reaches further from zero; a row of 40 has a block of 32 and one of 8."""
    x = torch.zeros(40)
    x[:4] = torch.tensor([-4.0, 3.4, 0.3, 0.2])
    x[32:35] = torch.tensor([16.0, -13.1, 2.9])
    expected = torch.zeros(40)
    expected[:4] = torch.tensor([-4.0, 3.5, 0.5, 0.0])
    expected[32:35] = torch.tensor([16.0, -14.0, 2.0])
    assert torch.equal(fake_quantize_blocks(x), expected)
    assert torch.equal(fake_quantize_blocks(-x), -expected)


def test_a_part_is_rounded_by_the_range_of_the_whole() -> None:
    table = _values(20, 6)
    assert torch.equal(fake_quantize_tensor(table[3:5], table), fake_quantize_tensor(table)[3:5])


@pytest.mark.parametrize("fake", [fake_quantize_rows, fake_quantize_tensor, fake_quantize_blocks])
def test_zeros_stay_zeros(fake: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(fake(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("fake", [fake_quantize_rows, fake_quantize_tensor, fake_quantize_blocks])
def test_gradient_passes_the_rounding(fake: Callable[[Tensor], Tensor]) -> None:
    x, upstream = _values(4, 7).requires_grad_(), _values(4, 7) + 2
    (fake(x) * upstream).sum().backward()
    assert torch.equal(x.grad, upstream)


def test_linear_gradients_are_those_of_the_rounded_product() -> None:
    linear, x = nn.Linear(7, 5), _values(3, 7).requires_grad_()
    upstream = _values(3, 5) + 2
    (FakeInt8Linear(linear, "row")(x) * upstream).sum().backward()
    weight = fake_quantize_rows(linear.weight).detach()
    torch.testing.assert_close(x.grad, upstream @ weight)
    torch.testing.assert_close(linear.weight.grad, upstream.t() @ fake_quantize_rows(x.detach()))
    torch.testing.assert_close(linear.bias.grad, upstream.sum(0))


def test_linear_computes_what_int8_will() -> None:
    linear, x = nn.Linear(33, 9), _values(2, 5, 33)
    fake, real = FakeInt8Linear(linear, "row"), Int8Linear.from_linear(linear)
    torch.testing.assert_close(fake(x), real(x), rtol=1e-5, atol=1e-6)


def test_embedding_computes_what_int8_will() -> None:
    embedding, ids = nn.Embedding(30, 8), torch.arange(30).view(5, 6)
    assert torch.equal(FakeInt8Embedding(embedding, "row")(ids), Int8Embedding.from_embedding(embedding)(ids))


def test_fake_layers_train_the_models_own_parameters(tiny_bert: Any) -> None:
    before = {name: id(parameter) for name, parameter in tiny_bert.named_parameters()}
    model = add_fake_quantisation(tiny_bert, layers_to_quantize(tiny_bert, embeddings=True), "row")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_removing_gives_the_float_model_back(tiny_bert: Any, run: Run) -> None:
    expected, paths = run(tiny_bert), layers_to_quantize(tiny_bert, embeddings=True)
    add_fake_quantisation(tiny_bert, paths, "row")
    assert not torch.equal(run(tiny_bert), expected)
    assert remove_fake_quantisation(tiny_bert) == paths
    assert torch.equal(run(tiny_bert), expected)
    assert replacements(tiny_bert) == []


def test_a_model_in_training_reloads_to_the_last_bit(tiny_bert: Any, reload_equal: Any) -> None:
    loaded = reload_equal(apply_qat(tiny_bert, Int8QatOptions(), None))
    assert isinstance(loaded.bert.pooler.dense, FakeInt8Linear)


@pytest.mark.parametrize(
    ("backend", "bits"),
    [
        ("torchao", 8),
        pytest.param("onnxruntime", 8, marks=pytest.mark.slow),
        pytest.param("onnxruntime", 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_int8_model_computes_what_was_learnt(
    backend: Any,
    bits: Any,
    family: str,
    build: Any,
    save: Callable[..., Path],
    run: Run,
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        # Else the last layer's scales are those of the tokens that are read, and finer than what was learnt.
        monkeypatch.setattr("fastdistil.export.rewrite.select_early", lambda graph: None)
    options, model = Int8QatOptions(backend=backend, embedding_bits=bits), load(save(build(family)))
    untrained = run(model)
    model = apply_qat(model, options, calibration)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in calibration.batches:
        optimizer.zero_grad()
        calibration.loss(model, batch).backward()
        optimizer.step()
    learnt = run(model)
    assert (learnt - untrained).abs().max() > 0.01
    # An activation on the edge between two levels may fall to either side: one level is 1e-3 of the outputs.
    torch.testing.assert_close(run(finish_qat(model, options)), learnt, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_int8_model_is_compared_with_what_was_learnt(
    build: Any, save: Callable[..., Path], run: Run
) -> None:
    """One channel, which the pooler ignores, is so large that all others round to zero. The float model
    answers something else."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    built = build("bert")
    with torch.no_grad():
        built.bert.encoder.layer[-1].output.LayerNorm.bias[3] = 3000
        pooler = built.bert.pooler.dense
        pooler.bias.copy_(_values(len(pooler.bias)))
        pooler.weight.mul_(100)
        pooler.weight[:, 3] = 0
    options, model = Int8QatOptions(), load(save(built))
    exact = run(model)
    model = apply_qat(model, options, None)
    learnt = run(model)
    assert torch.nn.functional.cosine_similarity(learnt.flatten(), exact.flatten(), 0) < 0.5
    torch.testing.assert_close(run(finish_qat(model, options)), learnt, rtol=0, atol=1e-3)


def test_training_lowers_the_loss_under_rounding(tiny_bert: Any, calibration: Calibration) -> None:
    model = apply_qat(tiny_bert, Int8QatOptions(backend="torchao"), calibration)
    batch = calibration.batches[0]
    before = calibration.loss(model, batch).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        calibration.loss(model, batch).backward()
        optimizer.step()
    real = finish_qat(model.eval(), Int8QatOptions(backend="torchao"))
    assert calibration.loss(real, batch).item() < 0.8 * before
