"""One record a measured case: what ran where, in an append-only JSON Lines file a device."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
# Of this process, in order: what was measured, and of these what went into a results file.
made: list[Record] = []
written: list[Record] = []
# Names of variants that the tables look for.
OURS = "fastdistil"
THREE_PASSES = "torch.add (three passes)"
TWO_PASSES = "copy (two passes)"
FOUR_PRODUCTS = "four bare matrix products"
THREE_PRODUCTS = "three bare matrix products"
GRAM_PRODUCTS = "bare Gram products"
GRAM = "Gram identity in plain PyTorch"
ROW_BLOCKS = "row blocks, recomputed"
FLASH = "composed of flash passes"
QUARTER = "fastdistil at a quarter of the length"
LIGER_JSD = "Liger, fused linear JSD"
ORIGINAL = "original step"
OUTPUT_ATTENTIONS = "output_attentions, relation maps"
HOOKS = "SDPA with hooks, compiled relation maps"
VOCAB = 30522  # of BERT
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl")


@dataclasses.dataclass
class Record:
    benchmark: str
    case: dict[str, Any]
    environment: dict[str, Any]
    bound: str | None
    bytes_moved: int | None
    flops: int | None
    tokens: int | None
    variants: dict[str, dict[str, Any]]  # summary(), peak_bytes, gradient_difference
    skipped: dict[str, str]
    notes: dict[str, Any]
    gradient_bytes: int | None = None  # None in records that were made without it


def results_dir() -> Path:
    """FASTDISTIL_BENCH_OUTPUT, else results/ beside this file."""
    return Path(os.environ.get("FASTDISTIL_BENCH_OUTPUT") or HERE / "results")


def summary(seconds: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Quantiles of a variant's seconds, and the median over the rounds of its time against fastdistil's."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "min": min(seconds),
        "p20": cuts[1],
        "p50": statistics.median(seconds),
        "p80": cuts[7],
        "rounds": len(seconds),
        "times_fastdistil": statistics.median(a / b for a, b in zip(seconds, ours, strict=True)),
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As `fastdistil compare` names it, and in the same brackets its vector instructions, oldest first."""
    from fastdistil.compare.machine import cpu_fields, processor_name

    name, _, generation = processor_name(cpuinfo).rstrip(")").partition(" (")
    flags = cpu_fields(cpuinfo).get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(filter(None, [generation, *known]))})"


def implementation(device: torch.device, op: str) -> str:
    """What the dispatcher takes for `op` on this device, in `fastdistil doctor`'s words."""
    from fastdistil.ops import implementations

    return next(row.implementation for row in implementations() if row.op == op and row.device == device.type)


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


@functools.cache
def commit() -> str:
    """The commit measured, with + where the working tree differs from it in more than results."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def environment(device: torch.device, op: str, load: float) -> dict[str, Any]:
    """Where and with what a case ran. `op` is the one whose implementation decides its time."""
    import fastdistil

    versions = {"python": platform.python_version(), "fastdistil": fastdistil.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "implementation": implementation(device, op),
        "versions": versions,
        "load_before": round(load, 2),  # processes that wanted to run in the minute before the case
    }


def folder_name(record: Record) -> str:
    """results/<this>: a device's name, on a CPU with its newest vector instructions and the thread count."""
    name = record.environment["device"]
    if record.environment["kind"] == "cpu":
        name, _, known = name.rstrip(")").rpartition(" (")
        name += f" {known.rpartition(', ')[2]} {record.environment['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def append(record: Record) -> None:
    folder = results_dir() / folder_name(record)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(dataclasses.asdict(record)) + "\n")
    written.append(record)


def newest(folder: Path) -> list[Record]:
    """The last record of each case, in the order in which the cases were first measured."""
    found: dict[tuple[str, str], Record] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        record = Record(**json.loads(line))
        found[record.benchmark, json.dumps(record.case, sort_keys=True)] = record
    return list(found.values())


def case_name(record: Record) -> str:
    """The case in words, leaving out what is zero or off."""
    words = []
    for key, value in record.case.items():
        if value is True:
            words.append(key)
        elif isinstance(value, str):
            words.append(value)
        elif value:
            words.append(f"{key} {value}")
    return ", ".join(words)


def throughput(record: Record, seconds: float) -> str:
    """Tokens/s, GFLOP/s of the products that the work needs, GB/s of the bytes that it must move."""
    parts = []
    if record.tokens:
        parts.append(f"{record.tokens / seconds:,.0f} tokens/s")
    if record.flops:
        rate = record.flops / seconds
        parts.append(f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s")
    if record.bytes_moved:
        parts.append(f"{record.bytes_moved / seconds / 1e9:,.1f} GB/s")
    return ", ".join(parts)


def describe(record: Record) -> str:
    lines = [f"\n{record.benchmark}: {case_name(record)}  [{record.environment['implementation']}]"]
    for name, one in record.variants.items():
        memory = "" if one["peak_bytes"] is None else f"  +{one['peak_bytes'] / 2**20:,.0f} MiB"
        bound = "  (bound)" if name == record.bound else ""
        gap = one["gradient_difference"]
        differs = f"  gradient differs by {gap:.1e}" if gap is not None else ""
        lines.append(
            f"  {name:40} {one['p50'] * 1e3:10.3f} ms  {one['times_fastdistil']:6.2f}x"
            f"  {throughput(record, one['p50'])}{memory}{bound}{differs}"
        )
    lines += [f"  {name:40} not measured: {why}" for name, why in record.skipped.items()]
    lines += [f"  {key}: {value}" for key, value in record.notes.items()]
    return "\n".join(lines)
