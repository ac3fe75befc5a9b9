"""The instruction set is chosen at run time, can be lowered by the environment, and changes no result."""

import json
import os
import subprocess
import sys

import pytest

extension = pytest.importorskip(
    "fastdistil._C", reason="the C++ extension is not built", exc_type=ImportError
)

WIDEST_FIRST = ["avx512", "avx2", "portable"]
# 1031 logits: four whole blocks and a tail that is no whole vector of any instruction set.
SCRIPT = """
import json, torch, fastdistil
from fastdistil import _C
generator = torch.Generator().manual_seed(0)
out = {"capability": _C.cpu_capability()}
for dtype in (torch.float32, torch.bfloat16):
    student = (3 * torch.randn(3, 1031, generator=generator)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(3, 1031, generator=generator)).to(dtype)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        student.grad = None
        labels = torch.tensor([0, 1030, 7])
        loss = fastdistil.kd_loss(student, teacher, labels, divergence=divergence, ce_weight=0.5)
        loss.backward()
        out[f"{dtype} {divergence}"] = [loss.item(), *student.grad.double().flatten().tolist()]
shapes = [(2, 2, 70, 26), (2, 2, 70, 26), (2, 2, 70, 40), (2, 2, 70, 40)]
tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
q, k = (tensor.requires_grad_() for tensor in tensors[:2])
losses = {
    "attention_kl": fastdistil.attention_kl(*tensors),
    "attention_mse by scores": fastdistil.attention_mse(*tensors),
    "attention_mse by Gram matrices": fastdistil.attention_mse(*(t.repeat(1, 1, 4, 1) for t in tensors)),
    "hidden_mse": fastdistil.hidden_mse(q.flatten(1), k.detach().flatten(1), normalize=True),
}
for name, loss in losses.items():
    grads = [g.flatten() for g in torch.autograd.grad(loss, (q, k), allow_unused=True) if g is not None]
    out[name] = [loss.item(), *torch.cat(grads).double().tolist()]
print(json.dumps(out))
"""


def _python(script: str, capability: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FASTDISTIL_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    runs = {capability: _python(SCRIPT, capability) for capability in WIDEST_FIRST}
    for run in runs.values():
        assert run.returncode == 0, run.stderr
    return {capability: json.loads(run.stdout) for capability, run in runs.items()}


def test_the_environment_lowers_the_capability_and_never_raises_it(results: dict[str, dict]) -> None:
    best = WIDEST_FIRST.index(results["avx512"]["capability"])
    for wanted, capability in enumerate(WIDEST_FIRST):
        assert results[capability]["capability"] == WIDEST_FIRST[max(wanted, best)]


def test_an_unknown_capability_is_refused_by_name() -> None:
    run = _python("from fastdistil import _C; import fastdistil; _C.cpu_capability()", "sse9")
    assert run.returncode != 0
    assert "FASTDISTIL_CPU_CAPABILITY must be avx512, avx2 or portable, got sse9" in run.stderr


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("dtype", "rounding"), [("torch.float32", 2e-7), ("torch.bfloat16", 2**-8)])
def test_instruction_sets_agree(
    results: dict[str, dict], dtype: str, divergence: str, rounding: float
) -> None:
    first, *others = (result[f"{dtype} {divergence}"] for result in results.values())
    for other in others:
        # They differ in the order of sums and in fused products alone.
        assert other[0] == pytest.approx(first[0], rel=1e-6)
        assert other[1:] == pytest.approx(first[1:], rel=4 * rounding, abs=2e-7)


@pytest.mark.parametrize(
    "loss", ["attention_kl", "attention_mse by scores", "attention_mse by Gram matrices", "hidden_mse"]
)
def test_instruction_sets_agree_on_losses_of_states(results: dict[str, dict], loss: str) -> None:
    first, *others = (result[loss] for result in results.values())
    largest = max(map(abs, first[1:]))
    for other in others:
        assert other[0] == pytest.approx(first[0], rel=2e-6)
        assert other[1:] == pytest.approx(first[1:], rel=0, abs=2e-6 * largest)


def test_build_info_names_the_compiler_the_flags_and_the_oldest_torch() -> None:
    info = extension.build_info()
    assert info["compiler"].split()[0] in ("GCC", "Clang")
    assert "-O2" in info["flags"].split()
    assert int(info["torch_target_version"], 16) == 0x020A000000000000
