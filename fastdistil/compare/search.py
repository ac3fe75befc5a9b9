"""Ready-made answers: the chain with the best score that is fast enough, or small enough, on this machine.

How fast a model is, and how many bytes it takes, does not depend on its weights' values. So every chain of a
fixed list is first made without training, and all are timed side by side; then those that meet the target
are trained, the mildest first, and scored on examples held out of the training split. The best of them is
scored on the validation split, which nothing was chosen by.

output/
  compress.json   what is compressed: the folder is ours
  search.json     sizes, speeds and scores of the chains, as far as they are known
  models/         the trained models (see chain)
  model/          the best one
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastdistil.compare.chain import ChainContext, chain_record, check_chain, run_chain
from fastdistil.compare.files import check_output, write_json
from fastdistil.compare.machine import describe_machine, processor_name
from fastdistil.compare.measure import float_reference, measure
from fastdistil.compare.single import (
    CompressResult,
    begin,
    compress_command,
    finish_single,
    is_ours,
    release,
)
from fastdistil.compare.steps import Chain, parse_chains
from fastdistil.compress.store import load
from fastdistil.data.task_encoding import encode
from fastdistil.data.tasks import Examples, find_task, read_examples
from fastdistil.errors import RunError, UserError, one_line
from fastdistil.evaluate import bytes_on_disk, evaluate_task, mean_score
from fastdistil.evaluate.cost import LENGTH, model_folder
from fastdistil.models.load import load_fitting_tokenizer, max_positions
from fastdistil.models.task import load_task_model
from fastdistil.paths import one_spelling
from fastdistil.train.cache import model_fingerprint
from fastdistil.train.prepare_task import split_examples
from fastdistil.train.sections import TaskConfig
from fastdistil.wording import gain

STATE = "search.json"
_TEACHER = "teacher"
_HELD_OUT = 0.1  # of the training examples
_LOOKED_AT = 8  # training examples by what is only timed: which heads or neurons go does not matter to that
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}


@dataclass(frozen=True)
class Target:
    speedup: float | None  # of the p50 at batch 1 on one thread, over the float32 PyTorch model
    size: int | None  # bytes of the weights on disk

    def __post_init__(self) -> None:
        if self.speedup is None and self.size is None:
            raise UserError("a search needs a target: --target-speedup, --target-size or both")
        if self.speedup is not None and not self.speedup > 1:
            raise UserError(f"--target-speedup must be > 1, got {self.speedup:g}")

    def share(self, measured: "Measured") -> float:
        """How much of the target is met; of two, the less; at least 1 where it is met."""
        shares = []
        if self.speedup is not None:
            shares.append(measured.speedup / self.speedup)
        if self.size is not None:
            shares.append(self.size / measured.disk_bytes)
        return min(shares)

    def __str__(self) -> str:
        parts = [] if self.speedup is None else [f"{self.speedup:g}× faster"]
        return " and ".join(parts + ([] if self.size is None else [f"at most {self.size / 1e6:g} MB"]))


@dataclass(frozen=True)
class Measured:
    """A chain's model, trained or not."""

    disk_bytes: int
    speedup: float

    def __str__(self) -> str:
        return f"{gain(self.speedup, 'faster', 'slower')}, {self.disk_bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class State:
    """What is known of the chains, by their names."""

    identity: dict[str, Any]  # of what was measured, and on what
    measured: dict[str, Measured]
    errors: dict[str, str]  # of chains that could not be made
    scores: dict[str, float]  # on the held-out part of the training examples


