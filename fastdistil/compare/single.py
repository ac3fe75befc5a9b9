"""One compressed model, beside the one that it was made of.

output/
  compress.json  what is compressed, and how: the folder is ours
  model/         the result, with its model card
  models/        what leads to it (see chain)
  result.json    what is shown; written last
"""

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastdistil.compare.chain import (
    RECORD,
    ChainContext,
    chain_record,
    check_chain,
    refuse_runtime,
    run_chain,
)
from fastdistil.compare.files import check_output, write_json
from fastdistil.compare.measure import float_reference, measure
from fastdistil.compare.pieces import difference
from fastdistil.compare.steps import Chain, parse_chain
from fastdistil.compress.store import is_compressed, load
from fastdistil.data.task_encoding import encode
from fastdistil.data.tasks import Task, find_task, read_examples
from fastdistil.errors import UserError
from fastdistil.evaluate import bytes_on_disk, count_parameters, evaluate_task, mean_score
from fastdistil.evaluate.cost import LENGTH, model_folder
from fastdistil.export.card import write_card
from fastdistil.export.folder import read_exported
from fastdistil.models.load import load_fitting_tokenizer, load_tokenizer, max_positions
from fastdistil.paths import one_spelling
from fastdistil.train.checkpoint import publish, save_model
from fastdistil.wording import gain

MARKER = "compress.json"
RESULT = "result.json"
_UNTRAINED = "untrained"  # in models/: what a chain makes without a task


@dataclass(frozen=True)
class Side:
    """What one of the two models is and costs."""

    parameters: int
    disk_bytes: int
    latency_ms: float  # p50 of one sequence, one thread
    scores: dict[str, float] | None  # None: no task was given
    score: float | None  # the mean of them


