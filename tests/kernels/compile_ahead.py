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
from launch_forms import BYTES, FORMS, MORE_FORMS
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


def wide_loads(form: dict[str, Any], hip: bool) -> int:
    """16-byte loads in the code that reads each tile of queries and keys once; one that runs stages ahead of
    its use stands there as often."""
    dtype = next(kind for name, kind in form["arguments"].items() if name.startswith("student"))
    options = form["options"](hip)
    threads = options["num_warps"] * (64 if hip else 32)
    tiles = form["tiles"](_constants(form, hip), options["num_stages"])
    return sum(rows * width * BYTES[dtype[1:]] // (16 * threads) for rows, width in tiles)


def _constants(form: dict[str, Any], hip: bool) -> dict[str, Any]:
    return dict(form["constants"](hip) if callable(form["constants"]) else form["constants"])


def compile_form(form: dict[str, Any], target: GPUTarget) -> Any:
    hip = target.backend == "hip"
    constants = _constants(form, hip)
    signature, attributes = {}, {}
    signature |= dict.fromkeys(constants, "constexpr")
    for index, (name, kind) in enumerate(form["arguments"].items()):
        if kind is None:
            constants[name] = None
            signature[name] = "constexpr"
            continue
        signature[name], _, divisor = kind.partition(":")
        if kind.startswith("*") or divisor:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=form["kernel"], signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=form["options"](hip))


def report(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    """Spilled bytes (registers on AMD), registers, bytes of shared memory, how often each width of load and
    store occurs, and how many instructions are those of tensor cores."""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        spills = [int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly).group(1))
        accesses = re.findall(r"\b(?:global|buffer)_((?:load|store)_\w+)", assembly)
    else:
        assembly = compiled.asm["ptx"]
        architecture = f"sm_{target.arch}{'a' if target.arch >= 90 else ''}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.ptx")
            path.write_text(assembly)
            command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={architecture}", str(path)]
            log = subprocess.run(
                [*command, "-o", str(path.with_suffix(".cubin"))], capture_output=True, text=True, check=True
            ).stderr
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
        registers = int(re.search(r"Used (\d+) registers", log).group(1))
        accesses = re.findall(r"\b((?:ld|st)\.global[.:\w]*)", assembly)
        # Loads to shared memory, by their bytes: `cp.async.cg.shared.global [to], [from], 0x10, 0x10;`
        copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;\]]*\][^\]]*\],\s*(\w+)", assembly)
        accesses += [f"cp.async {int(size, 0)}" for size in copies]
    assert spills
    return {
        "spills": sum(spills),
        "registers": registers,
        "shared": compiled.metadata.shared,
        "accesses": Counter(accesses),
        "tensor_core": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)", assembly)),
    }


def main(backend: str, architecture: str) -> None:
    if backend == "hip":
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture), 32)
    forms = FORMS | MORE_FORMS if architecture == "90" else FORMS
    reports = {name: report(compile_form(form, target), target) for name, form in forms.items()}
    for name, form in forms.items():
        if "tiles" in form:
            reports[name]["wide_loads"] = wide_loads(form, backend == "hip")
    print(json.dumps(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
