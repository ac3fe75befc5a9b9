"""How every benchmark here measures: interleaved times, extra peak memory, one record a case.

A benchmark file turns a case (sizes and dtypes) into a `Work`: fastdistil, its rivals and the bound, each a
function that does the whole work once. `compare` then runs all of them in turn, round after round, so that a
drift of the machine meets everyone alike; pytest-benchmark times fastdistil's turn, and the ratios are taken
round by round. Run as a program, this file measures one case's peak memory on a CPU in a process of its own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import records
import torch
from records import OURS

QUICK = os.environ.get("FASTDISTIL_BENCH", "full") == "quick"
# Seconds of timed rounds a case may take, and how many rounds; only two if a round is very long.
BUDGET, MIN_ROUNDS, MAX_ROUNDS = (0.2, 2, 2) if QUICK else (4.0, 3, 30)
LONG_ROUND = 15.0
# Small enough that every tensor worth counting is mapped alone and given back to the system when it is freed.
MMAP_THRESHOLD = 1 << 16

Variant = Callable[[], object]
C = TypeVar("C")


@dataclasses.dataclass
class Work:
    """What one case runs. Each variant does all of the work once and returns whatever it allocated."""

    variants: dict[str, Variant]  # OURS is one of them
    bound: str | None = None  # the variant that none can beat: the memory passes or the bare products
    bytes_moved: int | None = None  # that the work cannot avoid
    flops: int | None = None  # of the matrix products that the work cannot avoid
    tokens: int | None = None
    gradient_bytes: int | None = None  # of the gradients, which nobody's peak memory can do without
    compiled: frozenset[str] = frozenset()  # variants that compile for one shape on their first call
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # rival -> why it is not measured here
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Keep the GPU busy before the first launch is timed, as a training loop does: a short op's time is then
    # the GPU's and not that of Python's launches.
    launch_ahead: bool = True


def device() -> torch.device:
    """FASTDISTIL_BENCH_DEVICE, else the GPU where there is one."""
    name = os.environ.get("FASTDISTIL_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def cases(full: Sequence[C], quick: Sequence[C]) -> Sequence[C]:
    """The shapes worth reporting, or with FASTDISTIL_BENCH=quick tiny ones that only show that it works."""
    return quick if QUICK else full


def matrix_rate() -> float:
    """FLOP/s of one large bfloat16 product on the GPU, for the share that a case reaches."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    end.synchronize()
    return 10 * 2 * size**3 / (start.elapsed_time(end) / 1e3)


def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.compile for exactly one shape, its best case; its recompile limit starts afresh."""
    torch.compiler.reset()
    # The compiler writes a structured trace to a logger, all of which pytest's log capture would keep.
    logging.getLogger("torch.__trace").propagate = False
    return torch.compile(function, dynamic=False, fullgraph=True)


class Clock:
    """Seconds of one call: the wall on a CPU, CUDA events on a GPU. Freeing its result is not timed."""

    def __init__(self, launch_ahead: bool) -> None:
        self.cuda = device().type == "cuda"
        self.launch_ahead = launch_ahead
        # Writing more than the L2 cache holds evicts what the previous variant left there.
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda") if self.cuda else None

    def __call__(self, variant: Variant) -> float:
        if self.flush is None:
            begin = time.perf_counter()
            kept = variant()
            seconds = time.perf_counter() - begin
            del kept
            return seconds
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        if self.launch_ahead:
            torch.cuda._sleep(2_000_000)  # about a millisecond
        start.record()
        kept = variant()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3


def warm_up(work: Work) -> dict[str, float]:
    """Call everything once. A rival that fails is reported with its reason; fastdistil must not fail.

    Returns how far each rival's gradients (where it returns a tuple of them) are from fastdistil's, relative
    to their L2 norm: who is fast must do the same work.
    """
    ours = work.variants[OURS]()
    differences = {}
    for name, variant in list(work.variants.items()):
        if name == OURS:
            continue
        try:
            result = variant()
            if isinstance(result, tuple) and isinstance(ours, tuple):
                pairs = [(a.float() - b.float(), b.float()) for a, b in zip(result, ours, strict=True)]
                differences[name] = max((gap.norm() / of.norm()).item() for gap, of in pairs)
        except Exception as error:
            if name == work.bound:
                raise
            del work.variants[name]
            work.skipped[name] = f"{type(error).__name__}: {str(error).strip()[:160]}"
    return differences


def times(work: Work, benchmark: Any) -> dict[str, list[float]]:
    """Seconds of each variant, a round after another; `benchmark` is pytest-benchmark's fixture."""
    clock = Clock(work.launch_ahead)
    seconds: dict[str, list[float]] = {name: [] for name in work.variants}
    rivals = [name for name in work.variants if name != OURS]

    def rivals_turn() -> None:
        for name in rivals:
            seconds[name].append(clock(work.variants[name]))

    def our_turn() -> None:
        seconds[OURS].append(clock(work.variants[OURS]))

    rivals_turn()
    our_turn()
    one_round = sum(taken[0] for taken in seconds.values())
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(BUDGET / one_round))) if one_round < LONG_ROUND else 2
    benchmark.pedantic(our_turn, setup=rivals_turn, rounds=rounds - 1)
    return seconds


