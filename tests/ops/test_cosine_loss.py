"""cosine_loss: numbers, gradients, masks, and what a user may do wrong, for each implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistil
from fastdistil import cosine_loss

# D 128: whole vectors. 77: an odd tail. 2050: more than one block.
SHAPES = [(6, 128, 128), (5, 77, 77), (3, 2050, 2056)]


def plain(student: Tensor, teacher: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """The loss as torch's own functions give it, in the dtype of the inputs."""
    rows = 1 - F.cosine_similarity(student, teacher, dim=-1)
    if mask is not None:
        rows = rows * mask
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (len(rows) if mask is None else mask.sum())


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, torch.full_like(loss, 3.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.usefixtures("implementation")
def test_value_and_gradient_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    make_logits: Callable[..., Tensor],
    mask: Callable[[int], Tensor],
    assert_as_accurate: Callable[..., None],
) -> None:
    rows, width, pitch = shape
    student = make_logits(rows, width, dtype, pitch=pitch).requires_grad_()
    teacher = make_logits(rows, width, dtype, pitch=pitch, seed=1)
    ours, theirs = cosine_loss(student, teacher, mask(rows)), plain(student, teacher, mask(rows))
    wide = student.detach().double().requires_grad_()
    exact = plain(wide, teacher.double(), mask(rows))
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_accurate(ours, theirs, exact)
    grads = [gradients(loss, of)[0] for loss, of in ((ours, student), (theirs, student), (exact, wide))]
    assert grads[0].dtype == dtype
    assert_as_accurate(*grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.usefixtures("implementation")
def test_reductions_and_batch_shapes(
    reduction: str, masked: bool, make_logits: Callable[..., Tensor], mask: Callable[[int], Tensor]
) -> None:
    student = make_logits(6, 40, torch.float64).requires_grad_()
    teacher = make_logits(6, 40, torch.float64, seed=1)
    ours = cosine_loss(
        student.view(2, 3, 40),
        teacher.view(2, 3, 40).transpose(0, 1).contiguous().transpose(0, 1),
        mask(6).view(2, 3).long() if masked else None,
        reduction=reduction,
    )
    expected = plain(student, teacher, mask(6) if masked else None, reduction)
    if reduction == "none":
        expected = expected.view(2, 3)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.linspace(1, 2, ours.numel(), dtype=torch.float64, device=ours.device).view(ours.shape)
    grads = (torch.autograd.grad(loss, student, upstream)[0] for loss in (ours, expected))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("implementation")
def test_a_zero_vector_has_cosine_zero_and_a_finite_gradient(make_logits: Callable[..., Tensor]) -> None:
    student, teacher = make_logits(3, 40, torch.float32), make_logits(3, 40, torch.float32, seed=1)
    student[0], teacher[1] = 0, 0
    student.requires_grad_()
    loss = cosine_loss(student, teacher, reduction="none")
    assert loss[:2].tolist() == [1, 1]
    (grad,) = gradients(loss, student)
    assert torch.isfinite(grad).all()
    assert (grad[1] == 0).all()


@pytest.mark.usefixtures("implementation")
def test_masked_rows_are_not_used(make_logits: Callable[..., Tensor], mask: Callable[[int], Tensor]) -> None:
    student, teacher = make_logits(6, 40, torch.float32), make_logits(6, 40, torch.float32, seed=1)
    expected = cosine_loss(student, teacher, mask(6))
    student[~mask(6)], teacher[~mask(6)] = torch.nan, torch.inf
    student.requires_grad_()
    loss = cosine_loss(student, teacher, mask(6))
    assert torch.equal(loss, expected)
    (grad,) = gradients(loss, student)
    assert (grad[~mask(6)] == 0).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.usefixtures("implementation")
def test_no_row_gives_zero_and_a_zero_gradient(
    rows: int, reduction: str, make_logits: Callable[..., Tensor], device: torch.device
) -> None:
    student = make_logits(rows, 40, torch.float32).requires_grad_()
    nothing = torch.zeros(rows, dtype=torch.bool, device=device)
    loss = cosine_loss(student, make_logits(rows, 40, torch.float32, seed=1), nothing, reduction=reduction)
    (grad,) = gradients(loss, student)
    assert loss.item() == 0
    assert grad.shape == student.shape
    assert (grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("implementation")
def test_a_second_backward_gives_the_same_gradient(
    reduction: str, make_logits: Callable[..., Tensor]
) -> None:
    student = make_logits(5, 40, torch.float32).requires_grad_()
    loss = cosine_loss(student, make_logits(5, 40, torch.float32, seed=1), reduction=reduction)
    upstream = torch.full_like(loss, 3.0)
    kept = [torch.autograd.grad(loss, student, upstream, retain_graph=True)[0] for _ in range(2)]
    last = torch.autograd.grad(loss, student, upstream)[0]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], last)


