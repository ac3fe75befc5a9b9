"""What only tiles of scores can get wrong: more keys and queries than one holds, and parts of a head."""

import pytest
import torch
from torch import Tensor

import fastdistil
from fastdistil.ops.attention_kl import attention_kl_bwd_ref, attention_kl_fwd_ref
from fastdistil.ops.attention_mse import attention_mse_ref

pytest.importorskip("fastdistil._C", reason="the C++ extension is not built", exc_type=ImportError)

# Tiles are 48 queries by 256 keys. Less than one; one query and one key more than whole ones; several.
LENGTHS = [5, 49, 257, 700]
# Many heads run whole; of few, a task takes a part of the queries, and parts of the keys' gradient are added.
BATCH_AND_HEADS = [(3, 12), (1, 2)]


def inputs(batch: int, heads: int, length: int, sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, size) for size in (sizes[0], sizes[0], sizes[1], sizes[1])]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def near(ours: Tensor, exact: Tensor) -> None:
    assert (ours.double() - exact).abs().max() <= 4e-6 * exact.abs().max()


def mask_of(kind: str | None, batch: int, length: int) -> Tensor | None:
    if kind is None:
        return None
    lengths = torch.tensor([max(1, length - 7 * i) for i in range(batch)])
    tokens = torch.arange(length) < lengths[:, None]
    if kind == "padding":
        return tokens
    position = torch.arange(length)
    return ((position[:, None] - position).abs() <= 200) & tokens[:, :, None] & tokens[:, None]


@pytest.mark.parametrize("mask", [None, "padding", "pairs"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("batch", "heads"), BATCH_AND_HEADS)
def test_attention_kl(batch: int, heads: int, length: int, mask: str | None) -> None:
    tensors, counts = inputs(batch, heads, length, (8, 24)), mask_of(mask, batch, length)
    wide = [tensor.double() for tensor in tensors]
    ours = torch.ops.fastdistil.attention_kl_fwd(*tensors, counts, 0.4, 0.2)
    exact = attention_kl_fwd_ref(*wide, counts, 0.4, 0.2)
    for own, reference in zip(ours, exact, strict=True):
        near(own, reference)
    weight = torch.rand(batch, heads, length, generator=torch.Generator().manual_seed(1))
    grads = torch.ops.fastdistil.attention_kl_bwd(weight, *tensors, counts, *ours[1:], 0.4, 0.2)
    expected = attention_kl_bwd_ref(weight.double(), *wide, counts, *exact[1:], 0.4, 0.2)
    for own, reference in zip(grads, expected, strict=True):
        near(own, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_kl_of_a_long_sequence_with_padding(dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in inputs(1, 1, 2048, (26, 64))]
    mask = torch.arange(2048)[None] < 2000
    ours = torch.ops.fastdistil.attention_kl_fwd(*tensors, mask, 26**-0.5, 0.125)
    exact = attention_kl_fwd_ref(*(tensor.double() for tensor in tensors), mask, 26**-0.5, 0.125)
    for own, reference in zip(ours, exact, strict=True):
        near(own, reference)


# By scores up to 97 tokens of heads of 8 and 24, by Gram matrices above.
@pytest.mark.parametrize("mask", [None, "padding"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("length", [5, 49, 257])
def test_attention_mse(length: int, weighted: bool, mask: str | None) -> None:
    tensors, counts = inputs(2, 3, length, (8, 24)), mask_of(mask, 2, length)
    weight = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(1))
    weight = weight if weighted else weight[0, 0, 0]
    ours = torch.ops.fastdistil.attention_mse_fwd(*tensors, counts, weight, 0.4, 0.2, True)
    wide = [tensor.double() for tensor in tensors]
    exact = attention_mse_ref(*wide, counts, weight.double(), 0.4, 0.2, True)
    for own, reference in zip(ours, exact, strict=True):
        near(own, reference)


@pytest.mark.parametrize("loss", [fastdistil.attention_kl, fastdistil.attention_mse])
def test_results_do_not_depend_on_the_number_of_threads(loss: object) -> None:
    assert callable(loss)
    # Few heads of many queries are split over threads.
    tensors = inputs(1, 2, 400, (16, 16))
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            q, k = (tensor.clone().requires_grad_() for tensor in tensors[:2])
            value = loss(q, k, *tensors[2:])
            results.append((value.detach(), *torch.autograd.grad(value, (q, k))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
