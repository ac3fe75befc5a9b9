"""hidden_mse: numbers, gradients, projection, masks, and what a user may do wrong, by each implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistil
from fastdistil import hidden_mse

# D 128: whole vectors. 77: an odd tail. 2050: more than one block.
SHAPES = [(6, 128, 128), (5, 77, 77), (3, 2050, 2056)]


def plain(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The loss as torch's own functions give it, in the dtype of the inputs."""
    if projection is not None:
        student = F.linear(student, projection, bias)
    if normalize:
        student, teacher = (F.normalize(x, dim=-1, eps=1e-8) for x in (student, teacher))
    rows = (student - teacher.to(student.dtype)).square().sum(-1)
    if mask is not None:
        rows = torch.where(mask, rows, 0)
    if reduction == "none":
        return rows
    count = rows.numel() if mask is None else mask.sum()
    return rows.sum() / (count * teacher.shape[-1]) if reduction == "mean" else rows.sum()


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, torch.full_like(loss, 3.0))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.usefixtures("implementation")
def test_value_and_gradient_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    normalize: bool,
    make_logits: Callable[..., Tensor],
    mask: Callable[[int], Tensor],
    assert_as_accurate: Callable[..., None],
) -> None:
    rows, width, pitch = shape
    student = make_logits(rows, width, dtype, pitch=pitch).requires_grad_()
    teacher = make_logits(rows, width, dtype, pitch=pitch, seed=1)
    settings: dict[str, Any] = {"mask": mask(rows), "normalize": normalize}
    ours, theirs = hidden_mse(student, teacher, **settings), plain(student, teacher, **settings)
    wide = student.detach().double().requires_grad_()
    exact = plain(wide, teacher.double(), **settings)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_accurate(ours, theirs, exact)
    grads = [gradients(loss, of)[0] for loss, of in ((ours, student), (theirs, student), (exact, wide))]
    assert grads[0].dtype == dtype
    assert_as_accurate(*grads)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("implementation")
def test_projection_and_its_gradients_are_as_accurate_as_plain_pytorch(
    dtype: torch.dtype,
    biased: bool,
    make_logits: Callable[..., Tensor],
    mask: Callable[[int], Tensor],
    assert_as_accurate: Callable[..., None],
) -> None:
    teacher = make_logits(6, 48, dtype)
    shapes = [(6, 33), (48, 33), (1, 48)][: 3 if biased else 2]
    leaves = [make_logits(*shape, dtype, seed=i + 1).requires_grad_() for i, shape in enumerate(shapes)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def run(function: Callable[..., Tensor], operands: list[Tensor], of: Tensor) -> tuple[Tensor, ...]:
        student, projection, *bias = operands
        loss = function(student, of, projection, bias[0][0] if bias else None, mask(6))
        return loss, *gradients(loss, *operands)

    results = [
        run(hidden_mse, leaves, teacher),
        run(plain, leaves, teacher),
        run(plain, wide, teacher.double()),
    ]
    for ours, theirs, exact in zip(*results, strict=True):
        assert_as_accurate(ours, theirs, exact)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.usefixtures("implementation")
def test_reductions_and_batch_shapes(
    reduction: str,
    masked: bool,
    normalize: bool,
    make_logits: Callable[..., Tensor],
    mask: Callable[[int], Tensor],
) -> None:
    student = make_logits(6, 40, torch.float64).requires_grad_()
    teacher = make_logits(6, 40, torch.float64, seed=1)
    ours = hidden_mse(
        student.view(2, 3, 40),
        teacher.view(2, 3, 40).transpose(0, 1).contiguous().transpose(0, 1),
        mask=mask(6).view(2, 3).long() if masked else None,
        normalize=normalize,
        reduction=reduction,
    )
    expected = plain(
        student, teacher, mask=mask(6) if masked else None, normalize=normalize, reduction=reduction
    )
    if reduction == "none":
        expected = expected.view(2, 3)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.linspace(1, 2, ours.numel(), dtype=torch.float64, device=ours.device).view(ours.shape)
    grads = (torch.autograd.grad(loss, student, upstream)[0] for loss in (ours, expected))
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-14)


