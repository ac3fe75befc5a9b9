"""The Triton launchers of the attention and hidden losses against plain PyTorch in float64.

The formulas are written out here, maps and all: neither an op's reference nor the Gram identity is trusted.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastdistil.kernels import attention_kl, attention_mse, hidden_mse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest value. The interpreter truncates to bfloat16, where a GPU rounds.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 8e-3}
# Gradients of attention_kl are written in 16 bits, and come from a product with a matrix in 16 bits.
TOLERANCE_KL_GRAD = TOLERANCE | {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SCALES = (0.31, -0.17)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """An element of an output that nobody writes is NaN, and fails every comparison."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _heads(length: int, size: int, dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """(2, 2, length, size), as a model hands over queries or keys."""
    values = _random(2, length, 2, size, seed=seed).to(DEVICE, dtype)
    if layout == "contiguous":
        return values.transpose(1, 2).contiguous()
    if layout == "transposed":
        return values.transpose(1, 2)
    fused = torch.full((2, length, 3, 2, size), float("nan"), dtype=dtype, device=DEVICE)
    fused[:, :, 1] = values
    return fused[:, :, 1].transpose(1, 2)


def _inputs(
    sizes: tuple[int, int],
    length: int,
    layout: str = "transposed",
    student_dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    teacher_dtype = teacher_dtype or student_dtype
    kinds = [(sizes[0], student_dtype)] * 2 + [(sizes[1], teacher_dtype)] * 2
    return [_heads(length, size, dtype, layout, seed) for seed, (size, dtype) in enumerate(kinds)]


def _mask(kind: str | None, length: int) -> Tensor | None:
    """The first sequence is padding throughout; of the second, the first, some in between and the last."""
    if kind is None:
        return None
    tokens = _random(2, length, seed=9) > -0.5
    tokens[0], tokens[1, 0], tokens[1, length // 2], tokens[1, -1] = False, False, True, False
    if kind == "tokens":
        return tokens.to(DEVICE)
    pairs = (_random(2, length, length, seed=8) > -0.5) & tokens[:, :, None]
    pairs[1, :, 3 * length // 4] = False  # a key of no query
    return pairs.to(DEVICE)


def _pairs(mask: Tensor | None, q: Tensor) -> Tensor:
    """(B, 1, L, L), the query-key pairs that count."""
    if mask is None:
        return torch.ones(q.shape[0], 1, q.shape[2], q.shape[2], dtype=torch.bool, device=DEVICE)
    return (mask if mask.dim() == 3 else mask[:, :, None] & mask[:, None, :])[:, None]


def _forget_masked(tensors: list[Tensor], mask: Tensor | None) -> None:
    """NaN in the memory of what does not count."""
    if mask is None:
        return
    pairs = _pairs(mask, tensors[0])[:, 0]
    for index, tensor in enumerate(tensors):
        tensor.transpose(1, 2)[~pairs.any(1 if index % 2 else 2)] = float("nan")


def _exact(tensors: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Leaves in this dtype, with zeros for the NaN of what does not count."""
    return [tensor.detach().nan_to_num().to(dtype).requires_grad_() for tensor in tensors]


def _scores(tensors: list[Tensor], scales: tuple[float, float]) -> tuple[Tensor, Tensor]:
    student_q, student_k, teacher_q, teacher_k = tensors
    return scales[0] * (student_q @ student_k.mT), scales[1] * (teacher_q @ teacher_k.mT)


