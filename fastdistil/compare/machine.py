"""What a comparison ran on: a label -> its value, without paths and host names."""

import os
import platform
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

import fastdistil

_PACKAGES = ("torch", "transformers", "onnxruntime", "torchao")


def describe_machine() -> dict[str, str]:
    """Processor, threads, instruction set, memory, system, versions and today's date."""
    threads, cpus = torch.get_num_threads(), usable_cpus()
    labels = {
        "processor": processor_name(),
        "cores": f"{cpus} ({threads} {'thread' if threads == 1 else 'threads'} used by torch)",
        "instruction set": torch.backends.cpu.get_cpu_capability(),
    }
    if memory := memory_bytes("MemTotal"):
        labels["memory"] = f"{memory / 2**30:.1f} GiB"
    for index in range(torch.cuda.device_count()):
        labels[f"cuda:{index}"] = torch.cuda.get_device_properties(index).name
    labels["system"] = f"{platform.system()} {platform.release()}"
    labels["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            labels[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    labels["fastdistil"] = fastdistil.__version__ + _commit()
    labels["date"] = date.today().isoformat()
    return labels


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, and on x86 family and model, which tell its generation: a virtual machine calls all of them,
    of which one may be twice as fast as another, by the same name."""
    fields = cpu_fields(cpuinfo)
    if not fields:
        return platform.processor() or platform.machine()
    name = fields.get("model name") or platform.machine()
    if {"cpu family", "model"} <= fields.keys():
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def cpu_fields(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What Linux says of the first processor; empty where the system has no such file."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in lines:
        label, _, value = line.partition(":")
        fields.setdefault(label.strip(), value.strip())
    return fields


def usable_cpus() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(field: str, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """`MemTotal`, or `MemAvailable` (what can be had without swapping); None where the system has no such
    file."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _commit() -> str:
    """ " (commit 1a2b3c4)" of a checkout, with "changed" where files differ from it; else nothing."""
    root = Path(fastdistil.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" (commit {commit}{', changed' if changed else ''})"