@pytest.mark.usefixtures("implementation")
def test_a_zero_vector_stays_zero_when_normalised(make_logits: Callable[..., Tensor]) -> None:
    student, teacher = make_logits(3, 40, torch.float32), make_logits(3, 40, torch.float32, seed=1)
    student[0], teacher[1] = 0, 0
    student.requires_grad_()
    loss = hidden_mse(student, teacher, normalize=True, reduction="none")
    torch.testing.assert_close(loss[:2], torch.ones_like(loss[:2]))
    (grad,) = gradients(loss, student)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.usefixtures("implementation")
def test_masked_rows_are_not_used(
    projected: bool, make_logits: Callable[..., Tensor], mask: Callable[[int], Tensor]
) -> None:
    student, teacher = make_logits(6, 40, torch.float32), make_logits(6, 40, torch.float32, seed=1)
    projection = make_logits(40, 40, torch.float32, seed=2).requires_grad_() if projected else None
    expected = hidden_mse(student, teacher, projection, mask=mask(6))
    student[~mask(6)], teacher[~mask(6)] = torch.nan, torch.inf
    student.requires_grad_()
    loss = hidden_mse(student, teacher, projection, mask=mask(6))
    assert torch.equal(loss, expected)
    leaves = [student] if projection is None else [student, projection]
    grads = gradients(loss, *leaves)
    assert (grads[0][~mask(6)] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.usefixtures("implementation")
def test_no_row_gives_zero_and_a_zero_gradient(
    rows: int, reduction: str, make_logits: Callable[..., Tensor], device: torch.device
) -> None:
    student = make_logits(rows, 40, torch.float32).requires_grad_()
    nothing = torch.zeros(rows, dtype=torch.bool, device=device)
    teacher = make_logits(rows, 40, torch.float32, seed=1)
    loss = hidden_mse(student, teacher, mask=nothing, reduction=reduction)
    (grad,) = gradients(loss, student)
    assert loss.item() == 0
    assert grad.shape == student.shape
    assert (grad == 0).all()


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("implementation")
def test_a_second_backward_gives_the_same_gradient_and_create_graph_is_refused(
    reduction: str, projected: bool, make_logits: Callable[..., Tensor]
) -> None:
    student = make_logits(5, 40, torch.float32).requires_grad_()
    projection = make_logits(40, 40, torch.float32, seed=2) if projected else None
    loss = hidden_mse(student, make_logits(5, 40, torch.float32, seed=1), projection, reduction=reduction)
    upstream = torch.full_like(loss, 3.0)
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(loss, student, upstream, create_graph=True)
    kept = [torch.autograd.grad(loss, student, upstream, retain_graph=True)[0] for _ in range(2)]
    last = torch.autograd.grad(loss, student, upstream)[0]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], last)