def _plain_kl(
    tensors: list[Tensor], mask: Tensor | None, scales: tuple[float, float] = SCALES
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = _pairs(mask, tensors[0])
    s, t = (x.masked_fill(~pairs, float("-inf")) for x in _scores(tensors, scales))
    rows = pairs.any(-1, keepdim=True)
    # A row without keys gets any finite scores, and is left out.
    s, t = (torch.where(rows, x, 0) for x in (s, t))
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    kl = torch.where(pairs, log_t.exp() * (log_t - log_s), 0).sum(-1)
    return tuple(torch.where(rows[..., 0], x, 0) for x in (kl, s.logsumexp(-1), t.logsumexp(-1)))


def _plain_mse(
    tensors: list[Tensor], mask: Tensor | None, weight: Tensor, scales: tuple[float, float] = SCALES
) -> Tensor:
    s, t = _scores(tensors, scales)
    return (weight * torch.where(_pairs(mask, tensors[0]), s - t, 0).square().sum(-1)).sum()


def _error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def _assert_near(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape
    assert _error(ours, exact.detach()) <= tolerance


def _kl(tensors: list[Tensor], mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """kl, both logsumexps, both gradients; and the upstream gradient of kl."""
    kl, *softmax = attention_kl.attention_kl_fwd(*tensors, mask, *SCALES)
    weight = _random(*kl.shape, seed=7).to(kl)
    grads = attention_kl.attention_kl_bwd(weight, *tensors, mask, *softmax, *SCALES)
    return [kl, *(origin * math.log(2) + total.log() for origin, total in softmax), *grads], weight


def _check_kl(tensors: list[Tensor], mask: Tensor | None) -> None:
    _forget_masked(tensors, mask)
    ours, weight = _kl(tensors, mask)
    leaves = _exact(tensors)
    rows = _plain_kl(leaves, mask)
    grads = torch.autograd.grad((weight.double() * rows[0]).sum(), leaves[:2])
    for value, exact in zip(ours[:3], rows, strict=True):
        assert value.dtype == (torch.float64 if tensors[0].dtype is torch.float64 else torch.float32)
        _assert_near(value, exact, TOLERANCE[value.dtype])
    for grad, exact, tensor in zip(ours[3:], grads, tensors, strict=False):
        assert grad.dtype == tensor.dtype
        _assert_near(grad, exact, TOLERANCE_KL_GRAD[grad.dtype])


def _mse_weight(per_row: bool, dtype: torch.dtype, length: int) -> Tensor:
    shape = (2, 2, length) if per_row else ()
    return _random(*shape, seed=7).to(DEVICE, torch.float64 if dtype is torch.float64 else torch.float32)


def _check_mse(tensors: list[Tensor], mask: Tensor | None, weight: Tensor) -> None:
    _forget_masked(tensors, mask)
    ours = attention_mse.attention_mse_fwd(*tensors, mask, weight, *SCALES, True)
    leaves = _exact(tensors)
    loss = _plain_mse(leaves, mask, weight.double())
    assert ours[0].dtype == weight.dtype
    _assert_near(ours[0], loss, TOLERANCE[ours[0].dtype])
    for grad, exact, tensor in zip(ours[1:], torch.autograd.grad(loss, leaves[:2]), tensors, strict=False):
        assert grad.dtype == (torch.float32 if tensor.dtype is torch.float16 else tensor.dtype)
        _assert_near(grad, exact, TOLERANCE[grad.dtype])


# Below the smallest tile and its alignment; below a tile and unaligned; the usual pair; two that need no
# padding; as wide as several tiles of a Gram matrix.
SIZES = [(8, 8), (26, 64), (32, 64), (64, 64), (128, 128)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mask", [None, "tokens", "pairs"])
def test_attention_kl_of_head_sizes_and_masks(sizes: tuple[int, int], mask: str | None) -> None:
    _check_kl(_inputs(sizes, 33), _mask(mask, 33))


# Within a tile; several tiles of queries and of keys, the last ones ragged.
@pytest.mark.parametrize("length", [7, 130])
@pytest.mark.parametrize("mask", [None, "tokens", "pairs"])
def test_attention_kl_of_lengths(length: int, mask: str | None) -> None:
    _check_kl(_inputs((32, 64), length), _mask(mask, length))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attention_kl_of_layouts_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    _check_kl(_inputs((26, 64), 33, layout, dtype), _mask("tokens", 33))


def test_gradients_of_attention_kl_keep_the_layout() -> None:
    tensors = _inputs((26, 64), 33)
    assert [grad.stride() for grad in _kl(tensors, None)[0][3:]] == [
        tensor.stride() for tensor in tensors[:2]
    ]


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), MIXED, ids=str)
def test_attention_kl_of_mixed_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    _check_kl(_inputs((32, 64), 33, "fused", student_dtype, teacher_dtype), None)


def test_attention_kl_of_one_token_is_zero() -> None:
    results, _ = _kl(_inputs((32, 64), 1), None)
    for result in (results[0], *results[3:]):
        assert result.abs().max() <= 1e-6


def test_attention_kl_of_a_student_that_is_the_teacher_is_zero() -> None:
    q, k, _, _ = _inputs((32, 32), 33)
    kl, *softmax = attention_kl.attention_kl_fwd(q, k, q, k, None, 0.2, 0.2)
    assert (kl == 0).all()
    for grad in attention_kl.attention_kl_bwd(torch.ones_like(kl), q, k, q, k, None, *softmax, 0.2, 0.2):
        assert (grad == 0).all()


@pytest.mark.parametrize("kind", ["tokens", "pairs"])
def test_attention_kl_of_rows_that_do_not_count_is_exactly_zero(kind: str) -> None:
    tensors, mask = _inputs((32, 64), 70), _mask(kind, 70)
    _forget_masked(tensors, mask)
    pairs = _pairs(mask, tensors[0])[:, 0]
    results, _ = _kl(tensors, mask)
    for index, result in enumerate(results):
        counts = pairs.any(1 if index == 4 else 2)
        assert (result.transpose(1, 2)[~counts] == 0).all()


def test_attention_kl_is_deterministic() -> None:
    tensors, mask = _inputs((26, 64), 70), _mask("tokens", 70)
    for first, second in zip(_kl(tensors, mask)[0], _kl(tensors, mask)[0], strict=True):
        assert torch.equal(first, second)


def _plain_and_ours_kl(tensors: list[Tensor], scales: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """Our error and that of plain PyTorch in the inputs' dtype: value, gradients of queries and of keys."""
    results = []
    for dtype in (torch.float64, tensors[0].dtype):
        leaves = _exact(tensors, dtype)
        kl = _plain_kl(leaves, None, scales)[0]
        results.append((kl, *torch.autograd.grad(kl.sum(), leaves[:2])))
    kl, *softmax = attention_kl.attention_kl_fwd(*tensors, None, *scales)
    grads = attention_kl.attention_kl_bwd(torch.ones_like(kl), *tensors, None, *softmax, *scales)
    for ours, exact, plain in zip((kl, *grads), *results, strict=True):
        yield _error(ours, exact.detach()), _error(plain.detach(), exact.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_kl_near_convergence_is_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    """Slack: twice, as the interpreter sums a product and its transpose in another order."""
    _, _, q, k = _inputs((64, 64), 70)
    tensors = [
        (x + distance * _random(*x.shape, seed=20).to(x)).to(dtype) for distance in (1e-3, 0) for x in (q, k)
    ]
    for ours, plain in _plain_and_ours_kl(tensors, (0.125, 0.125)):
        assert ours <= 2 * plain


def test_the_value_of_attention_kl_is_as_exact_as_plain_pytorch_where_scores_share_an_offset() -> None:
    tensors = _inputs((64, 64), 70)
    for q, k, offset in ((*tensors[:2], 40.0), (*tensors[2:], -20.0)):
        q[..., 0], k[..., 0] = 10.0, offset
    ours, plain = next(_plain_and_ours_kl(tensors, (0.125, 0.125)))
    assert ours <= 2 * plain


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mask", [None, "tokens"])
def test_attention_mse_of_head_sizes_and_masks(sizes: tuple[int, int], mask: str | None) -> None:
    _check_mse(_inputs(sizes, 33), _mask(mask, 33), _mse_weight(False, torch.float32, 33))


@pytest.mark.parametrize("length", [1, 7, 130])
@pytest.mark.parametrize("per_row", [True, False])
def test_attention_mse_of_lengths_and_weights(length: int, per_row: bool) -> None:
    _check_mse(_inputs((32, 64), length), None, _mse_weight(per_row, torch.float32, length))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attention_mse_of_layouts_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    for per_row in (True, False):
        tensors = _inputs((26, 64), 33, layout, dtype)
        _check_mse(tensors, _mask("tokens", 33), _mse_weight(per_row, dtype, 33))


@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), MIXED, ids=str)
def test_attention_mse_of_mixed_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    tensors = _inputs((32, 64), 33, "fused", student_dtype, teacher_dtype)
    _check_mse(tensors, None, _mse_weight(False, student_dtype, 33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_mse_of_few_heads_shares_the_positions_of_one(dtype: torch.dtype) -> None:
    tensors = [tensor[1:, :1] for tensor in _inputs((32, 64), 300, student_dtype=dtype)]
    _check_mse(tensors, _mask("tokens", 300)[1:], _mse_weight(False, dtype, 300))


def test_attention_mse_of_rows_that_do_not_count_has_no_gradient() -> None:
    tensors, mask = _inputs((26, 64), 70), _mask("tokens", 70)
    weight = _mse_weight(True, torch.float32, 70)
    weight.transpose(1, 2)[~mask] = float("nan")
    _forget_masked(tensors, mask)
    loss, *grads = attention_mse.attention_mse_fwd(*tensors, mask, weight, *SCALES, True)
    assert loss.isfinite()
    for grad in grads:
        assert (grad.transpose(1, 2)[~mask] == 0).all()
        assert grad.isfinite().all()


def test_attention_mse_without_a_gradient_gives_the_same_value() -> None:
    tensors, mask = _inputs((26, 64), 33), _mask("tokens", 33)
    weight = _mse_weight(False, torch.float32, 33)
    with_grad = attention_mse.attention_mse_fwd(*tensors, mask, weight, *SCALES, True)
    without = attention_mse.attention_mse_fwd(*tensors, mask, weight, *SCALES, False)
    assert torch.equal(with_grad[0], without[0])
    assert [grad.shape for grad in without[1:]] == [(0,), (0,)]
    assert [grad.stride() for grad in with_grad[1:]] == [tensor.stride() for tensor in tensors[:2]]


def test_attention_mse_is_deterministic() -> None:
    tensors, mask = _inputs((26, 64), 300), _mask("tokens", 300)
    weight = _mse_weight(True, torch.float32, 300)
    runs = [attention_mse.attention_mse_fwd(*tensors, mask, weight, *SCALES, True) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_mse_near_convergence(dtype: torch.dtype) -> None:
    """The three products cancel to a millionth. Slack of the gradient: 3.25 times; the interpreter's products
    are numpy's, and what they round depends on the processor: 2.91 times with OpenBLAS's kernels for Haswell
    and Zen (OPENBLAS_CORETYPE), 3.02 with those for SkylakeX."""
    _, _, q, k = _inputs((64, 64), 130)
    tensors = [
        (x + distance * _random(*x.shape, seed=20).to(x)).to(dtype) for distance in (1e-3, 0) for x in (q, k)
    ]
    one, scales = torch.ones((), device=DEVICE), (0.125, 0.125)
    results = []
    for precision in (torch.float64, dtype):
        leaves = _exact(tensors, precision)
        loss = _plain_mse(leaves, None, one.to(precision), scales)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves[:2])))
    ours = attention_mse.attention_mse_fwd(*tensors, None, one, *scales, True)
    errors = [
        [_error(x, y) for x, y in zip(values, results[0], strict=True)] for values in (ours, results[1])
    ]
    assert errors[0][0] <= (1e-5 if dtype is torch.float32 else errors[1][0])
    for our_error, plain_error in zip(errors[0][1:], errors[1][1:], strict=True):
        assert our_error <= 3.25 * plain_error


def _plain_hidden(student: Tensor, teacher: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    if normalize:
        student, teacher = (torch.nn.functional.normalize(x, dim=-1, eps=1e-8) for x in (student, teacher))
    rows = (student - teacher).square().sum(-1)
    return rows if mask is None else torch.where(mask, rows, 0)


def _rows(rows: int, width: int, dtype: torch.dtype, pitch: int, seed: int) -> Tensor:
    memory = torch.full((rows, pitch), float("nan"), dtype=dtype, device=DEVICE)
    memory[:, :width] = _random(rows, width, seed=seed)
    return memory[:, :width]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "pitch"), [(384, 384), (312, 320), (7, 9), (3000, 3000)])
def test_hidden_mse(dtype: torch.dtype, width: int, pitch: int, normalize: bool) -> None:
    student, teacher = _rows(4, width, dtype, pitch, 0), _rows(4, width, dtype, pitch, 1)
    student[2] = float("nan")
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    for scale in (_random(4, seed=2).to(DEVICE, kind), torch.tensor(0.7, dtype=kind, device=DEVICE)):
        loss, grad = hidden_mse.hidden_mse_fwd(student, teacher, mask, scale, normalize, False, True)
        leaf, exact_teacher = _exact([student, teacher])
        exact = scale.double() * _plain_hidden(leaf, exact_teacher, mask, normalize)
        assert grad.dtype == (torch.float32 if dtype is torch.float16 else dtype)
        _assert_near(loss, exact, TOLERANCE[loss.dtype])
        _assert_near(grad, torch.autograd.grad(exact.sum(), leaf)[0], TOLERANCE[grad.dtype])
        total, none = hidden_mse.hidden_mse_fwd(student, teacher, mask, scale, normalize, True, False)
        _assert_near(total, exact.sum(), TOLERANCE[loss.dtype])
        assert none.shape == (0,)


def test_hidden_mse_of_a_normalised_zero_vector() -> None:
    student, teacher = torch.zeros(1, 5, device=DEVICE), torch.ones(1, 5, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    loss, grad = hidden_mse.hidden_mse_fwd(student, teacher, None, one, True, True, True)
    (leaf,) = _exact([student])
    exact = _plain_hidden(leaf, teacher.double(), None, True).sum()
    _assert_near(loss, exact, 3e-6)
    _assert_near(grad, torch.autograd.grad(exact, leaf)[0], 3e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_hidden_mse_near_convergence_does_not_cancel(normalize: bool) -> None:
    teacher = _random(3, 300, seed=0).to(DEVICE)
    student = teacher + 1e-3 * _random(3, 300, seed=1).to(DEVICE)
    one = torch.ones((), device=DEVICE)
    loss, _ = hidden_mse.hidden_mse_fwd(student, teacher, None, one, normalize, False, False)
    _assert_near(loss, _plain_hidden(student.double(), teacher.double(), None, normalize), 1e-3)
