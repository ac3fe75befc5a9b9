"""The Triton launchers against float64, in the layouts and dtypes that choose between forms of a kernel."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastdistil.kernels import cosine_loss, kd_loss, online_softmax, scale_grad
from fastdistil.ops.cosine_loss import cosine_loss_ref
from fastdistil.ops.kd_loss import kd_loss_ref, kd_loss_ref_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest value. The interpreter truncates to bfloat16, where a GPU rounds.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 8e-3}
# No whole block; whole blocks of 128 threads and an odd rest; of 512 threads, with a rest that is one block
# or, from a shifted base, two.
VOCABULARIES = [5, 1027, 2 * 4096 + 4093]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """An element of an output that nobody writes is NaN, and fails every comparison."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def _rows(rows: int, width: int, dtype: torch.dtype, *, pitch: int, offset: int = 0, seed: int) -> Tensor:
    """(rows, width) in memory of NaN, rows `pitch` elements apart, the first `offset` from the start."""
    memory = torch.full((offset + rows * pitch,), float("nan"), dtype=dtype, device=DEVICE)
    view = memory[offset:].view(rows, pitch)[:, :width]
    view.copy_(3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))
    return view


def _double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def _assert_near(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    scale = exact.abs().max().clamp(min=1e-30)
    error = ((ours.double() - exact).abs().max() / scale).item()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


def _kd_arguments(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels with one to ignore, a mask with one row out of both terms, scales a row."""
    labels = torch.arange(rows, device=DEVICE) % vocabulary
    labels[-1], labels[1] = vocabulary - 1, -100
    kd_mask = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    kd_mask[1] = kd_mask[-1] = False
    generator = torch.Generator().manual_seed(3)
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    kd_scale, ce_scale = torch.rand(2, rows, generator=generator, dtype=kind).to(DEVICE)
    return labels, kd_mask, kd_scale, ce_scale


def _check_kd(
    student: Tensor, teacher: Tensor, temperature: float, divergence: int, smoothing: float
) -> None:
    inputs = (student, teacher, *_kd_arguments(*student.shape, student.dtype))
    settings = (temperature, divergence, 0.3, -100, smoothing)
    results = kd_loss.kd_loss_fwd(*inputs, *settings, False, True)
    for ours, exact in zip(results, kd_loss_ref(*_double(*inputs), *settings, False, True), strict=True):
        _assert_near(ours, exact, ours.dtype)
    assert results[3].dtype == (torch.float32 if student.dtype is torch.float16 else student.dtype)
    assert (results[3][1] == 0).all()


@pytest.mark.parametrize("divergence", [0, 1, 2], ids=["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kd_loss_in_every_divergence_and_form_of_the_temperature(
    divergence: int, temperature: float, dtype: torch.dtype
) -> None:
    student = _rows(3, 301, dtype, pitch=301, seed=0)
    teacher = _rows(3, 301, dtype, pitch=301, seed=1)
    _check_kd(student, teacher, temperature, divergence, 0.1)


# Pitch of the student and the teacher beyond V rounded up to 8 (None: contiguous), elements before the first.
@pytest.mark.parametrize(
    ("student_pad", "teacher_pad", "offset"),
    [(0, 0, 0), (None, None, 0), (None, None, 3), (0, None, 0), (None, 8, 1)],
    ids=["aligned", "contiguous", "offset", "teacher-out-of-step", "offset-out-of-step"],
)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_kd_loss_in_every_layout(
    vocabulary: int, student_pad: int | None, teacher_pad: int | None, offset: int
) -> None:
    up = -(-vocabulary // 8) * 8
    student_pitch = vocabulary if student_pad is None else up + student_pad
    teacher_pitch = vocabulary if teacher_pad is None else up + teacher_pad
    student = _rows(3, vocabulary, torch.float32, pitch=student_pitch, offset=offset, seed=0)
    teacher = _rows(3, vocabulary, torch.float32, pitch=teacher_pitch, offset=offset, seed=1)
    _check_kd(student, teacher, 2.0, 0, 0.0)


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_kd_loss_of_mixed_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student = _rows(3, 1027, student_dtype, pitch=1027, seed=0)
    teacher = _rows(3, 1027, teacher_dtype, pitch=1027, seed=1)
    _check_kd(student, teacher, 2.0, 0, 0.0)


def test_kd_loss_of_large_logits_is_as_exact_as_of_small_ones() -> None:
    student = _rows(3, 1027, torch.float32, pitch=1027, seed=0)
    teacher = _rows(3, 1027, torch.float32, pitch=1027, seed=1)
    student += 1000
    teacher -= 1000
    _check_kd(student, teacher, 2.0, 0, 0.0)


@pytest.mark.parametrize("divergence", [0, 1, 2], ids=["forward_kl", "reverse_kl", "jsd"])
def test_kd_loss_of_words_that_neither_side_allows(divergence: int) -> None:
    """-inf at the end, as in a padded vocabulary, and in the first, whole block."""
    student = _rows(3, 1100, torch.float32, pitch=1104, seed=0)
    teacher = _rows(3, 1100, torch.float32, pitch=1104, seed=1)
    for logits in (student, teacher):
        logits[:, 1090:] = logits[:, 10:20] = float("-inf")
    labels = torch.tensor([0, 5, 30], device=DEVICE)
    one = torch.ones((), device=DEVICE)
    settings = (2.0, divergence, 0.5, -100, 0.0)
    loss, _, _, grad = kd_loss.kd_loss_fwd(student, teacher, labels, None, one, one, *settings, True, True)
    exact = kd_loss_ref(*_double(student, teacher, labels, None, one, one), *settings, True, True)
    _assert_near(loss, exact[0], torch.float32)
    _assert_near(grad, exact[3], torch.float32)
    assert (grad[:, 1090:] == 0).all()


def test_kd_loss_does_not_read_the_teacher_of_a_row_without_kd() -> None:
    student, teacher = torch.randn(2, 2, 40, device=DEVICE)
    teacher[1] = float("nan")
    kd_mask = torch.tensor([True, False], device=DEVICE)
    labels = torch.tensor([3, 4], device=DEVICE)
    one = torch.ones((), device=DEVICE)
    results = kd_loss.kd_loss_fwd(
        student, teacher, labels, kd_mask, one, one, 2.0, 0, 0.5, -100, 0.0, False, True
    )
    assert all(torch.isfinite(result).all() for result in results)
    assert results[1][1] == 0


def test_a_label_outside_the_vocabulary_makes_the_loss_nan() -> None:
    student, teacher = torch.randn(2, 2, 40, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    labels = torch.tensor([3, 40], device=DEVICE)
    _, _, ce, grad = kd_loss.kd_loss_fwd(
        student, teacher, labels, None, one, one, 2.0, 0, 0.5, -100, 0.0, True, True
    )
    assert torch.isnan(ce).tolist() == [False, True]
    assert torch.isfinite(grad).all()


def test_kd_loss_without_a_gradient_gives_the_same_value() -> None:
    student, teacher = torch.randn(2, 3, 300, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    for divergence in (0, 1, 2):
        values = [
            kd_loss.kd_loss_fwd(
                student, teacher, None, None, one, one, 2.0, divergence, 0.5, -100, 0.0, True, with_grad
            )
            for with_grad in (True, False)
        ]
        assert torch.equal(values[0][0], values[1][0])
        assert values[1][3].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", ["student", "teacher", "both"])
def test_kd_loss_in_place_adds_biases_and_leaves_the_padding(biases: str, dtype: torch.dtype) -> None:
    vocabulary, pitch = 1027, 1040
    student = _rows(3, vocabulary, dtype, pitch=pitch, seed=0)
    teacher = _rows(3, vocabulary, dtype, pitch=pitch, seed=1)
    bias = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    student_bias = bias[0] if biases in ("student", "both") else None
    teacher_bias = bias[1] if biases in ("teacher", "both") else None
    rest = _kd_arguments(3, vocabulary, dtype)
    settings = (1.7, 0, 0.5, -100, 0.1)
    exact_grad = student.double()
    exact = kd_loss_ref_(exact_grad, *_double(teacher, student_bias, teacher_bias, *rest), *settings, True)
    ours = kd_loss.kd_loss_fwd_(student, teacher, student_bias, teacher_bias, *rest, *settings, True)
    for value, reference in zip(ours, exact, strict=True):
        _assert_near(value, reference, torch.float32)
    _assert_near(student, exact_grad, dtype)
    padding = student.as_strided((3, pitch - vocabulary), (pitch, 1), student.storage_offset() + vocabulary)
    assert torch.isnan(padding).all()


def test_a_row_is_cut_without_gaps() -> None:
    for vocabulary in (1, 7, 8, 9, 1031, 8192, 30522, 50265, 256000):
        for size in (2, 4, 8):
            for shifted in (False, True):
                cut = online_softmax.row_shape(vocabulary, size, shifted)
                body = cut["BLOCKS"] * cut["BLOCK"]
                # Whole blocks lie inside the row at the smallest and at the largest shift.
                assert cut["HEAD"] + body <= max(vocabulary, cut["HEAD"])
                assert body + cut["REST"] == vocabulary + (7 if shifted else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "pitch"), [(384, 384), (312, 320), (7, 9)])
def test_cosine_loss(dtype: torch.dtype, width: int, pitch: int) -> None:
    student = _rows(4, width, dtype, pitch=pitch, seed=0)
    teacher = _rows(4, width, dtype, pitch=pitch, seed=1)
    student[2] = float("nan")
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    for scale in (torch.rand(4, dtype=kind, device=DEVICE), torch.tensor(0.7, dtype=kind, device=DEVICE)):
        loss, grad = cosine_loss.cosine_loss_fwd(student, teacher, mask, scale, False, True)
        exact = cosine_loss_ref(*_double(student, teacher, mask, scale), False, True)
        _assert_near(loss, exact[0], loss.dtype)
        _assert_near(grad, exact[1], grad.dtype)


def test_cosine_loss_of_a_zero_vector() -> None:
    student, teacher = torch.zeros(1, 5, device=DEVICE), torch.ones(1, 5, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    loss, grad = cosine_loss.cosine_loss_fwd(student, teacher, None, one, True, True)
    exact = cosine_loss_ref(*_double(student, teacher), None, one.double(), True, True)
    assert loss == 1
    _assert_near(grad, exact[1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(("width", "offset"), [(2 * 2048 + 5, 3), (10, 0)])
def test_scale_grad_touches_the_gradient_alone(
    width: int, offset: int, per_row: bool, dtype: torch.dtype
) -> None:
    memory = torch.randn(offset + 3 * width + 2, device=DEVICE).to(dtype)
    before = memory.clone()
    grad = memory[offset:-2].view(3, width)
    scale = torch.tensor([2.0, 1.0, 0.3], device=DEVICE) if per_row else torch.tensor(0.3, device=DEVICE)
    exact = grad.double() * (scale.double().unsqueeze(-1) if per_row else scale.double())
    scale_grad.scale_grad_(grad, scale)
    _assert_near(grad, exact, dtype)
    assert torch.equal(memory[:offset], before[:offset])
    assert torch.equal(memory[-2:], before[-2:])
    if per_row:
        assert torch.equal(grad[1], before[offset:-2].view(3, width)[1])


def test_scale_grad_of_rows_with_a_pitch_leaves_the_padding() -> None:
    memory = torch.ones(3, 16, device=DEVICE)
    scale_grad.scale_grad_(memory[:, :10], torch.tensor(2.0, device=DEVICE))
    assert (memory[:, :10] == 2).all()
    assert (memory[:, 10:] == 1).all()
