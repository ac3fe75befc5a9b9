"""Compile the Triton kernels for one GPU that need not be here, and print what came out as JSON.

Run as a script, in a process of its own: under TRITON_INTERPRET=1, which the op tests set, nothing compiles.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastdistil.kernels import cosine_loss, kd_loss, online_softmax, scale_grad

V = 30522
FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2
BYTES = {"bf16": 2, "fp32": 4}
GENERAL = {"power": -1, "smooth": True}


def kd_form(
    dtype: str,
    shifted: bool,
    *,
    divergence: int = FORWARD_KL,
    power: int = 1,
    smooth: bool = False,
    biased: bool = False,
    teacher: str | None = None,
    labelled: bool = True,
    with_grad: bool = True,
) -> dict[str, Any]:
    """What the launcher passes for logits of V words, by default with labels, a mask and a gradient."""
    pitch = "i32" if shifted else "i32:16"
    bias = f"*{dtype}" if biased else None
    return {
        "kernel": kd_loss.kd_loss_kernel,
        "arguments": {
            "student": f"*{dtype}",
            "teacher": f"*{teacher or dtype}",
            "student_bias": bias,
            "teacher_bias": bias,
            "labels": "*i64" if labelled else None,
            "kd_mask": "*u8" if labelled else None,
            "kd_scale": "*fp32",
            "ce_scale": "*fp32",
            "kd": "*fp32",
            "ce": "*fp32",
            "grad": f"*{dtype}",
            "temperature": "fp64",
            "jsd_beta": "fp64",
            "label_smoothing": "fp64",
            "ignore_index": "i32",
            "base_shift": "i32",
            "student_pitch": pitch,
            "teacher_pitch": pitch,
            "grad_pitch": pitch,
            "kd_scale_stride": "i32:16",
            "ce_scale_stride": "i32:16",
        },
        "constants": {
            "DIVERGENCE": divergence,
            "POWER": power,
            "HAS_LABELS": labelled,
            "HAS_MASK": labelled,
            "SMOOTH": smooth,
            "STUDENT_BIAS": biased,
            "TEACHER_BIAS": biased,
            "WITH_GRAD": with_grad,
            "TEACHER_ALIGNED": True,
            "GRAD_ALIGNED": with_grad,
            "ACC": tl.float32,
            **online_softmax.row_shape(V, BYTES[dtype], shifted),
        },
        "options": lambda hip: kd_loss.compile_options(V, divergence, biased, hip),
    }


def cosine_form(dtype: str, width: int) -> dict[str, Any]:
    return {
        "kernel": cosine_loss.cosine_loss_kernel,
        "arguments": {
            "student": f"*{dtype}",
            "teacher": f"*{dtype}",
            "mask": "*u8",
            "scale": "*fp32",
            "loss": "*fp32",
            "grad": f"*{dtype}",
            "student_pitch": "i32:16",
            "teacher_pitch": "i32:16",
            "grad_pitch": "i32:16",
            "scale_stride": "i32:16",
        },
        "constants": {
            "HAS_MASK": True,
            "WITH_GRAD": True,
            "STUDENT_ALIGNED": True,
            "TEACHER_ALIGNED": True,
            "GRAD_ALIGNED": True,
            "D": width,
            "BLOCK": triton.next_power_of_2(width),
            "ACC": tl.float32,
        },
        "options": lambda hip: cosine_loss.compile_options(width, hip),
    }


def scale_form(dtype: str) -> dict[str, Any]:
    return {
        "kernel": scale_grad.scale_grad_kernel,
        "arguments": {
            "grad": f"*{dtype}",
            "scale": "*fp32",
            "base_shift": "i32",
            "rows": "i32",
            "width": "i64",
            "pitch": "i32",
            "scale_stride": "i32:16",
        },
        "constants": {"BLOCK": scale_grad.BLOCK, "ALIGNMENT": online_softmax.ALIGNMENT, "ACC": tl.float32},
        "options": scale_grad.compile_options,
    }


# For every GPU: the two layouts of the hot form, and one form of every other kernel and divergence.
FORMS = {
    "kd_loss bf16, padded pitch": kd_form("bf16", False),
    "kd_loss bf16, contiguous": kd_form("bf16", True),
    "kd_loss fp32, padded pitch": kd_form("fp32", False),
    "kd_loss fp32, contiguous": kd_form("fp32", True),
    "kd_loss bf16, biases": kd_form("bf16", False, biased=True),
    "kd_loss bf16, JSD": kd_form("bf16", True, divergence=JSD, **GENERAL),
    "cosine_loss bf16": cosine_form("bf16", 768),
    "cosine_loss fp32": cosine_form("fp32", 768),
    "scale_grad bf16": scale_form("bf16"),
    "scale_grad fp32": scale_form("fp32"),
}
# For one GPU: what needs more registers (any temperature, label smoothing, biases, mixed dtypes) in
# each divergence, what leaves arguments out, and a smaller width.
MORE_FORMS = {
    "kd_loss bf16, any T, smoothing": kd_form("bf16", True, **GENERAL),
    "kd_loss fp32, any T, smoothing": kd_form("fp32", True, **GENERAL),
    "kd_loss bf16, reverse KL": kd_form("bf16", False, divergence=REVERSE_KL),
    "kd_loss fp32, reverse KL": kd_form("fp32", False, divergence=REVERSE_KL),
    "kd_loss bf16, reverse KL, any T": kd_form("bf16", True, divergence=REVERSE_KL, **GENERAL),
    "kd_loss fp32, JSD": kd_form("fp32", False, divergence=JSD),
    "kd_loss fp32, JSD, any T": kd_form("fp32", True, divergence=JSD, **GENERAL),
    "kd_loss bf16, biases, any T": kd_form("bf16", False, biased=True, **GENERAL),
    "kd_loss fp32, biases, any T": kd_form("fp32", False, biased=True, **GENERAL),
    "kd_loss bf16, biases, JSD": kd_form("bf16", False, biased=True, divergence=JSD, **GENERAL),
    "kd_loss bf16, fp32 teacher": kd_form("bf16", False, teacher="fp32"),
    "kd_loss bf16, no labels": kd_form("bf16", True, labelled=False),
    "kd_loss bf16, no gradient": kd_form("bf16", True, with_grad=False),
    "cosine_loss bf16, 384": cosine_form("bf16", 384),
}


def compile_form(form: dict[str, Any], target: GPUTarget) -> Any:
    signature, attributes, constants = {}, {}, dict(form["constants"])
    for index, (name, kind) in enumerate(form["arguments"].items()):
        if kind is None:
            constants[name] = None
            signature[name] = "constexpr"
            continue
        signature[name], _, divisor = kind.partition(":")
        if kind.startswith("*") or divisor:
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(form["constants"], "constexpr")
    source = ASTSource(fn=form["kernel"], signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=form["options"](target.backend == "hip"))


def report(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    """Spilled bytes (registers on AMD), registers, and how often each width of load and store occurs."""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        spills = [int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly).group(1))
        accesses = re.findall(r"\b(?:global|buffer)_((?:load|store)_\w+)", assembly)
    else:
        ptx = compiled.asm["ptx"]
        architecture = f"sm_{target.arch}{'a' if target.arch >= 90 else ''}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.ptx")
            path.write_text(ptx)
            command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={architecture}", str(path)]
            log = subprocess.run(
                [*command, "-o", str(path.with_suffix(".cubin"))], capture_output=True, text=True, check=True
            ).stderr
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
        registers = int(re.search(r"Used (\d+) registers", log).group(1))
        accesses = re.findall(r"\b((?:ld|st)\.global[.:\w]*)", ptx)
    assert spills
    return {"spills": sum(spills), "registers": registers, "accesses": Counter(accesses)}


def main(backend: str, architecture: str) -> None:
    if backend == "hip":
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture), 32)
    forms = FORMS | MORE_FORMS if architecture == "90" else FORMS
    print(json.dumps({name: report(compile_form(form, target), target) for name, form in forms.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