@dataclass(frozen=True)
class CompressResult:
    """The compressed model and its original."""

    path: Path
    chain: str
    length: int  # tokens of the sequence that was timed
    before: Side
    after: Side
    notes: list[str]

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, with its unit."""
        before, after = self.before, self.after
        rows = [
            ("model", str(self.path)),
            ("made by", self.chain),
            ("parameters", f"{before.parameters / 1e6:.2f} M -> {after.parameters / 1e6:.2f} M"),
            (
                "size on disk",
                f"{before.disk_bytes / 1e6:.1f} MB -> {after.disk_bytes / 1e6:.1f} MB, "
                f"{gain(before.disk_bytes / after.disk_bytes, 'smaller', 'larger')}",
            ),
            (
                f"latency, 1 × {self.length} tokens, one thread",
                f"{before.latency_ms:.1f} ms -> {after.latency_ms:.1f} ms, "
                f"{gain(before.latency_ms / after.latency_ms, 'faster', 'slower')}",
            ),
        ]
        if before.scores is not None and after.scores is not None:
            for name, value in after.scores.items():
                rows.append((name.replace("_", " "), f"{before.scores[name]:.2%} -> {value:.2%}"))
            assert before.score is not None
            assert after.score is not None
            if before.score:
                rows.append(("retained", f"{after.score / before.score:.1%} of the score"))
        else:
            rows.append(("quality", "not measured, and nothing was trained: give --task"))
        return rows + [("note", note) for note in self.notes]


def compress_model(
    source: str,
    method: str,
    output: Path,
    *,
    task: str | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    allow_weak_teacher: bool = False,
    say: Callable[[str], None] = print,
) -> CompressResult:
    """Compress the model `source` by a chain, and measure both side by side.

    With a task, each step recovers by distillation from `source`, and both are scored. Without, nothing is
    trained, and methods that look at examples refuse. What is finished in `output` is not repeated.

    Raises:
        UserError: as `parse_chain` and `run_chain`; a folder that holds something else, or the finished model
            of another chain, source, task or seed.
        RunError: a failure while training.
    """
    source, output = one_spelling(source), output.expanduser()
    data = None if data is None else one_spelling(data)
    chain = parse_chain(method, overrides)
    found = None if task is None else find_task(task)
    ours = is_ours(output)
    check_output(output, "compressed model", ours=ours)
    making = {
        "chain": chain.name,
        "task": None if found is None else found.name,
        "data": data,
        "seed": seed,
        "steps": [step.identity() for step in chain.steps],
    }
    context = None
    if found is None:
        _check_untrained(source, chain)
    else:
        context = ChainContext(
            teacher=source,
            task=found,
            data=data,
            output=output,
            max_length=min(found.usual_length, max_positions(load(model_folder(source)))),
            allow_weak_teacher=allow_weak_teacher,
            say=say,
        )
        check_chain(chain, context)
    begin(output, source, making)
    try:
        if context is None:
            made, notes = _without_task(source, chain, output, seed), list[str]()
        else:
            made = run_chain(chain, context, seed)
            notes = chain_record(chain, context, seed).notes
    except UserError:
        if not ours:
            release(output)
        raise
    command = compress_command(
        source,
        {"--method": method},
        task,
        data,
        overrides,
        seed,
        output,
        allow_weak_teacher=allow_weak_teacher,
    )
    return finish_single(source, made, chain, output, found, data, notes, command)


def compress_command(
    source: str,
    wanted: Mapping[str, Any],
    task: str | None,
    data: str | None,
    overrides: Sequence[str],
    seed: int,
    output: Path | str,
    *,
    allow_weak_teacher: bool = False,
) -> str:
    """The command line that makes a model again; `wanted` is its options --method, or of a target."""
    words = ["fastdistil", "compress", source]
    words += [word for name, value in wanted.items() if value is not None for word in (name, str(value))]
    words += [] if task is None else ["--task", task]
    words += [] if data is None else ["--data", data]
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--allow-weak-teacher"] if allow_weak_teacher else []
    return shlex.join([*words, "--seed", str(seed), "--output", str(output)])


def finish_single(
    source: str,
    made: Path,
    chain: Chain,
    output: Path,
    task: Task | None,
    data: str | None,
    notes: Sequence[str],
    command: str,
) -> CompressResult:
    """Measure the model in the folder `made` beside the original, and leave it in `output`, with its card.

    `command` makes it again, for the card.
    """
    original = model_folder(source)
    load_as_scored = float_reference(original)
    positions = max_positions(load(original))
    length = min(LENGTH, positions)
    folders = {"before": original, "after": made}
    timings = measure(folders, threads=[1], batch_sizes=[1], length=length, load=load_as_scored)
    examples = None if task is None else read_examples(task, data, "validation")
    sides = {}
    for name, folder in folders.items():
        model, scores = load_as_scored(folder), None
        if task is not None and examples is not None:
            tokenizer = load_fitting_tokenizer(folder, model, masks=False)
            held_out = encode(task, examples, tokenizer, min(task.usual_length, positions))
            scores = evaluate_task(model, task, held_out)
        score = None if scores is None or task is None else mean_score(task, scores)
        latency = timings[name][0].p50_ms
        sides[name] = Side(count_parameters(model), bytes_on_disk(folder), latency, scores, score)
    result = CompressResult(output / "model", chain.name, length, sides["before"], sides["after"], [*notes])
    aside = output / ".writing-model"
    shutil.rmtree(aside, ignore_errors=True)  # of a copy that was killed
    shutil.copytree(made, aside)
    publish(aside, output / "model")
    write_card(
        output / "model",
        title=f"{Path(source).name}, {chain.name}",
        command=command,
        made_of=source,
        steps=chain.descriptions,
        facts=result.rows()[2:],
    )
    write_json(output / RESULT, {**asdict(result), "path": "model"})
    return result


def is_ours(output: Path) -> bool:
    """Whether `begin` was called for the folder: what is in its models/ and model/ may be replaced."""
    return (output / MARKER).is_file()


def begin(output: Path, source: str, making: Mapping[str, Any]) -> None:
    """Make the folder, which was checked, one that models are compressed in.

    `making` is what decides the model.

    Raises `UserError` where the folder holds the finished model of something else.
    """
    wanted = json.loads(json.dumps({"model": source, **making}))
    if is_ours(output) and (output / RESULT).is_file():
        held = json.loads((output / MARKER).read_text(encoding="utf-8"))
        # Of a folder that an earlier version began, only the source is known.
        if change := difference(held, {key: wanted.get(key) for key in held}):
            raise UserError(
                f"output {output} holds the finished model of another command: {change}; choose another "
                "--output"
            )
    write_json(output / MARKER, wanted)


def release(output: Path) -> None:
    """Take back a claim where a mistake was found before anything was made: the next try may differ."""
    # A training that was refused has taken its run/ back.
    made = (_UNTRAINED, *(f"*/seed-*/{name}" for name in (RECORD, "model", "run")))
    if not any(any(output.glob(f"models/{name}")) for name in made):
        shutil.rmtree(output, ignore_errors=True)


def _check_untrained(source: str, chain: Chain) -> None:
    for step in chain.steps:
        if step.is_recipe:
            raise UserError(f"{step} trains a student for a task: add --task NAME")
    refuse_runtime(chain.steps[0], source, read_exported(source))


def _without_task(source: str, chain: Chain, output: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    # A model whose file is in half precision stays in it, unless a step is to round its weights further.
    rounds = any(step.method.kind == "quantisation" for step in chain.steps)
    model: Any = load(source, dtype=torch.float32 if rounds and not is_compressed(source) else None)
    for before, step in zip((None, *chain.steps), chain.steps, strict=False):
        refuse_runtime(step, f"what {before} makes", getattr(model, "exported", None))
        options = step.method_options()
        model = step.method.finish(step.method.apply(model, options, None), options)
    folder = output / "models" / _UNTRAINED
    save_model(model, load_tokenizer(source, masks=False), folder)
    return folder
