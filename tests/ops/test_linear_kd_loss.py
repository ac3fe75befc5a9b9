"""linear_kd_loss: the numbers of kd_loss on whole logits, in chunks, for each implementation of
kd_loss_fwd_."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdistil
from fastdistil import linear_kd_loss
from fastdistil.ops import linear_kd_loss as module
from fastdistil.ops import logit_chunks
from fastdistil.ops.matmul import Precision, precision

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
UPSTREAM = 3.0
ROWS, STUDENT_WIDTH, TEACHER_WIDTH = 11, 24, 40
LABELS = [3, -100, 0, 95, -100, 17, -100, 5, 5, 1, -100]


@dataclass
class Heads:
    """Hidden states and vocabulary matrices of two models, and the loss on them, ours and plain."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor

    def students(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.student_bias

    def to(self, dtype: torch.dtype) -> Heads:
        students = [x.detach().to(dtype).requires_grad_() for x in self.students()]
        teachers = [x.to(dtype) for x in (self.teacher_hidden, self.teacher_weight, self.teacher_bias)]
        return Heads(*students, *teachers)

    def ours(self, labels: Tensor | None = None, **settings: Any) -> Any:
        return linear_kd_loss(
            self.student_hidden,
            self.student_weight,
            self.teacher_hidden,
            self.teacher_weight,
            labels,
            student_bias=self.student_bias,
            teacher_bias=self.teacher_bias,
            **settings,
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        return (
            torch.nn.functional.linear(self.student_hidden, self.student_weight, self.student_bias),
            torch.nn.functional.linear(self.teacher_hidden, self.teacher_weight, self.teacher_bias),
        )


@pytest.fixture
def make_heads(device: torch.device) -> Callable[..., Heads]:
    def make(vocabulary: int, dtype: torch.dtype = torch.float64, rows: int = ROWS) -> Heads:
        generator = torch.Generator().manual_seed(0)

        def values(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

        heads = Heads(
            values(rows, STUDENT_WIDTH),
            values(vocabulary, STUDENT_WIDTH, scale=0.5),
            values(vocabulary),
            values(rows, TEACHER_WIDTH),
            values(vocabulary, TEACHER_WIDTH, scale=0.4),
            values(vocabulary),
        )
        return heads.to(dtype)

    return make


@pytest.fixture
def labels(device: torch.device) -> Tensor:
    return torch.tensor(LABELS, device=device)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, torch.full_like(loss, UPSTREAM))


@pytest.mark.parametrize("vocabulary", [96, 131], ids=["aligned", "odd"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("implementation")
def test_value_and_gradients_are_as_accurate_as_plain_pytorch(
    vocabulary: int,
    divergence: str,
    dtype: torch.dtype,
    make_heads: Callable[..., Heads],
    labels: Tensor,
    plain: SimpleNamespace,
    assert_as_accurate: Callable[..., None],
) -> None:
    heads = make_heads(vocabulary, dtype)
    settings: dict[str, Any] = {"divergence": divergence, "ce_weight": 1.3, "label_smoothing": 0.1}
    ours = heads.ours(labels, chunk_size=4, **settings)
    theirs = plain.loss(*heads.logits(), labels, **settings)
    wide = heads.to(torch.float64)
    exact = plain.loss(*wide.logits(), labels, **settings)
    assert ours.dtype == torch.float32
    assert_as_accurate(ours, theirs, exact, precision(heads.student_hidden).logits)
    for mine, yours, true in zip(
        gradients(ours, *heads.students()),
        gradients(theirs, *heads.students()),
        gradients(exact, *wide.students()),
        strict=True,
    ):
        assert mine.dtype == dtype
        assert_as_accurate(mine, yours, true)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.usefixtures("implementation")
def test_reductions_masks_and_chunks_do_not_change_the_numbers(
    reduction: str,
    with_mask: bool,
    chunk_size: int | None,
    make_heads: Callable[..., Heads],
    labels: Tensor,
    plain: SimpleNamespace,
) -> None:
    heads = make_heads(30)
    labels = labels.clamp(max=29)
    # Rows with both terms, with one of them, and with neither.
    mask = torch.arange(ROWS, device=labels.device) % 3 == 0 if with_mask else None
    settings: dict[str, Any] = {"kd_weight": 0.7, "ce_weight": 1.3, "kd_mask": mask, "reduction": reduction}
    ours = heads.ours(labels, chunk_size=chunk_size, **settings)
    expected = plain.loss(*heads.logits(), labels, **settings)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.linspace(1, 2, ours.numel(), dtype=torch.float64, device=ours.device).view(ours.shape)
    grads = (torch.autograd.grad(loss, heads.students(), upstream) for loss in (ours, expected))
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("implementation")
def test_terms_are_those_of_the_loss(make_heads: Callable[..., Heads], labels: Tensor) -> None:
    heads = make_heads(96)
    loss, kd, ce = heads.ours(labels, kd_weight=0.7, ce_weight=1.3, return_terms=True)
    torch.testing.assert_close(loss, 0.7 * kd + 1.3 * ce, rtol=1e-12, atol=1e-14)
    assert not kd.requires_grad
    assert not ce.requires_grad


@pytest.mark.usefixtures("implementation")
def test_rows_that_no_term_uses_are_not_read(make_heads: Callable[..., Heads], labels: Tensor) -> None:
    heads = make_heads(96, torch.float32)
    expected = heads.ours(labels, ce_weight=1.0)
    with torch.no_grad():
        heads.student_hidden[labels == -100] = torch.nan
        heads.teacher_hidden[labels == -100] = torch.inf
    loss = heads.ours(labels, ce_weight=1.0)
    assert torch.equal(loss, expected)
    hidden, weight, bias = gradients(loss, *heads.students())
    assert (hidden[labels == -100] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in (hidden, weight, bias))


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.usefixtures("implementation")
def test_no_row_gives_zero_and_zero_gradients(
    rows: int, make_heads: Callable[..., Heads], device: torch.device
) -> None:
    heads = make_heads(96, torch.float32, rows=rows)
    loss = heads.ours(torch.full((rows,), -100, device=device), ce_weight=1.0)
    assert loss.item() == 0
    for grad, of in zip(gradients(loss, *heads.students()), heads.students(), strict=True):
        assert grad.shape == of.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("implementation")
def test_gradients_are_those_of_the_inputs_that_ask(
    wanted: tuple[int, ...], reduction: str, make_heads: Callable[..., Heads], labels: Tensor
) -> None:
    heads = make_heads(96)
    every = gradients(heads.ours(labels, reduction=reduction), *heads.students())
    for position, tensor in enumerate(heads.students()):
        tensor.requires_grad_(position in wanted)
    some = gradients(heads.ours(labels, reduction=reduction), *(heads.students()[i] for i in wanted))
    for position, grad in zip(wanted, some, strict=True):
        torch.testing.assert_close(grad, every[position], rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("implementation")
def test_batch_shapes_and_missing_biases(make_heads: Callable[..., Heads], plain: SimpleNamespace) -> None:
    heads = make_heads(96, rows=6)
    loss = linear_kd_loss(
        heads.student_hidden.view(2, 3, -1),
        heads.student_weight,
        heads.teacher_hidden.view(2, 3, -1),
        heads.teacher_weight,
        reduction="none",
    )
    student = heads.student_hidden @ heads.student_weight.t()
    teacher = heads.teacher_hidden @ heads.teacher_weight.t()
    expected = plain.loss(student, teacher, reduction="none").view(2, 3)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("implementation")
def test_strides_of_a_bias_do_not_matter(make_heads: Callable[..., Heads]) -> None:
    heads = make_heads(96, torch.float32)
    inputs = heads.student_hidden, heads.student_weight, heads.teacher_hidden, heads.teacher_weight
    strided = linear_kd_loss(*inputs, student_bias=heads.student_bias.repeat_interleave(2)[::2])
    assert torch.equal(strided, linear_kd_loss(*inputs, student_bias=heads.student_bias))
    expanded = heads.teacher_bias[:1].expand(96)
    same = linear_kd_loss(*inputs, teacher_bias=expanded.clone())
    assert torch.equal(linear_kd_loss(*inputs, teacher_bias=expanded), same)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("implementation")
def test_a_second_backward_gives_the_same_gradients(
    reduction: str, make_heads: Callable[..., Heads], labels: Tensor
) -> None:
    heads = make_heads(96, torch.float32)
    loss = heads.ours(labels, ce_weight=1.0, reduction=reduction)
    upstream = torch.full_like(loss, UPSTREAM)
    runs = [
        torch.autograd.grad(loss, heads.students(), upstream, retain_graph=retain)
        for retain in (True, True, False)
    ]
    for first, second, third in zip(*runs, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_create_graph_is_refused(reduction: str, make_heads: Callable[..., Heads]) -> None:
    heads = make_heads(96)
    loss = heads.ours(reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(loss, heads.students(), create_graph=True)


@pytest.mark.usefixtures("implementation")
def test_inputs_are_not_written_to_and_bits_repeat(make_heads: Callable[..., Heads], labels: Tensor) -> None:
    heads = make_heads(131, torch.float32)
    tensors = [*heads.students(), heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias]
    before = [x.detach().clone() for x in tensors]
    runs = [gradients(heads.ours(labels.clone(), ce_weight=1.0), *heads.students()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(now.detach(), then) for now, then in zip(tensors, before, strict=True))


def test_a_tied_weight_gets_both_gradients(make_heads: Callable[..., Heads]) -> None:
    heads = make_heads(STUDENT_WIDTH, rows=STUDENT_WIDTH)
    tied = heads.student_weight
    heads.student_hidden = tied
    (together,) = gradients(heads.ours(), tied)
    heads.student_hidden = tied.detach().clone().requires_grad_()
    torch.testing.assert_close(together, sum(gradients(heads.ours(), heads.student_hidden, tied)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(divergence: str, reduction: str, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)

    teacher_hidden, teacher_weight = values(3, 4), values(6, 4)
    target = torch.tensor([1, -100, 5], device=device)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_kd_loss(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            target,
            student_bias=bias,
            ce_weight=0.5,
            divergence=divergence,
            reduction=reduction,
            chunk_size=1,
        )

    inputs = tuple(x.requires_grad_() for x in (values(3, 2), values(6, 2), values(6)))
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("reduce", [True, False])
def test_opcheck(reduce: bool, make_heads: Callable[..., Heads], labels: Tensor) -> None:
    heads = make_heads(96, torch.float32)
    scale = torch.tensor(0.5)
    arguments = (
        *(heads.student_hidden, heads.student_weight, heads.teacher_hidden, heads.teacher_weight),
        *(heads.student_bias, heads.teacher_bias, labels, labels >= 0, scale, scale.clone()),
        *(2.0, 0, 0.5, -100, 0.1, 4, reduce, reduce, reduce, reduce),
    )
    torch.library.opcheck(torch.ops.fastdistil.linear_kd_loss_fwd.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("implementation")
def test_compiled_in_one_graph(reduction: str, make_heads: Callable[..., Heads], labels: Tensor) -> None:
    heads = make_heads(96, torch.float32)

    def step(hidden: Tensor, weight: Tensor) -> Any:
        return 2 * linear_kd_loss(
            hidden * 1.5,
            weight,
            heads.teacher_hidden,
            heads.teacher_weight,
            labels,
            ce_weight=0.5,
            reduction=reduction,
        )

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        loss = function(heads.student_hidden, heads.student_weight)
        results.append((loss, *gradients(loss, heads.student_hidden, heads.student_weight)))
    torch.testing.assert_close(*results)


def test_under_autocast_products_are_low_precision_and_gradients_keep_their_dtype(
    make_heads: Callable[..., Heads], labels: Tensor
) -> None:
    heads = make_heads(96, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = heads.ours(labels, ce_weight=1.0)
    rounded = heads.to(torch.float32)
    with torch.no_grad():
        for hidden in (rounded.student_hidden, rounded.teacher_hidden):
            hidden.copy_(hidden.bfloat16())
    expected = rounded.ours(labels, ce_weight=1.0)
    # Without bfloat16 units the products are those of float32 on rounded hidden states.
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    grads = gradients(loss, *heads.students())
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    for grad, reference in zip(grads, gradients(expected, *rounded.students()), strict=True):
        torch.testing.assert_close(grad, reference, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "chosen",
    [
        # A CPU with bfloat16 units, and the steps that a GPU takes for float16.
        Precision(torch.bfloat16, torch.bfloat16),
        Precision(torch.float16, torch.float32),
    ],
    ids=["bfloat16", "float16"],
)
def test_low_precision_products(
    chosen: Precision,
    make_heads: Callable[..., Heads],
    labels: Tensor,
    plain: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    assert_as_accurate: Callable[..., None],
) -> None:
    monkeypatch.setattr(logit_chunks, "precision", lambda _: chosen)
    heads = make_heads(96, chosen.product)
    # As from a mean over many rows: the gradient of the logits would underflow in float16.
    settings: dict[str, Any] = {"kd_weight": 2.0**-12, "ce_weight": 2.0**-12}
    ours = heads.ours(labels, chunk_size=4, **settings)
    theirs = plain.loss(*heads.logits(), labels, **settings)
    wide = heads.to(torch.float64)
    exact = plain.loss(*wide.logits(), labels, **settings)
    assert_as_accurate(ours, theirs, exact, chosen.logits)
    for mine, yours, true in zip(
        gradients(ours, *heads.students()),
        gradients(theirs, *heads.students()),
        gradients(exact, *wide.students()),
        strict=True,
    ):
        assert_as_accurate(mine, yours, true)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that a result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor) and not result._is_view():
                self.elements = max(self.elements, result.numel())
        return results


def test_whole_logits_are_never_allocated(make_heads: Callable[..., Heads], labels: Tensor) -> None:
    rows, vocabulary = 4 * ROWS, 515
    heads = make_heads(vocabulary, torch.float32, rows=rows)
    scale = torch.tensor(1.0)
    with torch.no_grad(), LargestTensor() as largest:
        # Below the dispatcher, where a mode sees what the op allocates.
        module.linear_kd_loss_impl(
            *(heads.student_hidden, heads.student_weight, heads.teacher_hidden, heads.teacher_weight),
            *(heads.student_bias, heads.teacher_bias, labels.repeat(4), None, scale, scale),
            *(2.0, 0, 0.5, -100, 0.0, 4, True, True, True, True),
        )
    # The weight's own gradient, and not rows * vocabulary.
    assert largest.elements <= vocabulary * TEACHER_WIDTH < rows * vocabulary


def test_module_is_the_function(make_heads: Callable[..., Heads], labels: Tensor) -> None:
    heads = make_heads(96, torch.float32)
    settings: dict[str, Any] = {"temperature": 3.0, "ce_weight": 0.4, "divergence": "jsd", "chunk_size": 2}
    loss = fastdistil.LinearKDLoss(**settings)(
        heads.student_hidden,
        heads.student_weight,
        heads.teacher_hidden,
        heads.teacher_weight,
        labels,
        student_bias=heads.student_bias,
        teacher_bias=heads.teacher_bias,
    )
    assert torch.equal(loss, heads.ours(labels, **settings))


HIDDEN, WEIGHT = torch.zeros(2, 4), torch.zeros(8, 4)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((HIDDEN, WEIGHT, HIDDEN, torch.zeros(9, 4)), {}, "one vocabulary: student_weight has V=8, .* V=9"),
        (
            (HIDDEN, torch.zeros(8, 5), HIDDEN, WEIGHT),
            {},
            r"student_weight must have shape \(V, 4\) .*\(8, 5\)",
        ),
        ((HIDDEN, WEIGHT, HIDDEN, torch.zeros(8)), {}, r"teacher_weight must have shape \(V, 4\) .*\(8,\)"),
        (
            (HIDDEN, WEIGHT, torch.zeros(3, 4), WEIGHT),
            {},
            r"teacher_hidden must have as many rows .* got \(3,\)",
        ),
        ((HIDDEN, WEIGHT.long(), HIDDEN, WEIGHT), {}, "student_weight must be float32.* got torch.int64"),
        ((HIDDEN, WEIGHT.to("meta"), HIDDEN, WEIGHT), {}, "student_weight must be on cpu .* got meta"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"student_bias": torch.zeros(7)}, r"student_bias .* got \(7,\)"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"chunk_size": 0}, "chunk_size must be > 0, got 0"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"temperature": -1.0}, "temperature must be > 0 .* got -1.0"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT, torch.tensor([0, 8])), {}, r"labels must be in \[0, 8\) .* got 8"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"kd_mask": torch.ones(3).bool()}, r"kd_mask .* got \(3,\)"),
    ],
)
def test_a_mistake_is_named(arguments: tuple[Tensor, ...], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(*arguments, **settings)
