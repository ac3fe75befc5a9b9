"""The CUDA C++ files compile for GPUs that are not here: without warnings or spills, with tensor cores.

One pass of the front end makes PTX, which is then assembled for each architecture.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
FILES = sorted(path.name for path in CUDA.glob("*.cu"))
KERNELS = {"attention_kl.cu": 0, "attention_kl_fwd.cu": 3, "attention_kl_bwd.cu": 12}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler, nvcc, on the PATH"),
]


class Compiled(NamedTuple):
    log: str
    ptx: str


@pytest.fixture(scope="module", params=FILES)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Compiled]:
    folder = tmp_path_factory.mktemp("nvcc")
    source = CUDA / request.param
    command = ["nvcc", "-std=c++17", "-O3", "-c", str(source), "-o", str(folder / "object.o")]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-isystem", str(Path(torch.__file__).parent / "include")]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_80,code={architecture}"]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC"]
    command += ["-Xptxas", "-v", "--keep", "--keep-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, Compiled(done.stdout + done.stderr, (folder / f"{source.stem}.ptx").read_text())


def test_every_file_and_kernel_is_checked(compiled: tuple[str, Compiled]) -> None:
    name, result = compiled
    assert set(FILES) == set(KERNELS)
    assert result.ptx.count(".entry") == KERNELS[name]


def test_without_warnings(compiled: tuple[str, Compiled]) -> None:
    assert "warning" not in compiled[1].log.lower()


def test_without_spills(compiled: tuple[str, Compiled]) -> None:
    name, result = compiled
    functions = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", result.log)
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.log
    )
    assert len(functions) == len(spills) == KERNELS[name] * len(ARCHITECTURES)
    assert {architecture for _, architecture in functions} <= set(ARCHITECTURES)
    for function, numbers in zip(functions, spills, strict=True):
        assert numbers == ("0", "0", "0"), f"{function}: stack frame, spill stores and loads {numbers}"


def test_16_bit_kernels_use_tensor_cores_and_all_copy_16_bytes_at_a_time(
    compiled: tuple[str, Compiled],
) -> None:
    for entry in compiled[1].ptx.split(".entry")[1:]:
        name = entry.partition("(")[0].strip()
        types = {"bfloat16": "bf16", "half": "f16"}
        expected = next((f"f32.{short}.{short}.f32" for long, short in types.items() if long in name), None)
        products = set(re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.(\S+)", entry))
        assert products == ({expected} if expected else set()), name
        assert ("ldmatrix.sync.aligned.m8n8.x4.shared" in entry) == bool(expected), name
        assert "cp.async.cg.shared.global" in entry, name
        assert "ld.local" not in entry, name
        assert "st.local" not in entry, name
