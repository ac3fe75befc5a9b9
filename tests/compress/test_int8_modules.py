"""The int8 layers against float64, and their scheme against torchao's."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastdistil.compress import int8_modules
from fastdistil.compress.int8_modules import (
    Int8Embedding,
    Int8Linear,
    _build_embedding,
    _build_linear,
    quantize,
    row_scale,
    scaled_product,
)


def _linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        linear.weight[1] *= 40  # one scale for all rows would lose the others
    return linear


def _inputs(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[..., 0, :] *= 30  # a token with large values
    return x


def _bound(linear: nn.Linear, x: Tensor, input_scale: Tensor) -> Tensor:
    """What rounding both factors to the nearest level can do to each output, in float64.

    |Σ (w + e)(x + f) - w x| <= Σ |e||x| + |w||f| + |e||f| with |e| <= s_w / 2 and |f| <= s_x / 2.
    """
    weight, x, s_x = linear.weight.double(), x.double(), input_scale.double()
    s_w = row_scale(linear.weight)[:, 0].double()
    ones = torch.ones_like(x)
    rounding = 1e-5 * (x.abs() @ weight.abs().t() + 1)
    first = x.abs().sum(-1, keepdim=True) * s_w / 2
    second = s_x / 2 * (ones @ weight.abs().t())
    return first + second + x.shape[-1] * s_w * s_x / 4 + rounding


# Aligned to vector registers, and not; one token, which a GPU's kernel pads.
@pytest.mark.parametrize(("shape", "outputs"), [((2, 16, 64), 32), ((3, 7, 33), 19), ((1, 1, 5), 3)])
@pytest.mark.parametrize("static", [False, True])
def test_linear_is_within_the_bound_of_its_scales(shape: tuple[int, ...], outputs: int, static: bool) -> None:
    linear, x = _linear(shape[-1], outputs), _inputs(*shape)
    scale = row_scale(x.flatten()).reshape(()) if static else None
    output = Int8Linear.from_linear(linear, scale)(x)
    truth = x.double() @ linear.weight.double().t() + linear.bias.double()
    bound = _bound(linear, x, row_scale(x) if scale is None else scale)
    assert output.dtype == torch.float32
    assert ((output - truth).abs() <= bound).all()


def test_linear_is_the_exact_product_of_its_int8_numbers() -> None:
    linear, x = _linear(1536, 24), _inputs(2, 9, 1536)
    module = Int8Linear.from_linear(linear)
    scale = row_scale(x)
    exact = quantize(x, scale).double() @ module.weight_int8.double().t() * scale * module.weight_scale
    exact += linear.bias.double()
    torch.testing.assert_close(module(x).double(), exact, rtol=1e-6, atol=1e-5)


def test_product_without_int8_instructions_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(-127, 128, (6, 300), dtype=torch.int8, generator=generator)
    b = torch.randint(-127, 128, (5, 300), dtype=torch.int8, generator=generator)
    scale = torch.rand(6, 1, generator=generator)
    exact = (a.int() @ b.int().t()).float() * scale
    for there in (True, False):
        monkeypatch.setattr(int8_modules, "_has_vnni", lambda there=there: there)
        assert torch.equal(scaled_product(a, b, scale), exact)


def test_static_scale_saturates_what_lies_beyond_it() -> None:
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
    module = Int8Linear.from_linear(linear, torch.tensor(1 / 127))
    torch.testing.assert_close(module(torch.tensor([[5.0, -0.5]])), torch.tensor([[1.0, -64 / 127]]))


def test_rows_of_zeros_stay_zeros() -> None:
    linear = nn.Linear(8, 4, bias=False)
    nn.init.zeros_(linear.weight)
    x = torch.zeros(3, 8)
    assert torch.equal(Int8Linear.from_linear(linear)(x), torch.zeros(3, 4))


def test_linear_keeps_the_inputs_dtype() -> None:
    linear, x = _linear(64, 32), _inputs(4, 64).bfloat16()
    output = Int8Linear.from_linear(linear)(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.float(), Int8Linear.from_linear(linear)(x.float()), rtol=0.01, atol=0.01
    )


def test_weights_and_scales_are_torchaos() -> None:
    granularity = pytest.importorskip("torchao.quantization.granularity")
    from torchao.quantization import Int8Tensor
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    linear, x = _linear(64, 32, bias=False), _inputs(5, 64)
    row = granularity.PerRow()
    theirs = Int8Tensor.from_hp(linear.weight.detach(), row, act_quant_kwargs=QuantizeTensorToInt8Kwargs(row))
    ours = Int8Linear.from_linear(linear)
    # torchao spreads ±max over 255 levels, half a level more than the symmetric 254.
    torch.testing.assert_close(ours.weight_scale * 127 / 127.5, theirs.scale[:, 0])
    truth = x.double() @ linear.weight.double().t()
    error, their_error = ((y - truth).norm() for y in (ours(x), nn.functional.linear(x, theirs)))
    assert error <= 1.1 * their_error


def test_embedding_rows_are_within_half_a_scale() -> None:
    embedding = nn.Embedding(50, 24, padding_idx=0)
    with torch.no_grad():
        embedding.weight[7] *= 100
    ids = torch.arange(50).view(5, 10)
    module = Int8Embedding.from_embedding(embedding)
    half = row_scale(embedding.weight.detach())[ids] / 2
    assert ((module(ids) - embedding(ids)).abs() <= half * (1 + 1e-5)).all()
    assert torch.equal(module(ids), module.weight[ids])
    assert module(torch.tensor([0])).abs().max() == 0  # the padding row


def test_stored_bytes_are_those_of_the_coding() -> None:
    linear, embedding = _linear(64, 32), nn.Embedding(50, 24)
    for module, size in (
        (Int8Linear.from_linear(linear), 64 * 32 + 4 * 32 + 4 * 32),
        (Int8Embedding.from_embedding(embedding), 50 * 24 + 4 * 50),
    ):
        assert sum(tensor.nbytes for tensor in module.state_dict().values()) == size


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_built_from_its_spec(static: bool, bias: bool) -> None:
    linear, x = _linear(12, 9, bias=bias), _inputs(4, 12)
    made = Int8Linear.from_linear(linear, torch.tensor(0.1) if static else None)
    blank = copy.deepcopy(linear).to("meta")
    built = _build_linear(blank, {"kind": "int8_linear", "static": static}).to_empty(device="cpu")
    built.load_state_dict(made.state_dict())
    assert torch.equal(built(x), made(x))


def test_embedding_is_built_from_its_spec() -> None:
    embedding = nn.Embedding(50, 24, padding_idx=3)
    made = Int8Embedding.from_embedding(embedding)
    blank = copy.deepcopy(embedding).to("meta")
    built = _build_embedding(blank, {"kind": "int8_embedding"}).to_empty(device="cpu")
    built.load_state_dict(made.state_dict())
    ids = torch.arange(50)
    assert torch.equal(built(ids), made(ids))
    assert built.padding_idx == 3
