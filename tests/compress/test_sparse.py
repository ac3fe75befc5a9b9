from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdistil.compress.encoded import code_of, densify, parameter_of
from fastdistil.compress.replacements import replace, replacements
from fastdistil.compress.sparse import pack_bits, sparsify, to_semi_structured, unpack_bits

PATH = "bert.encoder.layer.0.intermediate.dense"


@pytest.fixture
def keep() -> Tensor:
    return torch.rand(48, 32, generator=torch.Generator().manual_seed(3)) < 0.3


# A whole number of bytes, and not.
@pytest.mark.parametrize("shape", [(4, 8), (3, 7)])
def test_bits_are_packed_as_numpy_packs_them(shape: tuple[int, int]) -> None:
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(bits)
    assert packed.tolist() == np.packbits(bits.numpy(), bitorder="little").tolist()
    assert torch.equal(unpack_bits(packed, bits.shape), bits)


def test_the_weight_is_that_of_the_mask(tiny_bert: Any, keep: Tensor) -> None:
    linear = tiny_bert.get_submodule(PATH)
    expected = torch.where(keep, linear.weight, 0).detach()
    sparsify(tiny_bert, PATH, keep)
    assert isinstance(linear, nn.Linear)
    assert torch.equal(linear.weight, expected)


def test_the_file_holds_a_bitmap_and_the_values(
    tiny_bert: Any, keep: Tensor, save: Callable[..., Path]
) -> None:
    sparsify(tiny_bert, PATH, keep)
    tensors = load_file(save(tiny_bert) / "model.safetensors")
    sizes = {name: t.nbytes for name, t in tensors.items() if name.startswith(PATH) and "bias" not in name}
    assert sum(sizes.values()) == 48 * 32 // 8 + 4 * int(keep.sum())
    assert f"{PATH}.weight" not in tensors


def test_reloads_bit_equal(tiny_bert: Any, keep: Tensor, reload_equal: Callable[[Any], Any]) -> None:
    sparsify(tiny_bert, PATH, keep)
    loaded = reload_equal(tiny_bert)
    assert torch.equal(loaded.get_submodule(PATH).weight, tiny_bert.get_submodule(PATH).weight)


def test_training_moves_the_values_and_keeps_the_zeros(tiny_bert: Any, keep: Tensor) -> None:
    sparsify(tiny_bert, PATH, keep)
    linear = tiny_bert.get_submodule(PATH)
    before = linear.weight.detach().clone()
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(3):
        linear(torch.randn(5, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = linear.weight
    assert (after[~keep] == 0).all()
    assert (after[keep] != before[keep]).all()


def test_the_gradient_is_that_of_the_dense_weight(tiny_bert: Any, keep: Tensor) -> None:
    sparsify(tiny_bert, PATH, keep)
    linear = tiny_bert.get_submodule(PATH)
    x, upstream = torch.randn(5, 32), torch.randn(5, 48)
    linear(x).backward(upstream)
    assert torch.allclose(parameter_of(linear).grad, (upstream.T @ x)[keep])  # type: ignore[arg-type]


def test_a_weight_decoded_without_gradients_can_be_used_in_training(tiny_bert: Any, keep: Tensor) -> None:
    sparsify(tiny_bert, PATH, keep)
    linear = tiny_bert.get_submodule(PATH).requires_grad_(False)
    with torch.inference_mode():
        linear(torch.ones(1, 32))
    x = torch.ones(1, 32, requires_grad=True)
    linear(x).sum().backward()
    assert torch.allclose(x.grad[0], linear.weight.sum(0))  # type: ignore[index]


def test_another_bitmap_is_seen_after_loading(tiny_bert: Any, keep: Tensor) -> None:
    sparsify(tiny_bert, PATH, keep)
    linear = tiny_bert.get_submodule(PATH).requires_grad_(False)
    before = linear.weight
    name = "parametrizations.weight.0.bitmap"
    linear.load_state_dict({**linear.state_dict(), name: pack_bits(keep.flipud())})
    assert torch.equal(linear.weight != 0, keep.flipud())
    assert not torch.equal(linear.weight, before)


def test_densify_gives_plain_linears_of_the_same_values(
    tiny_bert: Any, keep: Tensor, run: Callable[[Any], Tensor]
) -> None:
    sparsify(tiny_bert, PATH, keep)
    expected = run(tiny_bert)
    densify(tiny_bert)
    assert type(tiny_bert.get_submodule(PATH)) is nn.Linear
    assert isinstance(tiny_bert.get_submodule(PATH).weight, nn.Parameter)
    assert replacements(tiny_bert) == []
    assert torch.equal(run(tiny_bert), expected)


def test_what_was_put_in_its_place_reloads(
    tiny_bert: Any, keep: Tensor, reload_equal: Callable[[Any], Any]
) -> None:
    sparsify(tiny_bert, PATH, keep)
    spec = {"kind": "linear", "in_features": 32, "out_features": 48}
    replace(tiny_bert, PATH, nn.Linear(32, 48), spec)
    assert [spec["kind"] for _, spec in replacements(densify(tiny_bert))] == ["sparse", "linear"]
    reload_equal(tiny_bert)


def test_works_in_bfloat16(tiny_bert: Any, keep: Tensor, reload_equal: Callable[[Any], Any]) -> None:
    sparsify(tiny_bert, PATH, keep)
    float32 = tiny_bert.get_submodule(PATH).weight.detach()
    tiny_bert.to(torch.bfloat16)
    assert torch.equal(tiny_bert.get_submodule(PATH).weight, float32.bfloat16())
    reload_equal(tiny_bert)


def test_the_same_parameter_elsewhere_is_left_alone(tiny_bert: Any, keep: Tensor) -> None:
    shared = tiny_bert.get_submodule(PATH).weight
    sparsify(tiny_bert, PATH, keep)
    assert shared.shape == (48, 32)
    assert code_of(tiny_bert.get_submodule(PATH)).kept == int(keep.sum())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured tensors need a CUDA device")
def test_semi_structured_tensors_compute_the_same(tiny_bert: Any) -> None:
    linear = nn.Linear(128, 128)
    tiny_bert.set_submodule(PATH, linear)
    sparsify(tiny_bert, PATH, torch.tensor([True, False, True, False]).repeat(128, 32), pattern="2:4")
    model = tiny_bert.to("cuda", torch.float16)
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        expected = linear(x)
        to_semi_structured(model)
        assert type(linear.weight.data) is not Tensor
        torch.testing.assert_close(linear(x), expected, atol=2e-2, rtol=2e-2)