def cuda_peaks(work: Work) -> dict[str, int]:
    """Bytes that each variant holds at its highest, beyond its inputs (gradients included)."""
    peaks = {}
    for name, variant in work.variants.items():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    return peaks


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def cpu_peaks(work: Work, small: Work) -> dict[str, int]:
    """As `cuda_peaks`, from the resident set. `small`, the same on small inputs, loads the libraries."""
    peaks = {}
    for name, variant in work.variants.items():
        (variant if name in work.compiled else small.variants[name])()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at the present size
        before = resident("VmRSS")
        variant()
        peaks[name] = resident("VmHWM") - before
    return peaks


def cpu_peaks_in_fresh_process(benchmark_name: str, case: Any, variants: Sequence[str]) -> dict[str, int]:
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
        # pytest may have found the package where a new process would not look.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    arguments = [f"bench_{benchmark_name}", json.dumps(dataclasses.asdict(case)), json.dumps(list(variants))]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the memory measurement of {benchmark_name} failed:\n{done.stderr[-2000:]}")
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def compare(
    benchmark: Any, benchmark_name: str, case: Any, build: Callable[[Any], Work], op: str = "kd_loss_fwd"
) -> records.Record:
    """Measure `build(case)`, append the record to the device's results, and return it.

    `benchmark_name` names the file, bench_NAME.py, whose `Case` and `build` the memory process imports;
    `op` is the one that does the work (`linear_kd_loss` is matrix products around `kd_loss`'s kernels).
    Memory is measured where the case has `memory=True` (it then has a `small()` one like it), and on a GPU,
    where it costs nothing, always.
    """
    load = os.getloadavg()[0]
    work = build(case)
    differences = warm_up(work)
    seconds = times(work, benchmark)
    peaks: dict[str, int] = {}
    if device().type == "cuda":
        peaks = cuda_peaks(work)
    elif getattr(case, "memory", False):
        names = [name for name in work.variants if name != work.bound]
        peaks = cpu_peaks_in_fresh_process(benchmark_name, case, names)

    record = records.Record(
        benchmark=benchmark_name,
        case={key: value for key, value in dataclasses.asdict(case).items() if key != "memory"},
        environment=records.environment(device(), op, load),
        bound=work.bound,
        bytes_moved=work.bytes_moved,
        flops=work.flops,
        tokens=work.tokens,
        gradient_bytes=work.gradient_bytes,
        variants={
            name: records.summary(taken, seconds[OURS])
            | {"peak_bytes": peaks.get(name), "gradient_difference": differences.get(name)}
            for name, taken in seconds.items()
        },
        skipped=work.skipped,
        notes=work.notes,
    )
    benchmark.extra_info.update({name: round(v["p50"] * 1e3, 3) for name, v in record.variants.items()})
    records.made.append(record)
    if not QUICK:
        records.append(record)
    return record


def main() -> None:
    module_name, case, names = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    module = importlib.import_module(module_name)
    whole_case = module.Case(**case)
    whole, small = module.build(whole_case), module.build(whole_case.small())
    # The last one built owns torch.compile's caches, so the compiled variants are warmed by running them.
    whole.variants = {name: whole.variants[name] for name in names}
    print(json.dumps(cpu_peaks(whole, small)))


if __name__ == "__main__":
    main()