@pytest.mark.usefixtures("implementation")
def test_create_graph_is_refused(make_logits: Callable[..., Tensor]) -> None:
    student = make_logits(3, 40, torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(
            cosine_loss(student, make_logits(3, 40, torch.float32, seed=1)), student, create_graph=True
        )


@pytest.mark.usefixtures("implementation")
def test_inputs_are_not_written_to_and_bits_repeat(make_logits: Callable[..., Tensor]) -> None:
    student, teacher = make_logits(5, 77, torch.float32), make_logits(5, 77, torch.float32, seed=1)
    before = student.clone(), teacher.clone()
    student.requires_grad_()
    runs = [gradients(cosine_loss(student, teacher), student)[0] for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("implementation")
def test_gradcheck(reduction: str, make_logits: Callable[..., Tensor], mask: Callable[[int], Tensor]) -> None:
    student = make_logits(3, 7, torch.float64).requires_grad_()
    teacher, rows = make_logits(3, 7, torch.float64, seed=1), mask(3)
    assert torch.autograd.gradcheck(
        lambda x: cosine_loss(x, teacher, rows, reduction=reduction), student, fast_mode=True
    )


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.usefixtures("implementation")
def test_opcheck(
    reduce: bool, make_logits: Callable[..., Tensor], mask: Callable[[int], Tensor], device: torch.device
) -> None:
    student = make_logits(3, 24, torch.float32).requires_grad_()
    arguments = (
        student,
        make_logits(3, 24, torch.float32, seed=1),
        mask(3),
        torch.tensor(0.5, device=device),
    )
    torch.library.opcheck(torch.ops.fastdistil.cosine_loss_fwd.default, (*arguments, reduce, True))


@pytest.mark.usefixtures("implementation")
def test_compiled_in_one_graph(make_logits: Callable[..., Tensor], mask: Callable[[int], Tensor]) -> None:
    student = make_logits(4, 40, torch.float32).requires_grad_()
    teacher, rows = make_logits(4, 40, torch.float32, seed=1), mask(4)

    def step(x: Tensor) -> Tensor:
        return 2 * cosine_loss(x * 1.5, teacher, rows)

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        loss = function(student)
        results.append((loss, *gradients(loss, student)))
    torch.testing.assert_close(*results)


def test_module_is_the_function(make_logits: Callable[..., Tensor]) -> None:
    student, teacher = make_logits(4, 40, torch.float32), make_logits(4, 40, torch.float32, seed=1)
    module = fastdistil.CosineLoss(reduction="sum")
    assert torch.equal(module(student, teacher), cosine_loss(student, teacher, reduction="sum"))


GOOD = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((GOOD, torch.zeros(2, 9)), {}, r"teacher_hidden must have shape \(2, 8\) .* got \(2, 9\)"),
        ((GOOD.int(), GOOD), {}, "student_hidden must be float32.*got torch.int32"),
        ((GOOD, GOOD.to("meta")), {}, "teacher_hidden must be on cpu as the student is, got meta"),
        ((GOOD, GOOD, torch.ones(3).bool()), {}, r"mask must have shape \(2,\) .* got \(3,\)"),
        ((GOOD, GOOD), {"reduction": "summ"}, "reduction .* got 'summ'; did you mean 'sum'"),
        ((torch.zeros(()), torch.zeros(())), {}, "student_hidden must have shape"),
    ],
)
def test_a_mistake_is_named(arguments: tuple[Tensor, ...], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_loss(*arguments, **settings)
