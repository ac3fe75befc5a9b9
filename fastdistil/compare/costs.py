"""All that the models of a comparison cost to run: time, throughput, memory and energy."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdistil.compare.energy import find_meter
from fastdistil.compare.machine import describe_machine, memory_bytes, usable_cpus
from fastdistil.compare.measure import (
    float_reference,
    joules_per_sequence,
    measure,
    memory_groups,
    throughput,
)
from fastdistil.compare.results import Timing
from fastdistil.errors import RunError
from fastdistil.evaluate import measure_peak_memory

_MEMORY_SHARE = 0.7  # of the memory that is free, for the models that are timed together


@dataclass(frozen=True)
class Cost:
    """Of one model, as `Row` has it."""

    timings: list[Timing] = field(default_factory=list)
    sequences_per_second: float | None = None
    peak_bytes: int | None = None
    joules: float | None = None


@dataclass(frozen=True)
class Measured:
    """The costs of models that were measured together."""

    key: dict[str, Any]  # on what, and how
    models: dict[str, Any]  # name -> fingerprint of its model
    costs: dict[str, Cost]
    failures: dict[str, str]  # name -> why it could not be measured
    notes: list[str]

    def covers(self, key: Mapping[str, Any], models: Mapping[str, Any]) -> bool:
        """Whether all `models` are among those measured, in the same way. What failed is tried again."""
        same = all(self.models.get(name) == known for name, known in models.items())
        return self.key == key and same and not self.failures.keys() & models.keys()


@dataclass(frozen=True)
class Setting:
    """How the models of a comparison are measured."""

    length: int  # tokens of a sequence
    rounds: int
    device: str

    @property
    def key(self) -> dict[str, Any]:
        """JSON-able: what measurements must have in common to stand in one table."""
        machine, names = describe_machine(), ("processor", "cores", "torch", "onnxruntime")
        own = {"device": self.device, "length": self.length, "rounds": self.rounds}
        return {**{name: machine.get(name) for name in names}, **own}


def measure_costs(
    folders: Mapping[str, Path],
    fingerprints: Mapping[str, Any],
    setting: Setting,
    progress: Callable[[int, int], None],
) -> Measured:
    """The costs of the models in `folders`, of which the first is the teacher's.

    The teacher's weights are float32, whatever its file has, as they are when it is scored; other models are
    in the dtype of their files. A model that cannot be run is left out, and said why.
    """
    teacher = next(iter(folders))
    peaks, failures, notes = {}, {}, []
    # Each has a process of its own, of which the most time goes to imports.
    with ThreadPoolExecutor(min(4, usable_cpus())) as pool:
        found = pool.map(
            lambda name: _peak_or_error(folders[name], setting, is_teacher=name == teacher), folders
        )
        for name, peak in zip(folders, found, strict=True):
            if isinstance(peak, int):
                peaks[name] = peak
            elif name == teacher:
                raise peak
            else:
                failures[name] = str(peak)
    groups = memory_groups(peaks, _memory_budget(setting.device))
    if len(groups) > 1:
        notes.append(
            f"The memory does not hold all models at once: they were timed in {len(groups)} groups, each "
            "with the teacher, and the times of a group are scaled by the teacher's in the first."
        )

    load_as_scored = float_reference(folders[teacher])
    working = {name: folders[name] for name in peaks}
    timings = measure(
        working,
        length=setting.length,
        rounds=setting.rounds,
        device=setting.device,
        groups=groups,
        load=load_as_scored,
        progress=progress,
    )
    meter, what = find_meter(setting.device)
    if meter is None:
        notes.append(f"Energy was not measured: {what}.")
    else:
        notes.append(f"Energy is that of a sequence at batch 1 on one thread: {what}.")
    costs = {}
    for name, folder in working.items():
        joules = None
        if meter is not None:
            joules = joules_per_sequence(
                folder, meter, length=setting.length, device=setting.device, load=load_as_scored
            )
        costs[name] = Cost(timings[name], throughput(timings[name]), peaks[name], joules)
    return Measured(setting.key, dict(fingerprints), costs, failures, notes)


def _peak_or_error(folder: Path, setting: Setting, *, is_teacher: bool) -> int | RunError:
    try:
        return measure_peak_memory(
            folder,
            length=setting.length,
            device=setting.device,
            dtype=torch.float32 if is_teacher else None,
        )
    except RunError as error:
        return error


def _memory_budget(device: str) -> int | None:
    if device.startswith("cuda"):
        return int(_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
    free = memory_bytes("MemAvailable")
    return None if free is None else int(_MEMORY_SHARE * free)
