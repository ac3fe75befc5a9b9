"""What this installation runs on: versions, devices, and which implementation serves each op and why."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import import_module, metadata

import torch

import fastdistil
from fastdistil.compare.machine import processor_name
from fastdistil.ops import implementations
from fastdistil.ops.matmul import native_bf16_products

Rows = Sequence[tuple[str, ...]]

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "pydantic", "numpy")


def report() -> str:
    """The text of `fastdistil doctor`."""
    sections = {
        f"fastdistil {fastdistil.__version__}": _versions(),
        "devices": _devices(),
        "C++ extension": _extension(),
        "CUDA C++ extension": _cuda_extension(),
        "ops": _ops(),
    }
    return "\n\n".join(f"{title}\n{_aligned(rows)}" for title, rows in sections.items())


def _versions() -> Rows:
    rows = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    rows.append(("compiler", _first_line("c++", "--version")))
    if torch.version.cuda:
        rows.append(("CUDA of torch", torch.version.cuda))
    return rows


def _first_line(program: str, *arguments: str) -> str:
    path = shutil.which(program)
    if path is None:
        return f"no {program} on the PATH"
    output = subprocess.run([path, *arguments], capture_output=True, text=True, check=False).stdout
    return output.partition("\n")[0]


def _devices() -> Rows:
    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = "native" if native_bf16_products(torch.device("cpu")) else "emulated, slower than float32"
    rows = [
        ("cpu", processor_name()),
        ("", f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs; torch uses {capability}"),
        ("", f"bfloat16 matrix products: {bf16}"),
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}",
            )
        )
    if not torch.cuda.is_available():
        rows.append(("cuda", "none"))
    return rows


def _extension() -> Rows:
    try:
        extension = import_module("fastdistil._C")
    except ImportError as error:
        return [
            ("not built", str(error)),
            (
                "to build",
                "FASTDISTIL_EXT=1 pip install --no-build-isolation . (setuptools, ninja, pybind11, C++)",
            ),
        ]
    rows = [("instructions", extension.cpu_capability())]
    rows += [(key.replace("_", " "), str(value)) for key, value in extension.build_info().items()]
    return rows


def _cuda_extension() -> Rows:
    if torch.version.cuda is None:
        return [("not built", "this torch is built without CUDA")]
    try:
        extension = import_module("fastdistil._C_cuda")
    except ImportError as error:
        return [("not built", str(error))]
    rows = [("state", "compiled, not yet run: Triton is always chosen over it")]
    return [*rows, *((key.replace("_", " "), str(value)) for key, value in extension.build_info().items())]


def _ops() -> Rows:
    return [
        (row.op, row.device, row.implementation, f"because {row.reason}" if row.reason else "")
        for row in implementations()
    ]


def _aligned(rows: Rows) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