@pytest.mark.usefixtures("implementation")
def test_inputs_are_not_written_to_and_bits_repeat(make_logits: Callable[..., Tensor]) -> None:
    student, teacher = make_logits(5, 77, torch.float32), make_logits(5, 77, torch.float32, seed=1)
    before = student.clone(), teacher.clone()
    student.requires_grad_()
    runs = [gradients(hidden_mse(student, teacher, normalize=True), student)[0] for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("implementation")
def test_gradcheck(
    reduction: str, normalize: bool, make_logits: Callable[..., Tensor], mask: Callable[[int], Tensor]
) -> None:
    leaves = [
        make_logits(*shape, torch.float64, seed=i).requires_grad_()
        for i, shape in enumerate([(3, 7), (5, 7)])
    ]
    teacher, rows = make_logits(3, 5, torch.float64, seed=2), mask(3)
    bias = make_logits(1, 5, torch.float64, seed=3)[0].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, p, b: hidden_mse(x, teacher, p, b, rows, normalize=normalize, reduction=reduction),
        (*leaves, bias),
        fast_mode=True,
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.usefixtures("implementation")
def test_opcheck(
    reduce: bool,
    normalize: bool,
    make_logits: Callable[..., Tensor],
    mask: Callable[[int], Tensor],
    device: torch.device,
) -> None:
    student, teacher = make_logits(3, 24, torch.float32), make_logits(3, 24, torch.float32, seed=1)
    scale = torch.tensor(0.5, device=device)
    op = torch.ops.fastdistil.hidden_mse_fwd.default
    torch.library.opcheck(op, (student.requires_grad_(), teacher, mask(3), scale, normalize, reduce, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_projection(dtype: torch.dtype, make_logits: Callable[..., Tensor]) -> None:
    hidden, weight = (make_logits(4, 6, dtype, seed=i).requires_grad_() for i in range(2))
    bias = make_logits(1, 4, dtype, seed=2)[0].requires_grad_()
    torch.library.opcheck(torch.ops.fastdistil.project_hidden.default, (hidden, weight, bias))


@pytest.mark.usefixtures("implementation")
def test_compiled_in_one_graph(make_logits: Callable[..., Tensor], mask: Callable[[int], Tensor]) -> None:
    student = make_logits(4, 40, torch.float32).requires_grad_()
    projection = make_logits(24, 40, torch.float32, seed=2).requires_grad_()
    teacher, rows = make_logits(4, 24, torch.float32, seed=1), mask(4)

    def step(x: Tensor, p: Tensor) -> Tensor:
        return 2 * hidden_mse(x * 1.5, teacher, p, mask=rows, normalize=True)

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        loss = function(student, projection)
        results.append((loss, *gradients(loss, student, projection)))
    torch.testing.assert_close(*results)


def test_under_autocast_the_projection_runs_in_its_dtype(make_logits: Callable[..., Tensor]) -> None:
    student, teacher = (
        make_logits(4, 16, torch.float32).requires_grad_(),
        make_logits(4, 8, torch.float32, seed=1),
    )
    projection = make_logits(8, 16, torch.float32, seed=2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = hidden_mse(student, teacher, projection)
    low = (student.detach().bfloat16().requires_grad_(), teacher, projection.detach().requires_grad_())
    expected = hidden_mse(*low)
    assert torch.equal(loss, expected)
    grads = torch.autograd.grad(loss, (student, projection))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    expected_grads = torch.autograd.grad(expected, (low[0], low[2]))
    assert torch.equal(grads[0], expected_grads[0].float())
    assert torch.equal(grads[1], expected_grads[1])


def test_module_is_the_function(make_logits: Callable[..., Tensor]) -> None:
    student, teacher = make_logits(4, 40, torch.float32), make_logits(4, 40, torch.float32, seed=1)
    module = fastdistil.nn.HiddenMSE(normalize=True, reduction="sum")
    assert torch.equal(
        module(student, teacher), hidden_mse(student, teacher, normalize=True, reduction="sum")
    )


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((X, torch.zeros(2, 9)), {}, r"teacher_hidden must have shape \(2, 8\) .* got \(2, 9\)"),
        (
            (X, torch.zeros(3, 9), torch.zeros(9, 8)),
            {},
            r"teacher_hidden must have shape \(2, 9\) .* got \(3, 9\)",
        ),
        (
            (X, torch.zeros(2, 9), torch.zeros(8, 9)),
            {},
            r"projection must have shape \(9, 8\) .* got \(8, 9\)",
        ),
        ((X, X, torch.zeros(8, 8), torch.zeros(7)), {}, r"bias must have shape \(8,\) .* got \(7,\)"),
        ((X, X, None, torch.zeros(8)), {}, "bias belongs to the projection, and there is none"),
        ((X.int(), X), {}, "student_hidden must be float32.*got torch.int32"),
        ((X, X.to("meta")), {}, "teacher_hidden must be on cpu as the student is, got meta"),
        ((X, X), {"mask": torch.ones(3).bool()}, r"mask must have shape \(2,\) .* got \(3,\)"),
        ((X, X), {"reduction": "summ"}, "reduction .* got 'summ'; did you mean 'sum'"),
        ((torch.zeros(()), X), {}, "student_hidden must have shape"),
    ],
)
def test_a_mistake_is_named(arguments: tuple[Any, ...], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hidden_mse(*arguments, **settings)
