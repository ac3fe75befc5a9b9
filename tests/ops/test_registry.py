"""Which implementation serves an op, as `fastdistil doctor` prints it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastdistil.ops import implementations

# Ops with kernels of their own, and ops that PyTorch's products and other ops make up.
KERNELS = {
    "attention_kl_bwd",
    "attention_kl_fwd",
    "attention_mse_fwd",
    "cosine_loss_fwd",
    "hidden_mse_fwd",
    "kd_loss_fwd",
    "kd_loss_fwd_",
    "scale_grad_",
}
COMPOSED = {
    "advise_huge_pages_",
    "attention_mse_pairs_fwd",
    "attention_mse_rows",
    "linear_kd_loss_fwd",
    "project_hidden",
}
OPS = KERNELS | COMPOSED


def test_every_op_has_one_implementation_for_each_device() -> None:
    rows = implementations()
    assert sorted((row.op, row.device) for row in rows) == sorted(
        (op, device) for op in OPS for device in ("cpu", "cuda")
    )


def test_the_extension_serves_the_cpu_where_it_is_built() -> None:
    pytest.importorskip("fastdistil._C", reason="the C++ extension is not built", exc_type=ImportError)
    served = {row.op: row.implementation for row in implementations() if row.device == "cpu"}
    assert all(served[op].startswith("C++ (") for op in KERNELS)


def test_without_the_extension_eager_serves_and_says_why() -> None:
    # None in sys.modules makes the import fail as a missing or broken extension does.
    script = """
import sys; sys.modules["fastdistil._C"] = None
import torch, fastdistil
from fastdistil.ops import implementations
for op in ("kd_loss_fwd", "linear_kd_loss_fwd"):
    print(*{(row.implementation, row.reason) for row in implementations() if row[:2] == (op, "cpu")})
print(float(fastdistil.kd_loss(torch.eye(3), torch.eye(3))))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *rows, value = run.stdout.splitlines()
    assert len(rows) == 2
    assert all("eager PyTorch" in row for row in rows)
    assert all("the C++ extension is not usable: " in row for row in rows)
    assert abs(float(value)) < 1e-6
