"""Packages and the optional C++ extension; everything else is in pyproject.toml.

FASTDISTIL_EXT=auto (the default) builds the extension where torch and a compiler are there and installs pure
Python where they are not; 1 fails without them, with the reason; 0 leaves the extension out.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from setuptools import Extension, find_packages, setup

SOURCES = [
    "csrc/cpu/module.cpp",
    "csrc/cpu/capability.cpp",
    "csrc/cpu/attention_kl.cpp",
    "csrc/cpu/attention_mse.cpp",
    "csrc/cpu/cosine_loss.cpp",
    "csrc/cpu/hidden_mse.cpp",
    "csrc/cpu/huge_pages.cpp",
    "csrc/cpu/kd_loss.cpp",
    "csrc/cpu/scale_grad.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_portable.cpp",
]
HEADERS = [
    "csrc/common.h",
    "csrc/cpu/attention.h",
    "csrc/cpu/attention_kl_tiles.h",
    "csrc/cpu/attention_mse_tiles.h",
    "csrc/cpu/cosine_loss_rows.h",
    "csrc/cpu/hidden_mse_rows.h",
    "csrc/cpu/kd_loss_rows.h",
    "csrc/cpu/kernel_table.h",
    "csrc/cpu/kernels.h",
    "csrc/cpu/pair_rows.h",
    "csrc/cpu/rows.h",
    "csrc/cpu/scale_grad_rows.h",
    "csrc/cpu/tiles.h",
    "csrc/cpu/vec.h",
]
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
# torch 2.10: the oldest whose stable C++ interface has parallel_for.
TORCH_TARGET_VERSION = "0x020a000000000000"


def why_not() -> str | None:
    """Why the extension cannot be built here, or None."""
    if sys.platform == "win32":
        return "the kernels use the vector extensions of GCC and Clang"
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        return f"torch cannot be imported ({error}); install it first and build with --no-build-isolation"
    compiler = get_cxx_compiler()
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler})"
    return None


def extension_arguments(required: bool) -> dict[str, Any]:
    """`ext_modules` and `cmdclass` for setup(); torch is imported once it is known to be there."""
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    class BuildOrLeaveOut(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if required:
                    raise
                reason = str(error).strip().splitlines()[0]
                message = f"fastdistil: installing without the C++ extension: it did not compile ({reason})"
                print(message, file=sys.stderr)
                self.extensions = []

    extension = Extension(
        "fastdistil._C",
        SOURCES,
        depends=HEADERS,
        language="c++",
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("FASTDISTIL_FLAGS", f'"{" ".join(FLAGS)}"'),
        ],
        # Other people's headers as system headers: their warnings are not ours.
        extra_compile_args=[*FLAGS, "-g0", *(f"-isystem{path}" for path in include_paths())],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildOrLeaveOut}}


def optional_extension() -> dict[str, Any]:
    mode = os.environ.get("FASTDISTIL_EXT", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"FASTDISTIL_EXT must be auto, 0 or 1, got {mode}")
    if mode == "0":
        return {}
    reason = why_not()
    if reason is None:
        return extension_arguments(required=mode == "1")
    if mode == "1":
        sys.exit(f"fastdistil: FASTDISTIL_EXT=1, but the C++ extension cannot be built: {reason}")
    print(f"fastdistil: installing without the C++ extension: {reason}", file=sys.stderr)
    return {}


# kernels/ has no __init__.py (see its README), so it is named here and not found.
setup(
    packages=[*find_packages(include=["fastdistil", "fastdistil.*"]), "fastdistil.kernels"],
    package_dir={"fastdistil.kernels": "kernels"},
    **optional_extension(),
)
