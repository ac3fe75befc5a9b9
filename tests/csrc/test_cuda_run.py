"""The CUDA C++ kernels compute the KL divergence of attention and its gradient.

On a GPU they run as built into `fastdistil._C_cuda`. Everywhere else the same sources run on an emulated GPU
(tests/csrc/emulation): index arithmetic, masks, barriers and numbers are those of the kernels, PTX is not.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastdistil  # noqa: F401 - defines torch.ops.fastdistil

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
FLOAT, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
SAME_DTYPES = [(dtype, dtype) for dtype in (BFLOAT16, FLOAT16, FLOAT)]


class Target(NamedTuple):
    ops: Any
    device: str


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Target:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler, c++, on the PATH")
    torch_folder = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("emulation") / "attention_kl.so"
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(torch_folder / "include"), str(TESTS / "emulation" / "attention_kl.cpp")]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    torch.ops.load_library(library)
    return Target(torch.ops.fastdistil_emulated, "cpu")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("fastdistil._C_cuda", reason="the CUDA extension is not built", exc_type=ImportError)
    return Target(torch.ops.fastdistil_cuda, "cuda")


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


class Case(SimpleNamespace):
    """Inputs of the ops; `student_q` to `teacher_k` hold NaN in rows that do not count."""

    def forward(self, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        return target.ops.attention_kl_fwd(*self.tensors, self.mask, *self.scales)

    def backward(self, target: Target, *softmax: Tensor) -> tuple[Tensor, Tensor]:
        return target.ops.attention_kl_bwd(self.weight, *self.tensors, self.mask, *softmax, *self.scales)

    def pairs(self) -> Tensor:
        batch, _, length, _ = self.tensors[0].shape
        if self.mask is None:
            return torch.ones(batch, 1, length, length, dtype=torch.bool, device=self.weight.device)
        pairs = self.mask if self.mask.dim() == 3 else self.mask[:, :, None] & self.mask[:, None, :]
        return pairs[:, None]

    def exact(self) -> SimpleNamespace:
        """Everything in float64, written as the definition is."""
        pairs = self.pairs()
        counts = pairs.any(-1)
        student_q, student_k, teacher_q, teacher_k = (t.double().nan_to_num(nan=0.0) for t in self.tensors)
        student_q.requires_grad_()
        student_k.requires_grad_()

        def lse_and_log(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            scores = (scale * q @ k.transpose(2, 3)).masked_fill(~pairs, -1e4)
            return scores.logsumexp(-1) * counts, scores.log_softmax(-1)

        student_lse, log_s = lse_and_log(student_q, student_k, self.scales[0])
        teacher_lse, log_t = lse_and_log(teacher_q, teacher_k, self.scales[1])
        kl = (log_t.exp() * (log_t - log_s) * pairs).sum(-1)
        grad_q, grad_k = torch.autograd.grad((self.weight.double() * kl).sum(), (student_q, student_k))
        return SimpleNamespace(
            kl=kl.detach(), student_lse=student_lse.detach(), teacher_lse=teacher_lse, grads=(grad_q, grad_k)
        )


def make_case(
    target: Target,
    shape: tuple[int, int, int, int, int],  # B, H, L, ds, dt
    dtypes: tuple[torch.dtype, torch.dtype] = (BFLOAT16, BFLOAT16),
    mask: str | None = None,
    *,
    fused: bool = False,
    scale: float | None = None,
) -> Case:
    """Queries and keys as models give them: views of (B, L, H * d), of one (B, L, 3 * H * d) if `fused`."""
    batch, heads, length, *sizes = shape
    generator = torch.Generator().manual_seed(length)

    def states(size: int, dtype: torch.dtype, part: int) -> Tensor:
        parts = 3 if fused else 1
        memory = torch.randn(batch, length, parts, heads, size, generator=generator)
        return memory.to(target.device, dtype)[:, :, part if fused else 0].transpose(1, 2)

    tensors = [
        states(size, dtype, part) for size, dtype in zip(sizes, dtypes, strict=True) for part in (0, 1)
    ]
    case = Case(tensors=tensors, mask=_make_mask(mask, batch, length, generator, target.device))
    if case.mask is not None:
        pairs = case.pairs()[:, 0]
        for index, tensor in enumerate(tensors):
            tensor.transpose(1, 2)[~pairs.any(1 if index % 2 else 2)] = float("nan")
    # Twice the usual scale, so that the distributions are not flat.
    case.scales = [2 * size**-0.5 if scale is None else scale for size in sizes]
    weight = torch.randn(batch, heads, length, generator=generator) / (batch * heads * length)
    case.weight = weight.to(target.device)
    if case.mask is not None:  # what the loss does not use may have any upstream gradient
        case.weight.masked_fill_(~case.pairs().any(-1), float("nan"))
    return case


def _make_mask(
    kind: str | None, batch: int, length: int, generator: torch.Generator, device: str
) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "padding":
        mask[0] = False  # a sequence that is wholly padded
        mask[-1, length // 2 + 1 :] = False
    elif kind == "holes":
        mask = torch.rand(batch, length, generator=generator) < 0.5
        mask[-1, 0] = True
    elif kind == "window":
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance.abs() <= 3).repeat(batch, 1, 1)
    elif kind == "pairs":
        mask = torch.rand(batch, length, length, generator=generator) < 0.3
        mask[:, length // 2] = False  # a query without keys
        mask[:, :, length // 3] = False  # a key without queries
    return mask.to(device)


def assert_near(ours: Tensor, exact: Tensor, relative: float, absolute: float, name: str) -> None:
    """Within `relative` times the largest value, and `absolute`."""
    assert torch.isfinite(ours).all(), name
    error = (ours.double() - exact).abs().max().item()
    allowed = relative * exact.abs().max().item() + absolute
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def check(case: Case, target: Target) -> None:
    exact = case.exact()
    kl, *softmax = case.forward(target)
    student_lse, teacher_lse = (math.log(2) * maximum + total.log() for maximum, total in softmax)
    # The divergence is a difference of two logsumexps: its rounding is theirs.
    largest = max(exact.student_lse.abs().max().item(), exact.teacher_lse.abs().max().item(), 1.0)
    eps = torch.finfo(FLOAT).eps
    assert_near(kl, exact.kl, 0, 16 * eps * largest, "kl")
    assert_near(student_lse, exact.student_lse, 0, 8 * eps * largest, "student_lse")
    assert_near(teacher_lse, exact.teacher_lse, 0, 8 * eps * largest, "teacher_lse")
    counts = case.pairs().any(-1).expand_as(kl)
    assert torch.all(kl[~counts] == 0)

    grads = case.backward(target, *softmax)
    # Probabilities that are equal exactly, such as those of a single key, differ by their rounding.
    largest_state = max(states.float().nan_to_num().abs().max().item() for states in case.tensors[:2])
    absolute = 4 * eps * case.scales[0] * case.weight.nan_to_num().abs().max().item() * largest_state
    names = ("grad_q", "grad_k")
    for ours, reference, states, name in zip(grads, exact.grads, case.tensors[:2], names, strict=True):
        assert ours.dtype == states.dtype
        assert ours.stride() == torch.empty_like(states).stride()
        # Two roundings to the dtype, of the difference of the probabilities and of the result, and the
        # rounding of scores in float32, which the exponential multiplies by their size.
        relative = torch.finfo(states.dtype).eps + (16 + 2 * largest) * eps
        assert_near(ours, reference, relative, absolute, name)


# 1 and 2: less than a fragment; 64: one tile; 65: a tile and a row; 131: three tiles, the last of 3.
@pytest.mark.parametrize("length", [1, 2, 64, 65, 131])
@pytest.mark.parametrize("dtypes", SAME_DTYPES, ids=str)
def test_lengths(length: int, dtypes: tuple, target: Target) -> None:
    check(make_case(target, (1, 2, length, 32, 64), dtypes), target)


# 26 is no multiple of 4 and 7 is odd: copies of 4 bytes, and element by element. From 65 on the wide kernels.
@pytest.mark.parametrize("sizes", [(8, 64), (26, 40), (7, 1), (64, 128), (65, 12), (128, 128)], ids=str)
@pytest.mark.parametrize("dtypes", SAME_DTYPES, ids=str)
def test_head_sizes(sizes: tuple[int, int], dtypes: tuple, target: Target) -> None:
    check(make_case(target, (2, 1, 67, *sizes), dtypes), target)


@pytest.mark.parametrize("mask", ["padding", "holes", "window", "pairs"])
@pytest.mark.parametrize("dtypes", SAME_DTYPES, ids=str)
def test_masks_and_rows_that_hold_nan(mask: str, dtypes: tuple, target: Target) -> None:
    check(make_case(target, (3, 2, 90, 26, 32), dtypes, mask), target)


@pytest.mark.parametrize("dtypes", [(BFLOAT16, FLOAT), (FLOAT, BFLOAT16), (FLOAT16, BFLOAT16)], ids=str)
def test_student_and_teacher_of_different_dtypes(dtypes: tuple, target: Target) -> None:
    check(make_case(target, (2, 2, 66, 26, 64), dtypes, "holes"), target)


# 24 heads' elements of 3 parts: strides in which only 8 or 2 bytes divide every row.
@pytest.mark.parametrize("sizes", [(32, 64), (12, 20), (9, 11)], ids=str)
@pytest.mark.parametrize("dtypes", SAME_DTYPES, ids=str)
def test_slices_of_a_fused_projection(sizes: tuple[int, int], dtypes: tuple, target: Target) -> None:
    check(make_case(target, (2, 3, 66, *sizes), dtypes, "padding", fused=True), target)


@pytest.mark.parametrize("dtypes", SAME_DTYPES, ids=str)
def test_maxima_that_rise_in_every_tile(dtypes: tuple, target: Target) -> None:
    case = make_case(target, (1, 1, 200, 16, 16), dtypes, scale=1.0)
    rising = torch.arange(200, device=target.device).div(32, rounding_mode="floor")
    for states in (case.tensors[1], case.tensors[3]):
        states[0, 0, :, 0] = rising.to(states.dtype)
    for states in (case.tensors[0], case.tensors[2]):
        states[0, 0, :, 0] = 16.0
    check(case, target)


def test_float16_keeps_gradients_of_small_weights(target: Target) -> None:
    case = make_case(target, (1, 1, 80, 16, 16), (FLOAT16, FLOAT16), scale=16.0)
    # Large queries and small keys: grad_k is well above the smallest float16, the weights are far below.
    case.tensors[0].clamp_(-2, 2).mul_(3e4)
    case.tensors[1].mul_(1e-6)
    case.scales[1] = 0.5
    case.weight.fill_(3e-10)
    _, grad_k = case.backward(target, *case.forward(target)[1:])
    smallest = torch.finfo(FLOAT16).smallest_normal * torch.finfo(FLOAT16).eps
    assert_near(grad_k, case.exact().grads[1], 1e-3, smallest, "grad_k")


@pytest.mark.parametrize("dtypes", SAME_DTYPES, ids=str)
def test_same_bits_every_time(dtypes: tuple, target: Target) -> None:
    case = make_case(target, (2, 2, 131, 26, 64), dtypes, "holes")
    results = []
    for _ in range(3):
        rows = case.forward(target)
        results.append([*rows, *case.backward(target, *rows[1:])])
    for again in results[1:]:
        assert all(torch.equal(first, other) for first, other in zip(results[0], again, strict=True))


@pytest.mark.parametrize("op", ["attention_kl_fwd", "attention_kl_bwd"])
def test_schemas_are_those_of_the_ops(op: str, target: Target) -> None:
    ours, public = getattr(target.ops, op), getattr(torch.ops.fastdistil, op)
    assert str(ours.default._schema).partition("::")[2] == str(public.default._schema).partition("::")[2]


def test_no_rows(target: Target) -> None:
    case = make_case(target, (0, 2, 8, 16, 16))
    rows = case.forward(target)
    assert [row.shape for row in rows] == [(0, 2, 8), (2, 0, 2, 8), (2, 0, 2, 8)]
    assert [grad.shape for grad in case.backward(target, *rows[1:])] == [(0, 2, 8, 16)] * 2


@pytest.mark.parametrize("dtypes", SAME_DTYPES, ids=str)
def test_one_tile_at_a_time_where_shared_memory_is_short(
    dtypes: tuple, emulated: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDISTIL_EMULATED_SHARED_MEMORY", str(99 * 1024))
    check(make_case(emulated, (2, 1, 131, 120, 128), dtypes, "holes"), emulated)


def test_too_little_shared_memory_is_refused_by_size(
    emulated: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDISTIL_EMULATED_SHARED_MEMORY", str(48 * 1024))
    with pytest.raises(RuntimeError, match="head sizes of 128 and 128 take 69632 bytes of shared memory"):
        make_case(emulated, (1, 1, 8, 128, 128)).forward(emulated)


@pytest.mark.parametrize(
    ("sizes", "dtypes", "message"),
    [
        (
            (129, 64),
            SAME_DTYPES[0],
            "student_q must have a head size of at most 128 .*, got 129",
        ),
        (
            (64, 256),
            SAME_DTYPES[0],
            "teacher_q must have a head size of at most 128 .*, got 256",
        ),
        (
            (8, 8),
            (torch.float64, FLOAT),
            "student_q must be float32, bfloat16 or float16 .*, got Double",
        ),
    ],
    ids=["student", "teacher", "float64"],
)
def test_what_the_kernels_cannot_do_is_refused(
    sizes: tuple, dtypes: tuple, message: str, target: Target
) -> None:
    with pytest.raises(RuntimeError, match=message):
        make_case(target, (1, 1, 4, *sizes), dtypes).forward(target)


def test_a_mask_of_the_wrong_shape_is_refused(target: Target) -> None:
    case = make_case(target, (2, 1, 4, 8, 8))
    case.mask = torch.ones(2, 5, dtype=torch.bool, device=target.device)
    with pytest.raises(RuntimeError, match=r"mask must have shape \(B, L\) or \(B, L, L\)"):
        case.forward(target)
