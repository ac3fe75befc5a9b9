"""Which int8 is the fastest on this machine of those that keep the score."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdistil.compress.method import Calibration
from fastdistil.errors import RunError, UserError
from fastdistil.evaluate.cost import LENGTH, measure_latency
from fastdistil.models.load import max_positions

_RUNS = 15
_FLOAT = "float"


@dataclass(frozen=True)
class Measured:
    """One candidate, or the float model."""

    milliseconds: float  # p50 of a forward pass at batch 1
    loss: float  # mean over the calibration batches; NaN without them

    def __str__(self) -> str:
        loss = "" if math.isnan(self.loss) else f", loss {self.loss:.4f}"
        return f"{self.milliseconds:.2f} ms{loss}"


def fastest(
    model: Any,
    builders: Mapping[str, Callable[[], Any]],
    calibration: Calibration | None,
    max_loss_increase: float,
) -> Any:
    """The model of one of `builders`, with a note (see `add_note`) of what was measured.

    Args:
        model: in float; the builders do not change it.
        builders: backend -> what makes its model. One that raises `UserError` or `RunError` is left out.
        max_loss_increase: of the calibration loss over the float model's. If none keeps it, the one with the
            lowest loss is taken, and the note says so.

    Raises:
        UserError: no backend can make a model.
    """
    candidates: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, build in builders.items():
        try:
            candidates[name] = build()
        except (UserError, RunError) as error:
            failures[name] = str(error)
    if not candidates:
        raise UserError(f"no int8 backend serves: {'; '.join(f'{n}: {e}' for n, e in failures.items())}")
    measured = _measure({_FLOAT: model, **candidates}, calibration)
    name, reason = choose(measured, max_loss_increase)
    times = "; ".join(f"{backend} {result}" for backend, result in measured.items())
    threads = torch.get_num_threads()
    note = (
        f"int8 on this machine, batch 1, {threads} thread{'s' * (threads > 1)}: {times}. Took {name}{reason}."
    )
    note += "".join(f" Without {backend}: {error}." for backend, error in failures.items())
    add_note(candidates[name], note)
    return candidates[name]


def choose(measured: Mapping[str, Measured], max_loss_increase: float) -> tuple[str, str]:
    """The backend that is taken, and what else is to be said of it."""
    reference = measured[_FLOAT]
    backends = {name: result for name, result in measured.items() if name != _FLOAT}
    # A comparison with NaN is false: without examples all are kept.
    kept = {n: r for n, r in backends.items() if not r.loss - reference.loss > max_loss_increase}
    if kept:
        name = min(kept, key=lambda name: kept[name].milliseconds)
        reason = "" if not math.isnan(reference.loss) else ", without examples to look at the loss"
    else:
        name = min(backends, key=lambda name: backends[name].loss)
        reason = f": none keeps the loss within {max_loss_increase:g}, this one has the lowest"
    if backends[name].milliseconds >= reference.milliseconds:
        reason += "; int8 is slower than float here"
    return name, reason


def add_note(model: Any, note: str) -> None:
    """A sentence that goes with the model: "notes" of its config's table "fastdistil"."""
    facts = dict(getattr(model.config, "fastdistil", None) or {})
    facts["notes"] = [*facts.get("notes", []), note]
    model.config.fastdistil = facts
    exported = getattr(model, "exported", None)  # of a model of another runtime, which saves this
    if exported is not None:
        model.exported = replace(exported, notes=facts["notes"])


def _measure(models: Mapping[str, Any], calibration: Calibration | None) -> dict[str, Measured]:
    length = min(LENGTH, max_positions(models[_FLOAT]))
    latencies = measure_latency(models, batch_sizes=(1,), length=length, runs=_RUNS)
    return {
        name: Measured(latencies[name][0].p50_ms, _mean_loss(model, calibration))
        for name, model in models.items()
    }


def _mean_loss(model: Any, calibration: Calibration | None) -> float:
    if calibration is None:
        return math.nan
    with torch.no_grad():
        losses = [calibration.loss(model, batch).item() for batch in calibration.batches]
    return sum(losses) / len(losses)
