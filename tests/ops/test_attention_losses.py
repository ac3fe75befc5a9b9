"""attention_kl and attention_mse: what both promise, for each implementation.

Numbers, gradients, masks, layouts and dtypes against plain PyTorch's maps, and what a user may do wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdistil
from fastdistil import attention_kl, attention_mse

LOSSES = {"attention_kl": attention_kl, "attention_mse": attention_mse}
# (B, H, L, ds, dt). Whole tiles of every kernel; an odd length and TinyBERT's head size, 26 against 64; one
# token; relation heads of 8, and more keys than one tile of Triton's holds.
SHAPES = [(2, 2, 64, 32, 64), (2, 3, 17, 26, 64), (1, 2, 1, 8, 16), (1, 1, 130, 8, 8)]
MASKS = ["none", "padding", "pairs"]


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, teacher_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Student's q and k, teacher's q and k, laid out as a transformer has them: (B, L, H, d) transposed."""
    batch, heads, length, student, teacher = shape
    generator = torch.Generator().manual_seed(0)
    dtypes = (dtype, dtype, teacher_dtype or dtype, teacher_dtype or dtype)
    return [
        (1.5 * torch.randn(batch, length, heads, size, generator=generator)).to(device, kind).transpose(1, 2)
        for size, kind in zip((student, student, teacher, teacher), dtypes, strict=True)
    ]


def make_mask(kind: str, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Padding (a whole sequence of it where there are several); or the pairs of a window, one row empty."""
    batch, _, length = shape[:3]
    if kind == "none":
        return None
    position = torch.arange(length)
    if kind == "padding":
        lengths = [max(1, length - 3)] + [0] * (batch - 1)
        return (position < torch.tensor(lengths)[:, None]).to(device)
    window = (position[:, None] - position).abs() <= 5
    window[length // 2] = length == 1
    return window.expand(batch, length, length).to(device)


def plain_rows(name: str, inputs: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each query row's sum by maps (B, H, L, L), and the pairs that count (B, 1, L, L)."""
    sq, sk, tq, tk = inputs
    batch, length = sq.shape[0], sq.shape[2]
    if mask is None:
        pairs = torch.ones(batch, length, length, dtype=torch.bool, device=sq.device)
    else:
        pairs = mask if mask.dim() == 3 else mask[:, :, None] & mask[:, None, :]
    pairs = pairs.unsqueeze(1)
    s, t = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5 for q, k in ((sq, sk), (tq, tk)))
    if name == "attention_mse":
        return torch.where(pairs, (s - t.to(s.dtype)) ** 2, 0).sum(-1), pairs
    s, t = (x.masked_fill(~pairs, -1e4).log_softmax(-1) for x in (s, t.to(s.dtype)))
    return torch.where(pairs, t.exp() * (t - s), 0).sum(-1), pairs


def plain(name: str, inputs: list[Tensor], mask: Tensor | None, reduction: str = "mean") -> Tensor:
    rows, pairs = plain_rows(name, inputs, mask)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    count = pairs.sum() if name == "attention_mse" else pairs.any(-1).sum()
    return rows.sum() / (count * rows.shape[1]).clamp(min=1)


def gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs[:2], torch.full_like(loss, 3.0))


def leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(i < 2) for i, tensor in enumerate(inputs)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_value_and_gradients_are_as_accurate_as_plain_pytorch(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    mask: str,
    device: torch.device,
    assert_as_accurate: Callable[..., None],
) -> None:
    own_mask = make_mask(mask, shape, device)
    ours, theirs = leaves(make_inputs(shape, dtype, device)), leaves(make_inputs(shape, dtype, device))
    exact = leaves([tensor.double() for tensor in ours])
    losses = [LOSSES[name](*ours, own_mask), *(plain(name, inputs, own_mask) for inputs in (theirs, exact))]
    assert losses[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if name == "attention_kl" and shape[2] == 1:
        # One key: the divergence is 0, and an accuracy relative to it means nothing.
        assert abs(losses[0].item()) < 1e-6
        assert all(grad.abs().max() < 1e-6 for grad in gradients(losses[0], ours))
        return
    assert_as_accurate(*losses)
    grads = [gradients(loss, inputs) for loss, inputs in zip(losses, (ours, theirs, exact), strict=True)]
    for own, other, reference in zip(*grads, strict=True):
        assert own.dtype == dtype
        assert_as_accurate(own, other, reference)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_reductions_and_row_weights(name: str, reduction: str, mask: str, device: torch.device) -> None:
    shape = (2, 2, 13, 8, 12)
    own_mask = make_mask(mask, shape, device)
    ours, theirs = (leaves(make_inputs(shape, torch.float64, device)) for _ in range(2))
    loss = LOSSES[name](*ours, None if own_mask is None else own_mask.long(), reduction=reduction)
    expected = plain(name, theirs, own_mask, reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=torch.float64, device=device).view(loss.shape)
    grads = (torch.autograd.grad(x, inputs[:2], upstream) for x, inputs in ((loss, ours), (expected, theirs)))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_scales_are_the_callers(name: str, device: torch.device) -> None:
    inputs = leaves(make_inputs((1, 2, 9, 8, 8), torch.float64, device))
    loss = LOSSES[name](*inputs, student_scale=0.3, teacher_scale=0.5)
    scaled = [inputs[0] * (0.3 * 8**0.5), inputs[1], inputs[2] * (0.5 * 8**0.5), inputs[3]]
    torch.testing.assert_close(loss, plain(name, scaled, None), rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(plain(name, scaled, None), inputs[:2])
    torch.testing.assert_close(torch.autograd.grad(loss, inputs[:2]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("teacher", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_teacher_in_another_dtype(name: str, teacher: torch.dtype, device: torch.device) -> None:
    inputs = leaves(make_inputs((2, 2, 20, 16, 24), torch.float32, device, teacher))
    loss = LOSSES[name](*inputs)
    exact = leaves([tensor.double() for tensor in inputs])
    expected = plain(name, exact, None)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    for own, reference in zip(gradients(loss, inputs), gradients(expected, exact), strict=True):
        torch.testing.assert_close(
            own.double(), reference, rtol=1e-4, atol=1e-6 * reference.abs().max().item()
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_a_teacher_may_run_in_inference_mode(name: str, reduction: str, device: torch.device) -> None:
    q, k, *teacher = leaves(make_inputs((2, 2, 7, 8, 8), torch.float32, device))
    with torch.inference_mode():
        inferred = [tensor * 1 for tensor in teacher]
    losses = [LOSSES[name](q, k, *own, reduction=reduction).sum() for own in (inferred, teacher)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(loss, (q, k)) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_autocast_does_not_lower_the_precision_inside(name: str, device: torch.device) -> None:
    inputs = leaves(make_inputs((2, 2, 20, 16, 24), torch.float32, device))
    loss = LOSSES[name](*inputs)
    expected = (loss.detach(), *gradients(loss, inputs))
    with torch.autocast(device.type, torch.bfloat16):
        loss = LOSSES[name](*inputs)
        results = (loss.detach(), *gradients(loss, inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "fused_qkv", "sparse_heads"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_any_strides(name: str, layout: str, device: torch.device) -> None:
    inputs = make_inputs((2, 3, 11, 8, 16), torch.float32, device)
    expected = LOSSES[name](*inputs)

    def lay_out(tensor: Tensor) -> Tensor:
        if layout == "contiguous":
            return tensor.contiguous()
        if layout == "fused_qkv":  # (B, L, 3, H, d), as ModernBERT has it
            memory = torch.full((2, 11, 3, 3, tensor.shape[3]), torch.nan, device=device)
            view = memory[:, :, 1].transpose(1, 2)
        else:  # every second head and token of a larger tensor
            view = torch.full((2, 6, 22, tensor.shape[3]), torch.nan, device=device)[:, ::2, ::2]
        return view.copy_(tensor)

    laid_out = leaves([lay_out(tensor) for tensor in inputs])
    loss = LOSSES[name](*laid_out)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    usual = leaves(inputs)
    torch.testing.assert_close(
        gradients(loss, laid_out), gradients(LOSSES[name](*usual), usual), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("mask", ["padding", "pairs"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_tokens_that_do_not_count_are_not_used(name: str, mask: str, device: torch.device) -> None:
    shape = (2, 2, 16, 8, 8)
    own_mask = make_mask(mask, shape, device)
    assert own_mask is not None
    if mask == "pairs":  # a token that is neither a query nor a key
        own_mask = own_mask.clone()
        own_mask[:, 3], own_mask[:, :, 3] = False, False
        unused = torch.zeros(2, 16, dtype=torch.bool, device=device)
        unused[:, 3] = True
    else:
        unused = ~own_mask
    inputs = make_inputs(shape, torch.float32, device)
    expected = LOSSES[name](*inputs, own_mask)
    for tensor, value in zip(inputs, (torch.nan, torch.inf, torch.nan, -torch.inf), strict=True):
        tensor.masked_fill_(unused[:, None, :, None], value)
    inputs = leaves(inputs)
    loss = LOSSES[name](*inputs, own_mask)
    assert torch.equal(loss, expected)
    for grad in gradients(loss, inputs):
        assert torch.isfinite(grad).all()
        assert (grad.transpose(1, 2)[unused] == 0).all()


@pytest.mark.parametrize("shape", [(2, 2, 5, 8, 8), (0, 2, 5, 8, 8)], ids=["masked", "empty"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_no_row_gives_zero_and_zero_gradients(
    name: str, reduction: str, shape: tuple[int, ...], device: torch.device
) -> None:
    inputs = leaves(make_inputs(shape, torch.float32, device))
    nothing = torch.zeros(shape[0], shape[2], dtype=torch.bool, device=device)
    loss = LOSSES[name](*inputs, nothing, reduction=reduction)
    assert (loss == 0).all()
    for grad, tensor in zip(gradients(loss, inputs), inputs, strict=False):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_a_second_backward_gives_the_same_gradient(
    name: str, reduction: str, mask: str, device: torch.device
) -> None:
    shape = (2, 2, 12, 8, 16)
    inputs = leaves(make_inputs(shape, torch.float32, device))
    loss = LOSSES[name](*inputs, make_mask(mask, shape, device), reduction=reduction)
    upstream = torch.full_like(loss, 3.0)
    kept = [torch.autograd.grad(loss, inputs[:2], upstream, retain_graph=True) for _ in range(2)]
    last = torch.autograd.grad(loss, inputs[:2], upstream)
    for grads in (kept[1], last):
        assert all(torch.equal(a, b) for a, b in zip(kept[0], grads, strict=True))


@pytest.mark.parametrize("mask", ["none", "pairs"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_create_graph_is_refused(name: str, reduction: str, mask: str, device: torch.device) -> None:
    shape = (1, 1, 4, 8, 8)
    inputs = leaves(make_inputs(shape, torch.float32, device))
    loss = LOSSES[name](*inputs, make_mask(mask, shape, device), reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(loss, inputs[:2], create_graph=True)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_inputs_are_not_written_to_and_bits_repeat(name: str, device: torch.device) -> None:
    inputs = make_inputs((2, 2, 33, 26, 64), torch.float32, device)
    before = [tensor.clone() for tensor in inputs]
    runs = []
    for _ in range(2):
        own = leaves(inputs)
        loss = LOSSES[name](*own)
        runs.append((loss.detach(), *gradients(loss, own)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_gradcheck(name: str, reduction: str, mask: str, device: torch.device) -> None:
    shape = (2, 1, 6, 3, 5)
    q, k, *teacher = leaves(make_inputs(shape, torch.float64, device))
    own_mask = make_mask(mask, shape, device)
    assert torch.autograd.gradcheck(
        lambda q, k: LOSSES[name](q, k, *teacher, own_mask, reduction=reduction), (q, k), fast_mode=True
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_only_one_of_queries_and_keys_has_a_gradient(name: str, device: torch.device) -> None:
    inputs = leaves(make_inputs((1, 2, 9, 8, 8), torch.float32, device))
    expected = gradients(LOSSES[name](*inputs), inputs)
    for index in range(2):
        own = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(inputs)]
        (grad,) = torch.autograd.grad(3 * LOSSES[name](*own), own[index])
        torch.testing.assert_close(grad, expected[index], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("implementation")
def test_compiled_in_one_graph(name: str, mask: str, device: torch.device) -> None:
    shape = (2, 2, 8, 8, 16)
    inputs = leaves(make_inputs(shape, torch.float32, device))
    own_mask = make_mask(mask, shape, device)

    def step(q: Tensor, k: Tensor) -> Tensor:
        return 2 * LOSSES[name](q * 1.5, k, *inputs[2:], own_mask)

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        loss = function(*inputs[:2])
        results.append((loss, *gradients(loss, inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", LOSSES)
def test_module_is_the_function(name: str) -> None:
    inputs = make_inputs((1, 2, 9, 8, 8), torch.float32, torch.device("cpu"))
    module = {"attention_kl": fastdistil.nn.AttentionKL, "attention_mse": fastdistil.nn.AttentionMSE}[name]
    settings: dict[str, Any] = {"teacher_scale": 0.2, "reduction": "sum"}
    assert torch.equal(module(**settings)(*inputs), LOSSES[name](*inputs, **settings))
    assert "teacher_scale=0.2, reduction='sum'" in repr(module(**settings))


Q = torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((Q, Q, Q[:, :2], Q[:, :2]), {}, "the same number of heads, got 3 and 2; relation_kl splits"),
        ((Q, Q[:, :, :3], Q, Q), {}, r"student_k must have shape \(2, 3, 4, 8\) .* got \(2, 3, 3, 8\)"),
        ((Q, Q, Q[:1], Q[:1]), {}, r"teacher_q must have shape \(2, 3, 4, 8\) .* got \(1, 3, 4, 8\)"),
        ((Q, Q, Q, Q[..., :4]), {}, "teacher_k must have shape"),
        ((Q[0], Q[0], Q, Q), {}, r"student_q must have shape \(B, H, L, d\), got \(3, 4, 8\)"),
        ((Q.int(), Q, Q, Q), {}, "student_q must be float32.*got torch.int32"),
        (
            (Q, Q.double(), Q, Q),
            {},
            "student_k must have the dtype of student_q, torch.float32, got torch.float64",
        ),
        ((Q, Q, Q.to("meta"), Q), {}, "teacher_q must be on cpu as the student is, got meta"),
        (
            (Q, Q, Q, Q, torch.ones(2, 5).bool()),
            {},
            r"mask must have shape \(B, L\) = \(2, 4\).* got \(2, 5\)",
        ),
        ((Q, Q, Q, Q, torch.ones(2, 4)), {}, "mask must be bool or integer 0/1, got torch.float32"),
        ((Q, Q, Q, Q), {"reduction": "summ"}, "reduction .* got 'summ'; did you mean 'sum'"),
        ((Q, Q, Q, Q), {"student_scale": float("nan")}, "student_scale must be finite, got nan"),
        ((Q[..., :0], Q[..., :0], Q, Q), {}, "student_q must have a head size above 0"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_a_mistake_is_named(
    name: str, arguments: tuple[Tensor, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LOSSES[name](*arguments, **settings)
