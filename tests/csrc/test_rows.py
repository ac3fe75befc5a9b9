"""What only block-wise C++ kernels can get wrong: maxima that move between blocks, threads, conversions."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastdistil
from fastdistil.ops.kd_loss import kd_loss_ref

pytest.importorskip("fastdistil._C", reason="the C++ extension is not built", exc_type=ImportError)

DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
BLOCK = 256  # kBlock of csrc/cpu/kernels.h
INF = float("inf")


def _both(student: Tensor, teacher: Tensor, divergence: str, temperature: float) -> tuple[tuple, tuple]:
    """(loss, kd, ce, grad) of the C++ kernel in the dtype of the inputs, and of the reference in float64."""
    labels = torch.full((len(student),), student.shape[1] - 1)
    weight = torch.tensor(0.5)
    settings = (temperature, DIVERGENCES[divergence], 0.3, -100, 0.0, False, True)
    ours = torch.ops.fastdistil.kd_loss_fwd(student, teacher, labels, None, weight, weight, *settings)
    weight = weight.double()
    exact = kd_loss_ref(student.double(), teacher.double(), labels, None, weight, weight, *settings)
    return ours, exact


# One temperature for each way to the exponentials at temperature 1: the same, the square, their own.
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_maximum_that_rises_in_every_block(divergence: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # 40 a block: what earlier blocks summed up underflows against the later ones, in float and not in double.
    slope = 40.0 * torch.arange(6 * BLOCK + 3).div(BLOCK, rounding_mode="floor")
    student, teacher = torch.randn(2, 2, len(slope), generator=generator) + slope
    ours, exact = _both(student, teacher, divergence, temperature)
    for name, value, reference in zip(("loss", "kd", "ce", "grad"), ours, exact, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_leading_blocks_without_a_finite_logit(divergence: str) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = 3 * torch.randn(2, 2, 4 * BLOCK, generator=generator) - 500
    student[:, : 2 * BLOCK + 1] = teacher[:, : 2 * BLOCK + 1] = -INF
    ours, exact = _both(student, teacher, divergence, 2.0)
    for name, value, reference in zip(("loss", "kd", "ce", "grad"), ours, exact, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2e-5, atol=1e-6, msg=name)
    assert (ours[3][:, : 2 * BLOCK + 1] == 0).all()


def test_exponentials_are_within_two_units_in_the_last_place() -> None:
    # Logits 0 and -x: the gradient of the cross-entropy at the second one is exp(-x) / (1 + exp(-x)).
    x = torch.linspace(0.01, 85, 20011)
    student = torch.stack([torch.zeros_like(x), -x], dim=1)
    nothing = torch.zeros(len(x), dtype=torch.bool)
    one = torch.ones(())
    labels = torch.zeros(len(x), dtype=torch.int64)
    settings = (1.0, 0, 0.5, -100, 0.0, True, True)
    *_, grad = torch.ops.fastdistil.kd_loss_fwd(student, student, labels, nothing, one, one, *settings)
    exact = torch.sigmoid(-x.double())
    # 2 units of the exponential, and half a unit for each of the two products after it.
    assert ((grad[:, 1].double() - exact).abs() / exact).max() <= 3 * 2**-23


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 37, 3001, generator=generator)
    labels = torch.randint(0, 3001, (37,), generator=generator)
    labels[5:25] = -100  # rows that cost nothing, so that threads take unequal numbers of rows
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaf = student.clone().requires_grad_()
        loss = fastdistil.kd_loss(leaf, teacher, labels, ce_weight=1.0)
        loss.backward()
        results.append((loss, leaf.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_float16_conversion_of_every_value() -> None:
    values = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.float16).unsqueeze(0)
    scaled = values.clone()
    torch.ops.fastdistil.scale_grad_(scaled, torch.tensor(0.75))
    expected = (values.float() * 0.75).half()
    assert torch.equal(scaled.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))
    assert torch.equal(scaled.isnan(), expected.isnan())


def test_bfloat16_conversion_of_every_value() -> None:
    values = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16).unsqueeze(0)
    scaled = values.clone()
    torch.ops.fastdistil.scale_grad_(scaled, torch.tensor(0.75))
    expected = (values.float() * 0.75).bfloat16()
    assert torch.equal(scaled.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))
    assert torch.equal(scaled.isnan(), expected.isnan())


def test_a_label_outside_the_vocabulary_is_refused_before_it_is_used() -> None:
    student = torch.zeros(2, 5)
    one = torch.ones(())
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 5\), got 5 in row 1"):
        torch.ops.fastdistil.kd_loss_fwd(
            student, student, torch.tensor([0, 5]), None, one, one, 2.0, 0, 0.5, -100, 0.0, True, True
        )
