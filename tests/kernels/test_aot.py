"""Every kernel compiles for GPUs that are not here, without spills and with 16-byte loads.

A spill, or two-byte loads because no alignment could be proven (V = 30522 is no multiple of 8), costs a
kernel that memory bounds more than anything else that a machine without a GPU can see. The attention kernels
multiply on tensor cores where the inputs are bfloat16, and fit the shared memory of a small GPU.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_ahead.py")
ROOT = Path(__file__).resolve().parents[2]
# Bytes that a program may have: of compute capability 8.6, 8.9 and 12.0, and of gfx942.
SHARED_MEMORY = {"cuda": 99 << 10, "hip": 64 << 10}
TARGETS = [("cuda", "80"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942")]


def _compile(backend: str, architecture: str, cache: Path) -> dict[str, dict[str, Any]]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), backend, architecture], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def _narrow_loads(form: str, backend: str, accesses: Counter[str], least: int) -> list[str]:
    """What is wrong with the loads of a form's main loop."""
    wide = "load_dwordx4" if backend == "hip" else "ld.global.v4.b32"
    if form.startswith("attention"):
        # Tiles go to registers or, ahead of their use, to shared memory.
        found = sum(accesses[name] for name in (wide, "ld.global.v2.b64", "cp.async 16"))
        return [] if found >= least else [f"{found} loads of 16 bytes, {least} expected"]
    if not form.startswith("kd_loss"):
        # One load a tensor, or two of fp32; scale_grad has a masked form too, for both ends of a row.
        tensors = 2 if form.startswith(("cosine_loss", "hidden_mse")) else 1
        return [] if accesses[wide] >= tensors else [f"{wide} occurs {accesses[wide]} times"]
    # Two tensors, two passes; in each pass, the load before the loop and the one that runs ahead in it.
    if backend == "hip":
        return [] if accesses[wide] >= 8 else [f"{wide} occurs {accesses[wide]} times"]
    whole_blocks = {name: count for name, count in accesses.items() if "evict" in name}
    faults = [f"{name} in the main loop" for name in whole_blocks if not name.endswith(".v4.b32")]
    loads = {
        policy: sum(count for name, count in whole_blocks.items() if policy in name)
        for policy in ("evict_last", "evict_first")
    }
    return faults + [f"{count} loads with {policy}" for policy, count in loads.items() if count < 4]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("backend", "architecture"), TARGETS, ids="-".join)
def test_kernels_compile_without_spills_and_with_wide_loads(
    backend: str, architecture: str, tmp_path: Path
) -> None:
    faults = []
    for form, report in _compile(backend, architecture, tmp_path).items():
        accesses = Counter(report["accesses"])
        if report["spills"]:
            faults.append(f"{form}: {report['spills']} spilled at {report['registers']} registers")
        if report["shared"] > SHARED_MEMORY[backend]:
            faults.append(f"{form}: {report['shared']} bytes of shared memory")
        if form.startswith("attention") and "bf16" in form and report["tensor_core"] == 0:
            faults.append(f"{form}: no instruction of tensor cores")
        faults += [
            f"{form}: {fault}"
            for fault in _narrow_loads(form, backend, accesses, report.get("wide_loads", 0))
        ]
    assert faults == []