def parse_size(text: str) -> int:
    """Bytes of "20MB", "1.5 GB", "900k" or "20971520"; "MiB" is 2^20, "MB" 10^6."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UserError(f"a size is a number and a unit (kB, MB, GB, KiB, MiB, GiB), got {text!r}")
    number, unit, binary = match.groups()
    size = round(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])
    if size < 1:
        raise UserError(f"a size must be at least a byte, got {text!r}")
    return size


def candidate_chains(num_layers: int, hidden_size: int) -> list[str]:
    """The chains that a search looks at, the mildest first, that is in the order of the score to expect.

    The order is by the parameters that remain in the layers; those of the embeddings cost less score. Layers
    go first in a chain, so that chains of the same depth share that step.
    """
    embeddings = f"factorize-embeddings:{max(1, hidden_size // 4)}"
    halves = "prune-heads:0.5+prune-ffn:0.5"

    def layers(share: float) -> str:
        return f"prune-layers:{max(1, round(share * num_layers))}"

    half, third, quarter, sixth = (layers(share) for share in (1 / 2, 1 / 3, 1 / 4, 1 / 6))
    three_quarters = f"{embeddings}+prune-heads:0.5+prune-ffn:0.75"
    chains = [
        "bf16",
        "onnx-int8",
        "onnx-int8:4",
        "prune-ffn:0.5+onnx-int8",
        f"{layers(2 / 3)}+onnx-int8",
        f"{halves}+onnx-int8",
        f"{half}+onnx-int8",
        f"{half}+onnx-int8:4",
        f"{half}+{embeddings}+onnx-int8",
        f"{half}+prune-ffn:0.5+onnx-int8",
        f"{third}+onnx-int8",
        f"{third}+{embeddings}+onnx-int8",
        f"{quarter}+onnx-int8",
        f"{quarter}+{embeddings}+onnx-int8",
        f"{half}+{halves}+onnx-int8",
        f"{third}+prune-ffn:0.5+onnx-int8",
        f"{half}+prune-heads:0.5+prune-ffn:0.75+onnx-int8",
        f"{quarter}+prune-ffn:0.5+onnx-int8",
        f"{quarter}+{halves}+onnx-int8",
        f"{sixth}+prune-ffn:0.5+onnx-int8",
        f"{sixth}+{three_quarters}+onnx-int8",
        f"prune-layers:1+{three_quarters}+onnx-int8",
        f"prune-layers:1+{three_quarters}+onnx-int8:4",
    ]
    # A shallow model has the same depth for several shares; what keeps all layers is no pruning.
    return [chain for chain in dict.fromkeys(chains) if f"prune-layers:{num_layers}" not in chain.split("+")]


def compress_for_target(
    source: str,
    task: str,
    data: str | None,
    output: Path,
    target_speedup: float | None = None,
    target_size: str | None = None,
    *,
    candidates: int = 3,
    overrides: Sequence[str] = (),
    seed: int = 0,
    allow_weak_teacher: bool = False,
    say: Callable[[str], None] = print,
) -> CompressResult:
    """The best of `candidates` trained chains that make `source` as fast and as small as wanted.

    Args:
        source: folder or hub id of a model with a head for the task.
        target_speedup: at batch 1 on one thread, over `source` in PyTorch and float32.
        target_size: of the weights on disk, as `parse_size` reads it.
        candidates: how many chains are trained and scored.
        overrides: as of `parse_chains`, such as "recover.run.epochs=3".

    Raises:
        UserError: a target that no chain meets, with the nearest one that can be met; anything wrong with the
            arguments. What was measured is kept in `output`.
        RunError: no chain could be made.
    """
    target = Target(target_speedup, None if target_size is None else parse_size(target_size))
    source, output = one_spelling(source), output.expanduser()
    data = None if data is None else one_spelling(data)
    search = _Search(source, task, data, output, overrides, seed, say, allow_weak_teacher)
    chosen = search.train(search.meeting(target), candidates)
    found = search.state.measured[chosen.name]
    notes = [f"chosen for {target} among {len(search.state.measured)} chains: {found} before training"]
    notes += [
        f"{name}: {search.score_name} {score:.4f} on held-out training examples"
        for name, score in search.state.scores.items()
    ]
    made = run_chain(chosen, search.context, seed)
    notes += chain_record(chosen, search.context, seed).notes
    wanted = {"--target-speedup": target_speedup, "--target-size": target_size, "--candidates": candidates}
    command = compress_command(
        source, wanted, task, data, overrides, seed, output, allow_weak_teacher=allow_weak_teacher
    )
    return finish_single(source, made, chosen, output, search.task, data, notes, command)


class _Search:
    def __init__(
        self,
        source: str,
        task: str,
        data: str | None,
        output: Path,
        overrides: Sequence[str],
        seed: int,
        say: Callable[[str], None],
        allow_weak_teacher: bool,
    ) -> None:
        self.source, self.output, self.seed, self.say = source, output, seed, say
        self.task, self.data = find_task(task), data
        self.score_name = " and ".join(self.task.metrics)
        check_output(output, "search", ours=is_ours(output))
        self.folder = model_folder(source)
        model, _ = load_task_model(source, self.task, new_head=False)
        positions = max_positions(model)
        self.length, self.max_length = min(LENGTH, positions), min(self.task.usual_length, positions)
        texts = candidate_chains(model.config.num_hidden_layers, model.config.hidden_size)
        self.chains = {chain.name: chain for chain in parse_chains(texts, overrides)}
        self.context = ChainContext(
            teacher=source,
            task=self.task,
            data=data,
            output=output,
            max_length=self.max_length,
            validation_fraction=_HELD_OUT,
            allow_weak_teacher=allow_weak_teacher,
            say=say,
        )
        for chain in self.chains.values():
            check_chain(chain, self.context)
        ours = is_ours(output)
        # With another target it may go on.
        begin(output, source, {"chain": "a search", "task": self.task.name, "data": data})
        try:
            self.held_out = self._held_out_examples()
        except UserError:
            if not ours:
                release(output)
            raise
        self.state = self._read()

    def meeting(self, target: Target) -> list[Chain]:
        """The chains that meet the target, the mildest first."""
        self._measure()
        measured = self.state.measured
        met = [
            chain
            for name, chain in self.chains.items()
            if name in measured and target.share(measured[name]) >= 1
        ]
        if met:
            return met
        nearest = max(measured, key=lambda name: target.share(measured[name]))
        raise UserError(
            f"none of {len(measured)} chains makes {self.source} {target} on this machine; the nearest is "
            f"{nearest}: {measured[nearest]} (all are in {self.output / STATE})"
        )

    def train(self, chains: Sequence[Chain], candidates: int) -> Chain:
        """The one with the best score on held-out training examples; of equals, the milder."""
        scores: dict[str, float] = {}
        errors: list[str] = []
        for chain in chains:
            if len(scores) == candidates:
                break
            try:
                folder = run_chain(chain, self.context, self.seed)
                score = self._score(folder)
            except Exception as error:  # whatever it is, the next chain takes its place
                errors.append(f"{chain.name}: {one_line(error)}")
                self.say(f"failed: {errors[-1]}")
                continue
            scores[chain.name] = score
            self.say(f"{chain.name}: {self.score_name} {score:.4f} on held-out training examples")
            self._keep(replace(self.state, scores={**self.state.scores, chain.name: score}))
        if not scores:
            raise RunError(
                f"none of the {len(chains)} chains that meet the target could be made: {errors[0]}"
            )
        # Scores of chains that only an earlier search trained are no part of this one.
        self._keep(replace(self.state, scores=scores))
        return self.chains[max(scores, key=lambda name: scores[name])]

    def _measure(self) -> None:
        if self.state.measured:
            self.say(f"{len(self.state.measured)} chains were measured before")
            return
        folders, errors = {_TEACHER: self.folder}, {}
        context = replace(self.context, calibration_examples=_LOOKED_AT, say=lambda text: None)
        for number, (name, chain) in enumerate(self.chains.items(), start=1):
            self.say(f"[{number}/{len(self.chains)}] {name}, without training")
            try:
                folders[name] = run_chain(chain, context, self.seed, train=False)
            except Exception as error:  # the other chains are of use
                errors[name] = one_line(error)
                self.say(f"left out: {name}: {errors[name]}")
        if len(folders) == 1:
            name, reason = next(iter(errors.items()))
            raise RunError(f"none of {len(errors)} chains could be made: {name}: {reason}")
        self.say(f"timing {len(folders) - 1} chains")
        timings = measure(
            folders,
            threads=[1],
            batch_sizes=[1],
            length=self.length,
            load=float_reference(self.folder),
        )
        reference = timings.pop(_TEACHER)[0].p50_ms
        measured = {
            name: Measured(bytes_on_disk(folders[name]), reference / own[0].p50_ms)
            for name, own in timings.items()
        }
        self._keep(replace(self.state, measured=measured, errors=errors))
        shutil.rmtree(self.output / "structures", ignore_errors=True)  # what they were made for is known
        for name, found in measured.items():
            self.say(f"{name}: {found}")

    def _held_out_examples(self) -> Examples:
        """Those that a training run with `task.validation_fraction` leaves out."""
        steps = [step for chain in self.chains.values() for step in chain.steps if step.recover is not None]
        limits = {(step.recover or {}).get("task.max_examples") for step in steps}
        if len(limits) > 1:
            raise UserError(
                "a search needs the same task.max_examples for all steps: train.task.max_examples=N"
            )
        section = TaskConfig(
            name=self.task.argument, max_examples=next(iter(limits), None), validation_fraction=_HELD_OUT
        )
        _, held_out = split_examples(read_examples(self.task, self.data, self.task.splits[0]), section)
        assert held_out is not None
        return held_out

    def _score(self, folder: Path) -> float:
        model = load(folder)
        tokenizer = load_fitting_tokenizer(folder, model, masks=False)
        data = encode(self.task, self.held_out, tokenizer, self.max_length)
        return mean_score(self.task, evaluate_task(model, self.task, data))

    def _read(self) -> State:
        identity = {
            "model": model_fingerprint(self.source),
            "task": self.task.name,
            "length": self.length,
            "processor": processor_name(),
            "torch": torch.__version__,
            "onnxruntime": describe_machine().get("onnxruntime"),
            "chains": {
                name: [step.identity() for step in chain.steps] for name, chain in self.chains.items()
            },
        }
        state = State(json.loads(json.dumps(identity)), {}, {}, {})
        file = self.output / STATE
        if file.exists():
            try:
                plain = json.loads(file.read_text(encoding="utf-8"))
                measured = {name: Measured(**own) for name, own in plain["measured"].items()}
                known = State(**{**plain, "measured": measured})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{file} does not hold the state of a search: {error}") from None
            if known.identity == state.identity:
                return known
        self._write(state)
        return state

    def _keep(self, state: State) -> None:
        self.state = state
        self._write(state)

    def _write(self, state: State) -> None:
        write_json(self.output / STATE, asdict(state))
