"""kd_loss: numbers, gradients, masks, and what a user may do wrong, for each implementation."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdistil
from fastdistil import kd_loss

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# V 96: whole vectors. 259: an odd tail, rows that start unaligned. Pitch 264: a padded row, an odd tail.
SHAPES = {"aligned": (6, 96, 96), "odd": (3, 259, 259), "padded": (3, 259, 264)}
LABELS = [3, -100, 0, 95, -100, 17]
UPSTREAM = 3.0


def gradients(loss: Tensor, *inputs: Tensor, upstream: float = UPSTREAM) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))


@pytest.fixture
def labels(device: torch.device) -> Callable[[int], Tensor]:
    return lambda rows: torch.tensor(LABELS[:rows], device=device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.usefixtures("implementation")
def test_value_and_gradient_are_as_accurate_as_plain_pytorch(
    shape: str,
    divergence: str,
    dtype: torch.dtype,
    make_logits: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
    plain: SimpleNamespace,
    assert_as_accurate: Callable[..., None],
) -> None:
    rows, vocabulary, pitch = SHAPES[shape]
    student = make_logits(rows, vocabulary, dtype, pitch=pitch).requires_grad_()
    teacher = make_logits(rows, vocabulary, dtype, pitch=pitch, seed=1)
    settings: dict[str, Any] = {"divergence": divergence, "jsd_beta": 0.3, "label_smoothing": 0.1}
    settings |= {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 1.3}

    ours = kd_loss(student, teacher, labels(rows), **settings)
    (grad,) = gradients(ours, student)
    theirs = plain.loss(student, teacher, labels(rows), **settings)
    (their_grad,) = gradients(theirs, student)
    wide = student.detach().double().requires_grad_()
    exact = plain.loss(wide, teacher.double(), labels(rows), **settings)
    (exact_grad,) = gradients(exact, wide)

    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_as_accurate(ours, theirs, exact)
    assert_as_accurate(grad, their_grad, exact_grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.usefixtures("implementation")
def test_the_vocabulary_of_bert(
    divergence: str,
    make_logits: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
    plain: SimpleNamespace,
    assert_as_accurate: Callable[..., None],
) -> None:
    # 30522 = 2 * 3 * 5087: many blocks and a tail that no vector length divides.
    student = make_logits(2, 30522, torch.float32).requires_grad_()
    teacher = make_logits(2, 30522, torch.float32, seed=1)
    settings: dict[str, Any] = {"divergence": divergence, "ce_weight": 0.5}
    ours = kd_loss(student, teacher, labels(2), **settings)
    theirs = plain.loss(student, teacher, labels(2), **settings)
    wide = student.detach().double().requires_grad_()
    exact = plain.loss(wide, teacher.double(), labels(2), **settings)
    assert_as_accurate(ours, theirs, exact)
    grads = (gradients(loss, of)[0] for loss, of in ((ours, student), (theirs, student), (exact, wide)))
    assert_as_accurate(*grads)


@pytest.mark.parametrize("distance", [0.1, 0.5])
@pytest.mark.usefixtures("implementation")
def test_the_divergence_of_a_student_near_its_teacher_is_not_lost_in_logarithms(
    distance: float,
    make_logits: Callable[..., Tensor],
    plain: SimpleNamespace,
    assert_as_accurate: Callable[..., None],
) -> None:
    teacher = make_logits(2, 30522, torch.float32)
    student = teacher + distance / 3 * make_logits(2, 30522, torch.float32, seed=1)
    losses = [f(student, teacher, divergence="jsd") for f in (kd_loss, plain.loss)]
    assert_as_accurate(*losses, plain.loss(student.double(), teacher.double(), divergence="jsd"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.usefixtures("implementation")
def test_a_nan_is_not_lost(divergence: str, make_logits: Callable[..., Tensor]) -> None:
    student = make_logits(2, 96, torch.float32)
    student.view(torch.int32)[0, 7] = -1  # a NaN with all bits set, of which a shift could make a number
    student.requires_grad_()
    loss = kd_loss(
        student, make_logits(2, 96, torch.float32, seed=1), divergence=divergence, reduction="none"
    )
    assert loss.isnan().tolist() == [True, False]
    assert gradients(loss, student)[0][0].isnan().any()


@pytest.mark.usefixtures("implementation")
def test_strides_of_no_rows_do_not_matter(device: torch.device) -> None:
    nothing = torch.randn(4, 16, device=device)[:, ::2][:0]
    assert kd_loss(nothing, nothing.clone()) == 0
    assert fastdistil.cosine_loss(nothing, nothing.clone()) == 0
    assert fastdistil.hidden_mse(nothing, nothing.clone()) == 0
    heads = torch.randn(0, 2, 3, 16, device=device)[..., ::2]
    assert fastdistil.attention_kl(heads, heads, heads, heads) == 0
    assert fastdistil.attention_mse(heads, heads, heads, heads) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
@pytest.mark.usefixtures("implementation")
def test_temperatures(
    temperature: float,
    make_logits: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
    plain: SimpleNamespace,
) -> None:
    student = make_logits(4, 130, torch.float32).requires_grad_()
    teacher = make_logits(4, 130, torch.float32, seed=1)
    ours = kd_loss(student, teacher, labels(4), temperature=temperature, ce_weight=1.0)
    wide = student.detach().double().requires_grad_()
    exact = plain.loss(wide, teacher.double(), labels(4), temperature=temperature, ce_weight=1.0)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=0)
    (grad,), (exact_grad,) = gradients(ours, student), gradients(exact, wide)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.usefixtures("implementation")
def test_reductions_and_terms(
    reduction: str,
    with_mask: bool,
    make_logits: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
    plain: SimpleNamespace,
    device: torch.device,
) -> None:
    student = make_logits(6, 96, torch.float64).requires_grad_()
    teacher = make_logits(6, 96, torch.float64, seed=1)
    # Rows with both terms, with one of them, and with neither.
    mask = torch.tensor([True, True, False, False, False, True], device=device) if with_mask else None
    upstream = torch.arange(1.0, 7.0, device=device, dtype=torch.float64) if reduction == "none" else None
    results = []
    for function in (kd_loss, plain.loss):
        loss = function(
            student, teacher, labels(6), kd_weight=0.7, ce_weight=1.3, kd_mask=mask, reduction=reduction
        )
        results.append((loss, torch.autograd.grad(loss, student, upstream)[0]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)

    loss, kd, ce = kd_loss(
        student,
        teacher,
        labels(6),
        kd_weight=0.7,
        ce_weight=1.3,
        kd_mask=mask,
        reduction=reduction,
        return_terms=True,
    )
    torch.testing.assert_close(loss, 0.7 * kd + 1.3 * ce, rtol=1e-12, atol=1e-14)
    assert loss.requires_grad
    assert not kd.requires_grad
    assert not ce.requires_grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("implementation")
def test_a_vocabulary_padded_with_minus_infinity_is_the_one_without_padding(
    divergence: str, dtype: torch.dtype, make_logits: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    student, teacher = make_logits(4, 112, dtype), make_logits(4, 112, dtype, seed=1)
    padded = [x.clone() for x in (student, teacher)]
    for x in padded:
        x[:, 100:] = -torch.inf
    padded[0].requires_grad_()
    short = student[:, :100].clone().requires_grad_()
    settings: dict[str, Any] = {"divergence": divergence, "ce_weight": 0.5}
    ours = kd_loss(padded[0], padded[1], labels(3).repeat(2)[:4], **settings)
    expected = kd_loss(short, teacher[:, :100], labels(3).repeat(2)[:4], **settings)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    (grad,), (expected_grad,) = gradients(ours, padded[0]), gradients(expected, short)
    torch.testing.assert_close(grad[:, :100], expected_grad)
    assert (grad[:, 100:] == 0).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.usefixtures("implementation")
def test_probabilities_that_underflow_on_both_sides(
    divergence: str, make_logits: Callable[..., Tensor], plain: SimpleNamespace
) -> None:
    # exp(-300) is 0 in float32 on both sides; in float64 it is not, so the reference needs no special case.
    student, teacher = make_logits(4, 96, torch.float32), make_logits(4, 96, torch.float32, seed=1)
    student[:, 40:] -= 300
    teacher[:, 40:] -= 300
    student.requires_grad_()
    ours = kd_loss(student, teacher, divergence=divergence, temperature=1.0)
    wide = student.detach().double().requires_grad_()
    exact = plain.loss(wide, teacher.double(), divergence=divergence, temperature=1.0)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    (grad,), (exact_grad,) = gradients(ours, student), gradients(exact, wide)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("implementation")
def test_disjoint_teacher_and_student_have_the_largest_jsd(device: torch.device) -> None:
    logits = torch.full((2, 96), -200.0, device=device)
    student, teacher = logits.clone(), logits.clone()
    student[:, 0] = teacher[:, 1] = 200.0
    student.requires_grad_()
    loss = kd_loss(student, teacher, divergence="jsd", temperature=1.0)
    torch.testing.assert_close(loss, torch.tensor(2.0, device=device).log(), rtol=1e-6, atol=0)
    assert torch.isfinite(gradients(loss, student)[0]).all()


@pytest.mark.usefixtures("implementation")
def test_rows_that_no_term_uses_are_not_read(
    make_logits: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    student, teacher = make_logits(6, 96, torch.float32), make_logits(6, 96, torch.float32, seed=1)
    expected = kd_loss(student, teacher, labels(6), ce_weight=1.0)
    unused = labels(6) == -100
    student[unused], teacher[unused] = torch.nan, torch.inf
    student.requires_grad_()
    loss = kd_loss(student, teacher, labels(6), ce_weight=1.0)
    assert torch.equal(loss, expected)
    (grad,) = gradients(loss, student)
    assert (grad[unused] == 0).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.usefixtures("implementation")
def test_no_row_gives_zero_and_a_zero_gradient(
    rows: int, reduction: str, make_logits: Callable[..., Tensor], device: torch.device
) -> None:
    student = make_logits(rows, 96, torch.float32).requires_grad_()
    teacher = make_logits(rows, 96, torch.float32, seed=1)
    ignored = torch.full((rows,), -100, device=device)
    terms = kd_loss(student, teacher, ignored, ce_weight=1.0, reduction=reduction, return_terms=True)
    assert [term.item() for term in terms] == [0, 0, 0]
    (grad,) = gradients(terms[0], student)
    assert grad.shape == student.shape
    assert (grad == 0).all()


@pytest.mark.parametrize(
    "weights", [{"kd_weight": 0.0, "ce_weight": 1.3}, {"kd_weight": 0.7, "ce_weight": 0.0}]
)
@pytest.mark.usefixtures("implementation")
def test_a_weight_of_zero_leaves_the_other_term(
    weights: dict[str, float],
    make_logits: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
    plain: SimpleNamespace,
) -> None:
    student = make_logits(6, 96, torch.float64).requires_grad_()
    teacher = make_logits(6, 96, torch.float64, seed=1)
    results = []
    for function in (kd_loss, plain.loss):
        loss = function(student, teacher, labels(6), **weights)
        results.append((loss, gradients(loss, student)[0]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("implementation")
def test_weights_may_be_tensors(
    make_logits: Callable[..., Tensor], labels: Callable[[int], Tensor], device: torch.device
) -> None:
    student = make_logits(6, 96, torch.float32).requires_grad_()
    teacher = make_logits(6, 96, torch.float32, seed=1)
    losses = [
        kd_loss(student, teacher, labels(6), kd_weight=kd, ce_weight=ce, reduction="sum")
        for kd, ce in ((0.25, 3.0), (torch.tensor(0.25, device=device), torch.tensor(3.0, device=device)))
    ]
    assert torch.equal(*losses)
    assert torch.equal(*(gradients(loss, student)[0] for loss in losses))


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)],
    ids=str,
)
@pytest.mark.usefixtures("implementation")
def test_student_and_teacher_of_different_dtypes(
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    make_logits: Callable[..., Tensor],
    plain: SimpleNamespace,
    assert_as_accurate: Callable[..., None],
) -> None:
    student = make_logits(4, 101, student_dtype).requires_grad_()
    teacher = make_logits(4, 101, teacher_dtype, seed=1)
    ours = kd_loss(student, teacher)
    theirs = plain.loss(student, teacher.to(student_dtype))
    wide = student.detach().double().requires_grad_()
    exact = plain.loss(wide, teacher.double())
    assert_as_accurate(ours, theirs, exact)
    grads = (gradients(loss, of)[0] for loss, of in ((ours, student), (theirs, student), (exact, wide)))
    assert_as_accurate(*grads)


@pytest.mark.usefixtures("implementation")
def test_a_float16_gradient_does_not_underflow_before_the_loss_scale(
    make_logits: Callable[..., Tensor], plain: SimpleNamespace
) -> None:
    student = make_logits(4, 96, torch.float16).requires_grad_()
    teacher = make_logits(4, 96, torch.float16, seed=1)
    scale = 2.0**16
    # As from a mean over 2^20 rows: nearly all of it is below float16's smallest number.
    (grad,) = gradients(kd_loss(student, teacher, kd_weight=2.0**-20), student, upstream=scale)
    wide = student.detach().double().requires_grad_()
    (exact,) = gradients(plain.loss(wide, teacher.double(), kd_weight=2.0**-20), wide, upstream=scale)
    torch.testing.assert_close(grad.double(), exact, rtol=2e-3, atol=1e-7)


@pytest.mark.usefixtures("implementation")
def test_batch_shapes_and_strides_do_not_matter(
    make_logits: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    flat, teacher = make_logits(6, 96, torch.float32), make_logits(6, 96, torch.float32, seed=1)
    expected = kd_loss(flat, teacher, labels(6), ce_weight=1.0, reduction="none").view(2, 3)
    # The vocabulary runs slowest in memory, in both.
    student = flat.t().contiguous().t().view(2, 3, 96).requires_grad_()
    strided = teacher.view(2, 3, 96).transpose(0, 1).contiguous().transpose(0, 1)
    loss = kd_loss(student, strided, labels(6).view(2, 3), ce_weight=1.0, reduction="none")
    assert torch.equal(loss, expected)
    (grad,) = gradients(loss.sum(), student)
    flat.requires_grad_()
    (expected_grad,) = gradients(kd_loss(flat, teacher, labels(6), ce_weight=1.0, reduction="sum"), flat)
    assert torch.equal(grad.view(6, 96), expected_grad)


@pytest.mark.usefixtures("implementation")
def test_masks_may_be_numbers(make_logits: Callable[..., Tensor], device: torch.device) -> None:
    student, teacher = make_logits(3, 96, torch.float32), make_logits(3, 96, torch.float32, seed=1)
    mask = torch.tensor([1, 0, 1], device=device)
    assert torch.equal(
        kd_loss(student, teacher, kd_mask=mask),
        kd_loss(student[mask > 0], teacher[mask > 0], reduction="mean"),
    )


@pytest.mark.usefixtures("implementation")
def test_same_inputs_give_the_same_bits(
    make_logits: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    student = make_logits(5, 1003, torch.float32).requires_grad_()
    teacher = make_logits(5, 1003, torch.float32, seed=1)
    runs = []
    for _ in range(2):
        loss = kd_loss(student, teacher, labels(5), ce_weight=1.0)
        runs.append((loss, *gradients(loss, student)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.usefixtures("implementation")
def test_inputs_are_not_written_to(
    make_logits: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    student, teacher = make_logits(5, 97, torch.float32), make_logits(5, 97, torch.float32, seed=1)
    target = labels(5)
    before = [x.clone() for x in (student, teacher, target)]
    student.requires_grad_()
    gradients(kd_loss(student, teacher, target, ce_weight=1.0), student)
    for now, then in zip((student, teacher, target), before, strict=True):
        assert torch.equal(now.detach(), then)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("implementation")
def test_a_second_backward_gives_the_same_gradient(
    reduction: str, make_logits: Callable[..., Tensor]
) -> None:
    student = make_logits(5, 96, torch.float32).requires_grad_()
    loss = kd_loss(student, make_logits(5, 96, torch.float32, seed=1), reduction=reduction)
    upstream = torch.full_like(loss, UPSTREAM)
    kept = [torch.autograd.grad(loss, student, upstream, retain_graph=True)[0] for _ in range(2)]
    last = torch.autograd.grad(loss, student, upstream)[0]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], last)


@pytest.mark.usefixtures("implementation")
def test_create_graph_is_refused(make_logits: Callable[..., Tensor]) -> None:
    student = make_logits(3, 96, torch.float32).requires_grad_()
    loss = kd_loss(student, make_logits(3, 96, torch.float32, seed=1))
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.usefixtures("implementation")
def test_the_teacher_gets_no_gradient(make_logits: Callable[..., Tensor]) -> None:
    student = make_logits(3, 96, torch.float32)
    teacher = make_logits(3, 96, torch.float32, seed=1).requires_grad_()
    assert not kd_loss(student, teacher).requires_grad
    kd_loss(student.requires_grad_(), teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("implementation")
def test_gradcheck(
    divergence: str, reduction: str, make_logits: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    student = make_logits(2, 9, torch.float64).requires_grad_()
    teacher = make_logits(2, 9, torch.float64, seed=1)
    settings: dict[str, Any] = {"divergence": divergence, "jsd_beta": 0.3, "label_smoothing": 0.1}
    settings |= {"ce_weight": 0.5, "reduction": reduction}
    target = labels(2)
    assert torch.autograd.gradcheck(
        lambda x: kd_loss(x, teacher, target, **settings), student, fast_mode=True
    )


@pytest.mark.usefixtures("implementation")
def test_compiled_in_one_graph(make_logits: Callable[..., Tensor], labels: Callable[[int], Tensor]) -> None:
    student = make_logits(4, 96, torch.float32).requires_grad_()
    teacher, target = make_logits(4, 96, torch.float32, seed=1), labels(4)

    def step(x: Tensor) -> Tensor:
        return 2 * kd_loss(x * 1.5, teacher, target, ce_weight=0.5, kd_mask=target >= 0)

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        loss = function(student)
        results.append((loss, *gradients(loss, student)))
    torch.testing.assert_close(*results)


def fwd_arguments(
    make_logits: Callable[..., Tensor], device: torch.device, with_grad: bool = True
) -> tuple[Any, ...]:
    student, teacher = make_logits(3, 24, torch.float32), make_logits(3, 24, torch.float32, seed=1)
    scale = torch.tensor(0.5, device=device)
    return (
        student.requires_grad_(with_grad),
        teacher,
        torch.tensor([1, -100, 23], device=device),
        torch.tensor([True, False, True], device=device),
        scale,
        scale.expand(3).contiguous(),
        2.0,
        0,
        0.5,
        -100,
        0.1,
    )


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.usefixtures("implementation")
def test_opcheck(reduce: bool, make_logits: Callable[..., Tensor], device: torch.device) -> None:
    arguments = (*fwd_arguments(make_logits, device), reduce, True)
    torch.library.opcheck(torch.ops.fastdistil.kd_loss_fwd.default, arguments)


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.usefixtures("implementation")
def test_opcheck_in_place(with_grad: bool, make_logits: Callable[..., Tensor], device: torch.device) -> None:
    student, teacher, *rest = fwd_arguments(make_logits, device, with_grad=False)
    bias = torch.linspace(-1, 1, 24, device=device)
    torch.library.opcheck(
        torch.ops.fastdistil.kd_loss_fwd_.default, (student, teacher, bias, None, *rest, with_grad)
    )


@pytest.mark.parametrize("divergence", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("implementation")
def test_the_in_place_form_adds_biases_and_overwrites_the_student(
    divergence: int, dtype: torch.dtype, make_logits: Callable[..., Tensor], device: torch.device
) -> None:
    tile = make_logits(3, 112, dtype)
    student, teacher = tile[:, :101], make_logits(3, 101, dtype, pitch=112, seed=1)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    biases = [torch.linspace(-1, 1, 101, device=device, dtype=accumulation), None]
    arguments = fwd_arguments(make_logits, device)[2:]
    scales = [scale.to(accumulation) for scale in arguments[2:4]]
    settings = (2.0, divergence, 0.3, -100, 0.1)
    wide = student.double() + biases[0].double()
    exact = torch.ops.fastdistil.kd_loss_fwd(
        wide,
        teacher.double(),
        *arguments[:2],
        *(scale.double() for scale in scales),
        *settings,
        False,
        True,
    )
    padding = tile[:, 101:].clone()
    kd, ce = torch.ops.fastdistil.kd_loss_fwd_(
        student, teacher, *biases, *arguments[:2], *scales, *settings, True
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(kd.double(), exact[1], **tolerance)
    torch.testing.assert_close(ce.double(), exact[2], **tolerance)
    if dtype == torch.bfloat16:
        # One unit in the last place: Triton's interpreter cuts where a GPU rounds.
        tolerance = {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(student.double(), exact[3], **tolerance)
    assert torch.equal(tile[:, 101:], padding)


def test_module_is_the_function(make_logits: Callable[..., Tensor], labels: Callable[[int], Tensor]) -> None:
    student, teacher = make_logits(4, 96, torch.float32), make_logits(4, 96, torch.float32, seed=1)
    settings: dict[str, Any] = {"temperature": 3.0, "ce_weight": 0.4, "divergence": "jsd", "reduction": "sum"}
    module = fastdistil.KDLoss(**settings)
    assert torch.equal(module(student, teacher, labels(4)), kd_loss(student, teacher, labels(4), **settings))
    assert "temperature=3.0" in repr(module)


GOOD = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((GOOD, GOOD), {"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ((GOOD, GOOD), {"temperature": -1.0}, "temperature must be > 0 and finite, got -1.0"),
        ((GOOD, GOOD), {"temperature": float("inf")}, "temperature .* got inf"),
        ((GOOD, GOOD), {"temperature": float("nan")}, "temperature .* got nan"),
        ((GOOD, GOOD), {"temperature": torch.tensor(2.0)}, "temperature must be a float, got Tensor"),
        ((GOOD, GOOD), {"divergence": "forward"}, "divergence .* got 'forward'; did you mean 'forward_kl'"),
        ((GOOD, GOOD), {"reduction": "batchmean"}, "reduction .* got 'batchmean'; did you mean 'mean'"),
        ((GOOD, GOOD), {"jsd_beta": 1.0}, r"jsd_beta must be inside \(0, 1\), got 1.0"),
        ((GOOD, GOOD), {"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ((GOOD, GOOD), {"kd_weight": float("nan")}, "kd_weight must be finite, got nan"),
        ((GOOD, GOOD), {"ce_weight": torch.ones(2)}, r"ce_weight must be .* 0-dim tensor, got shape \(2,\)"),
        ((GOOD, GOOD), {"ce_weight": 0.5}, "ce_weight is 0.5, but there are no labels"),
        ((GOOD, torch.zeros(2, 9)), {}, "one vocabulary: student_logits has V=8, teacher_logits has V=9"),
        ((GOOD, torch.zeros(3, 8)), {}, r"teacher_logits must have shape \(2, 8\) .* got \(3, 8\)"),
        ((GOOD.long(), GOOD), {}, "student_logits must be float32.*got torch.int64"),
        ((GOOD, GOOD.to("meta")), {}, "teacher_logits must be on cpu as the student is, got meta"),
        ((torch.zeros(()), torch.zeros(())), {}, "student_logits must have shape"),
        ((torch.zeros(2, 0), torch.zeros(2, 0)), {}, "got V=0"),
        ((GOOD, GOOD, torch.tensor([0, 8])), {}, r"labels must be in \[0, 8\) .* got 8"),
        ((GOOD, GOOD, torch.tensor([-1, 0])), {}, r"labels must be in \[0, 8\) .* got -1"),
        ((GOOD, GOOD, torch.tensor([0, -100])), {"ignore_index": -1}, "labels .* got -100"),
        ((GOOD, GOOD, torch.tensor([0.0, 1.0])), {}, "labels must be integers .* got torch.float32"),
        ((GOOD, GOOD, torch.tensor([0])), {}, r"labels must have shape \(2,\) .* got \(1,\)"),
        ((GOOD, GOOD), {"kd_mask": torch.ones(2)}, "kd_mask must be bool or integer 0/1, got torch.float32"),
        (
            (GOOD, GOOD),
            {"kd_mask": torch.ones(2, 1).bool()},
            r"kd_mask must have shape \(2,\) .* got \(2, 1\)",
        ),
    ],
)
def test_a_mistake_is_named(arguments: tuple[Tensor, ...], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kd_loss(*arguments, **settings)


def test_compiled_code_checks_labels_too(make_logits: Callable[..., Tensor]) -> None:
    student, teacher = make_logits(2, 8, torch.float32), make_logits(2, 8, torch.float32, seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda labels: kd_loss(student, teacher, labels, ce_weight=1.0), fullgraph=True, backend="aot_eager"
    )
    assert torch.isfinite(compiled(torch.tensor([0, 7])))
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, V\)"):
        compiled(torch.tensor([0, 8]))
