"""Packages and the optional C++ and CUDA extensions; everything else is in pyproject.toml.

FASTDISTIL_EXT=auto (the default) builds the C++ extension where torch and a compiler are there and installs
pure Python where they are not; 1 fails without them, with the reason; 0 leaves the extensions out. The CUDA
extension comes with the C++ extension where torch has CUDA and nvcc is there.
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
CUDA_SOURCES = [
    "csrc/cuda/module.cpp",
    "csrc/cuda/attention_kl.cu",
    "csrc/cuda/attention_kl_bwd.cu",
    "csrc/cuda/attention_kl_fwd.cu",
]
CUDA_HEADERS = [
    "csrc/cuda/attention_kl.h",
    "csrc/cuda/build.h",
    "csrc/cuda/device.h",
    "csrc/cuda/mask.h",
    "csrc/cuda/tiles.h",
]
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fvisibility=hidden,-Wall,-Wextra"]
# What the CUDA extension is compiled for where neither TORCH_CUDA_ARCH_LIST nor a GPU says it.
CUDA_ARCHITECTURES = "8.0;9.0;10.0"
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


def why_no_cuda() -> str | None:
    """Why the CUDA extension cannot be built beside the C++ extension, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if CUDA_HOME is None or shutil.which("nvcc", path=f"{CUDA_HOME}/bin") is None:
        return "no CUDA compiler (nvcc)"
    return None


def cuda_extension() -> Extension:
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    includes = include_paths("cuda")
    named_flags = f'-DFASTDISTIL_FLAGS="{" ".join(CUDA_FLAGS)}"'
    return Extension(
        "fastdistil._C_cuda",
        CUDA_SOURCES,
        depends=CUDA_HEADERS,
        language="c++",
        library_dirs=library_paths("cuda"),
        libraries=["torch_cpu", "torch_cuda", "cudart"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": [*FLAGS, "-g0", named_flags, *(f"-isystem{path}" for path in includes)],
            "nvcc": [*CUDA_FLAGS, *(f"-isystem={path}" for path in includes)],
        },
    )


def leave_out(extension: str, reason: str) -> None:
    print(f"fastdistil: installing without the {extension} extension: {reason}", file=sys.stderr)


def extension_arguments(required: bool) -> dict[str, Any]:
    """`ext_modules` and `cmdclass` for setup(); torch is imported once it is known to be there."""
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    no_cuda = why_no_cuda()

    class BuildOrLeaveOut(BuildExtension):
        def build_extensions(self) -> None:
            # One at a time, so that the C++ extension stays where the CUDA extension fails.
            wanted, built = self.extensions, []
            for extension in wanted:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except Exception as error:
                    if required:
                        raise
                    reason = str(error).strip().splitlines()[0]
                    name = "CUDA" if extension.name.endswith("_cuda") else "C++"
                    leave_out(name, f"it did not compile ({reason})")
                    break
                built.append(extension)
            self.extensions = built
            if built and no_cuda is not None:
                leave_out("CUDA", no_cuda)

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
    extensions = [extension] if no_cuda is not None else [extension, cuda_extension()]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildOrLeaveOut}}


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
    leave_out("C++", reason)
    return {}


# kernels/ has no __init__.py (see its README), so it is named here and not found.
setup(
    packages=[*find_packages(include=["fastdistil", "fastdistil.*"]), "fastdistil.kernels"],
    package_dir={"fastdistil.kernels": "kernels"},
    **optional_extension(),
)
