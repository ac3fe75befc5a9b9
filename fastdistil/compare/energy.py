"""Counters of the energy that a processor or a GPU has used, where the machine has them and lets us read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """A counter of joules."""

    counts: str  # what is counted, for the notes

    def start(self) -> None: ...

    def joules(self) -> float:
        """Used since `start`, by whoever used it: idle power and other programs are counted too."""


class Rapl:
    """The packages of the processor, through Linux's power capping framework (Intel's RAPL, AMD's too).

    A counter is in microjoules and starts again at 0 once it has reached `max_energy_range_uj`, which takes
    minutes at least: a loop must not be longer.
    """

    counts = "all of the processor package, idle power included"

    def __init__(self, domains: list[Path]) -> None:
        self._domains = domains
        self._ranges = [_number(domain / "max_energy_range_uj") for domain in domains]
        self.start()

    def start(self) -> None:
        self._first = self._read()

    def joules(self) -> float:
        used = 0
        for first, last, span in zip(self._first, self._read(), self._ranges, strict=True):
            used += last - first + (span if last < first else 0)
        return used / 1e6

    def _read(self) -> list[int]:
        return [_number(domain / "energy_uj") for domain in self._domains]


class Nvml:
    """One NVIDIA GPU, board included, through its driver's counter of millijoules."""

    counts = "all of the GPU's board, idle power included"

    def __init__(self, total_millijoules: Callable[[], int]) -> None:
        self._total = total_millijoules
        self.start()

    def start(self) -> None:
        self._first = self._total()

    def joules(self) -> float:
        return (self._total() - self._first) / 1e3


def find_meter(device: str = "cpu", powercap: Path = POWERCAP) -> tuple[Meter | None, str]:
    """The meter of the device, or None; and what it counts, or why there is none."""
    meter = _nvml(device) if device.startswith("cuda") else _rapl(powercap)
    return (None, meter) if isinstance(meter, str) else (meter, meter.counts)


def _rapl(powercap: Path) -> Rapl | str:
    # Of the domains, "intel-rapl:0" is a package; "intel-rapl:0:0" lies inside it, "intel-rapl-mmio:0" counts
    # the same once more, and "psys", the whole board, contains it.
    found = [
        domain for domain in sorted(powercap.glob("intel-rapl:*")) if _name(domain).startswith("package")
    ]
    if not found:
        return "this machine shows no energy counter (RAPL)"
    try:
        return Rapl(found)
    except PermissionError:
        return "the energy counter (RAPL) may be read by root alone"
    except (OSError, ValueError):
        return "the energy counter (RAPL) cannot be read"


def _nvml(device: str) -> Nvml | str:
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return "the GPU's energy counter needs the package nvidia-ml-py"
    index = int(device.partition(":")[2] or 0)
    try:
        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByIndex(index)
        return Nvml(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except pynvml.NVMLError as error:
        return f"the GPU has no energy counter that can be read ({error})"


def _name(domain: Path) -> str:
    try:
        return (domain / "name").read_text().strip()
    except OSError:
        return ""


def _number(file: Path) -> int:
    return int(file.read_text())
