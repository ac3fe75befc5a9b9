"""What the models of a comparison cost to run, measured side by side.

All of it is of the whole model with its head, on one device. That is the processor unless `device` says
otherwise: a comparison is of what its machine's processor does. Every sequence is `length` tokens long,
without padding, and of two segments where the model takes token types.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.compare.energy import Meter
from fastdistil.compare.results import Timing
from fastdistil.compress.store import load
from fastdistil.evaluate.cost import BATCH_SIZES, LENGTH, example_inputs, time_forward

_ENERGY_SECONDS = 2.0  # of a timed loop: a thousand times what the counter is refreshed in


def float_reference(reference: Path) -> Callable[[Path], Any]:
    """A loader for `measure`: the reference in float32, whatever its file has, as it is when it is scored;
    others in the precision of their files."""
    return lambda folder: load(folder, dtype=torch.float32 if folder == reference else None)


def measure(
    models: Mapping[str, Path],
    *,
    threads: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    length: int = LENGTH,
    rounds: int = 10,
    passes: int = 3,
    device: str = "cpu",
    groups: Sequence[Sequence[str]] | None = None,
    load: Callable[[Path], Any] = load,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Timing]]:
    """Name -> one `Timing` for each number of threads and each batch size, of `rounds * passes` passes.

    The models take turns: in a round each has one turn, in an order that is drawn anew, so that a machine
    that slows down slows them all, and none always follows the same other one. A turn is one pass that is not
    timed, which brings the weights back into the caches and gives the threads of the model before time to
    end, then `passes` timed ones. The first round is a warm-up.

    Args:
        models: name -> folder; the first is the reference.
        threads: default one and all that torch uses. They are put back afterwards.
        device: "cpu" or "cuda"; where torch models run. Those of another runtime stay on the processor.
        groups: names of models that are in memory together, each group with the reference first; default all.
            The times of a later group are multiplied by the reference's time in the first group over its time
            in theirs, so that the ratios to it are those that were measured.
        load: the model of a folder, in eval mode.
        progress: called with the rounds done and those in all.
    """
    before = torch.get_num_threads()
    threads = sorted({1, before}) if threads is None else threads
    groups = [list(models)] if groups is None else groups
    settings = [(count, batch_size) for count in threads for batch_size in batch_sizes]
    total, done = len(groups) * len(settings) * (rounds + 1), 0
    result: dict[str, list[Timing]] = {name: [] for name in models}
    reference = next(iter(models))
    try:
        for number, group in enumerate(groups):
            loaded = {name: load(models[name]).to(device) for name in group}
            set_to = None
            for place, (count, batch_size) in enumerate(settings):
                if count != set_to:
                    _set_threads(count, loaded.values())
                    set_to = count
                inputs = {n: whole_inputs(model, batch_size, length) for n, model in loaded.items()}
                times: dict[str, list[float]] = {name: [] for name in group}
                rng = random.Random(place)
                for turn in range(rounds + 1):
                    for name in rng.sample(group, len(group)):
                        taken = _take_turn(loaded[name], inputs[name], passes)
                        times[name] += taken if turn else []
                    done += 1
                    progress(done, total)
                timings = {n: _timing(batch_size, length, count, taken) for n, taken in times.items()}
                scale = result[reference][place].p50_ms / timings[reference].p50_ms if number else 1.0
                for name in group[1 if number else 0 :]:
                    result[name].append(_scaled(timings[name], scale))
            del loaded
            gc.collect()  # a model holds itself in cycles
    finally:
        torch.set_num_threads(before)
    return result


def memory_groups(sizes: Mapping[str, int], budget: int | None) -> list[list[str]]:
    """Groups for `measure`: of models that fit into `budget` bytes together, each with the first model.

    Args:
        sizes: name -> bytes of the model in memory.
        budget: None is without limit. A model that does not fit beside the first is with it alone.
    """
    (first, own), *others = sizes.items()
    groups, room = [[first]], (budget or 0) - own
    for name, size in others:
        if budget is not None and size > room and len(groups[-1]) > 1:
            groups.append([first])
            room = budget - own
        groups[-1].append(name)
        room -= size
    return groups


def throughput(timings: Sequence[Timing]) -> float:
    """Sequences a second at the largest batch and the most threads, at the median time."""
    best = max(timings, key=lambda timing: (timing.batch_size, timing.threads))
    return 1000 * best.batch_size / best.p50_ms


def joules_per_sequence(
    folder: Path,
    meter: Meter,
    *,
    length: int = LENGTH,
    seconds: float = _ENERGY_SECONDS,
    device: str = "cpu",
    load: Callable[[Path], Any] = load,
) -> float:
    """What the meter counts over a loop of forward passes at batch 1 on one thread, over their number.

    Nothing is taken off: idle power and other programs are in it.
    """
    before = torch.get_num_threads()
    model = load(folder).to(device)
    try:
        _set_threads(1, [model])
        inputs = whole_inputs(model, 1, length)
        _take_turn(model, inputs, 2)
        count, end = 0, time.perf_counter() + seconds
        meter.start()
        while time.perf_counter() < end:
            _take_turn(model, inputs, 1)
            count += 2
        return meter.joules() / count
    finally:
        torch.set_num_threads(before)


def whole_inputs(model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
    """Example inputs of a model with its head; one for choices gets one option a sequence."""
    inputs = example_inputs(model, batch_size, length)
    if type(model).__name__.endswith("ForMultipleChoice"):
        return {name: value[:, None] for name, value in inputs.items()}
    return inputs


@torch.inference_mode()
def _take_turn(model: Any, inputs: dict[str, Tensor], passes: int) -> list[float]:
    """Milliseconds of all passes but the first."""
    return [1000 * time_forward(model, inputs) for _ in range(passes + 1)][1:]


def _set_threads(count: int, models: Any) -> None:
    torch.set_num_threads(count)
    for model in models:
        if hasattr(model, "set_threads"):  # of another runtime
            model.set_threads(count)


def _timing(batch_size: int, length: int, threads: int, times: list[float]) -> Timing:
    quantiles = torch.tensor([0.5, 0.95], dtype=torch.float64)
    p50, p95 = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
    return Timing(batch_size, length, threads, p50, p95)


def _scaled(timing: Timing, factor: float) -> Timing:
    return Timing(
        timing.batch_size, timing.length, timing.threads, timing.p50_ms * factor, timing.p95_ms * factor
    )
