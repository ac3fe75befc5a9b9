"""What the op tests share: the choice of implementation, inputs, and a reference that is not ours."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistil.ops import attention_kl, attention_mse, cosine_loss, hidden_mse, kd_loss, scale_grad
from fastdistil.ops.registry import without_autocast

REFERENCES = {
    "kd_loss_fwd": kd_loss.kd_loss_ref,
    "kd_loss_fwd_": kd_loss.kd_loss_ref_,
    "cosine_loss_fwd": cosine_loss.cosine_loss_ref,
    "hidden_mse_fwd": hidden_mse.hidden_mse_ref,
    "attention_kl_fwd": attention_kl.attention_kl_fwd_ref,
    "attention_kl_bwd": attention_kl.attention_kl_bwd_ref,
    "attention_mse_fwd": attention_mse.attention_mse_ref,
    "scale_grad_": scale_grad.scale_grad_ref_,
}
# The module of fastdistil.kernels with the Triton launcher of each op.
KERNELS = {
    "kd_loss_fwd": "kd_loss",
    "kd_loss_fwd_": "kd_loss",
    "cosine_loss_fwd": "cosine_loss",
    "hidden_mse_fwd": "hidden_mse",
    "attention_kl_fwd": "attention_kl",
    "attention_kl_bwd": "attention_kl",
    "attention_mse_fwd": "attention_mse",
    "scale_grad_": "scale_grad",
}


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Memory from torch.empty is filled with NaN, so that an element that nobody writes fails every
    comparison."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["eager", "cpp", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve the ops by the eager reference, the C++ extension and Triton (in its interpreter without a
    GPU)."""
    if request.param == "cpp":
        pytest.importorskip("fastdistil._C", reason="the C++ extension is not built", exc_type=ImportError)
        yield "cpp"
        return
    overrides: dict[str, Callable[..., Any]] = {
        name: without_autocast(reference) for name, reference in REFERENCES.items()
    }
    if request.param == "triton":
        pytest.importorskip("triton")
        overrides = {} if torch.cuda.is_available() else _launchers()
    with torch.library._scoped_library("fastdistil", "IMPL") as library:
        with warnings.catch_warnings():
            # The override is what we want; torch warns of it once.
            warnings.simplefilter("ignore")
            for name, function in overrides.items():
                library.impl(name, function, "CPU", allow_override=True)
        yield request.param


def _launchers() -> dict[str, Callable[..., Any]]:
    return {
        op: getattr(importlib.import_module(f"fastdistil.kernels.{module}"), op)
        for op, module in KERNELS.items()
    }


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the implementation under test runs: Triton on a GPU if there is one."""
    triton = (
        "implementation" in request.fixturenames and request.getfixturevalue("implementation") == "triton"
    )
    return torch.device("cuda" if triton and torch.cuda.is_available() else "cpu")


def _plain_terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    kd_mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """kd and ce of each row as torch's own functions give them, in the dtype of the inputs, differentiable by
    autograd."""
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if divergence == "forward_kl":
        kd = kl(log_q, log_p)
    elif divergence == "reverse_kl":
        kd = kl(log_p, log_q)
    else:
        log_m = (jsd_beta * log_q.exp() + (1 - jsd_beta) * log_p.exp()).log()
        kd = jsd_beta * kl(log_q, log_m) + (1 - jsd_beta) * kl(log_p, log_m)
    kd = temperature**2 * kd
    ce = torch.zeros_like(kd)
    if labels is not None:
        ce = F.cross_entropy(
            student, labels, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
        )
        kd_mask = labels != ignore_index if kd_mask is None else kd_mask
    return (kd if kd_mask is None else kd * kd_mask), ce


def _plain_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    reduction: str = "mean",
    **settings: Any,
) -> Tensor:
    """kd_loss as torch's own functions give it, in the dtype of the inputs."""
    kd, ce = _plain_terms(student, teacher, labels, **settings)
    if reduction == "none":
        return kd_weight * kd + ce_weight * ce
    if reduction == "sum":
        return kd_weight * kd.sum() + ce_weight * ce.sum()
    ce_rows = 1 if labels is None else int((labels != settings.get("ignore_index", -100)).sum())
    kd_rows = len(kd) if labels is None else ce_rows
    if settings.get("kd_mask") is not None:
        kd_rows = int(settings["kd_mask"].sum())
    return kd_weight * kd.sum() / max(kd_rows, 1) + ce_weight * ce.sum() / max(ce_rows, 1)


@pytest.fixture
def plain() -> SimpleNamespace:
    """The losses in plain PyTorch; on float64 inputs they are the reference."""
    return SimpleNamespace(terms=_plain_terms, loss=_plain_loss)


@pytest.fixture
def assert_as_accurate() -> Callable[..., None]:
    """Assert that our error is at most twice that of plain PyTorch in the same dtype, plus a slack.

    The slack is a few roundings of the largest value, to `rounded_to` (default: the dtype that `ours` has):
    what plain PyTorch escapes by luck on a small input. In float64 the reference is no more exact than we
    are.
    """

    def check(ours: Tensor, plain: Tensor, exact: Tensor, rounded_to: torch.dtype | None = None) -> None:
        assert torch.isfinite(ours).all()
        roundings = 64 if ours.dtype == torch.float64 else 4
        error = (ours.double() - exact).abs().max()
        allowed = 2 * (plain.double() - exact).abs().max()
        allowed += roundings * torch.finfo(rounded_to or ours.dtype).eps * exact.abs().max()
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"

    return check


@pytest.fixture
def make_logits(device: torch.device) -> Callable[..., Tensor]:
    """Logits (rows, V) with the spread of a trained model's, in rows that are `pitch` elements apart."""

    def make(
        rows: int, vocabulary: int, dtype: torch.dtype, *, pitch: int | None = None, seed: int = 0
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = 3 * torch.randn(rows, pitch or vocabulary, generator=generator)
        return values.to(device, dtype)[:, :vocabulary]

    return make


@pytest.fixture
def mask(device: torch.device) -> Callable[[int], Tensor]:
    """Which of so many rows count: (rows,) bool, up to six."""
    return lambda rows: torch.tensor([True, False, True, True, False, True][:rows], device=device)
