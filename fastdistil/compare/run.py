"""A whole comparison: make and score the models of all methods, time them side by side, write the report.

output/
  compare.json, rows/, timings.json     what is finished (see pieces)
  models/                               the models (see chain)
  results.json                          the rows so far, rewritten after each
  results.md, report.html, pictures     written last
"""

import json
import shlex
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from transformers.utils.logging import disable_progress_bar

from fastdistil.compare.chain import ChainContext, chain_record, check_chain, run_chain
from fastdistil.compare.costs import Measured, Setting, measure_costs
from fastdistil.compare.machine import describe_machine
from fastdistil.compare.pieces import Piece, Pieces, fingerprint, slug, weights_sha256
from fastdistil.compare.progress import CompareLog
from fastdistil.compare.results import Comparison, Row, write_comparison
from fastdistil.compare.single import compress_command
from fastdistil.compare.steps import Chain, parse_chains
from fastdistil.compress.store import load
from fastdistil.data.task_encoding import EncodedTask, encode
from fastdistil.data.tasks import Examples, Task, find_task, read_examples
from fastdistil.errors import RunError, UserError, one_line
from fastdistil.evaluate import (
    bytes_on_disk,
    check_teacher,
    count_parameters,
    evaluate_task,
)
from fastdistil.evaluate.cost import LENGTH, model_folder
from fastdistil.export.card import write_card
from fastdistil.models.load import load_fitting_tokenizer, max_positions
from fastdistil.models.task import load_task_model
from fastdistil.paths import one_spelling
from fastdistil.schema import Section

TEACHER = "teacher"


class CompareConfig(Section):
    """What is compared."""

    teacher: str = Field(description="Folder or hub id of a model with a head for the task.")
    task: str = Field(description="Name of the task.")
    data: str | None = Field(default=None, description="Folder of the task's files; null: the hub.")
    methods: list[str] = Field(min_length=1, description="Chains, such as kd+prune-ffn:0.5+int8.")
    output: Path = Field(description="Folder of the comparison. One that was interrupted goes on.")
    seeds: int = Field(default=3, ge=1, description="Runs of each method that trains.")
    overrides: list[str] = Field(default=[], description="NAME.KEY=VALUE, as of `parse_chain`.")
    max_length: int | None = Field(
        default=None, ge=8, description="Tokens an example; null: 128, of squad 384, or what the teacher has."
    )
    allow_weak_teacher: bool = Field(default=False, description="Go on with a teacher at chance level, too.")
    rounds: int = Field(default=10, ge=1, description="Of the timing; each has three passes of every model.")
    device: str = Field(default="cpu", description="Where torch models are timed.")


def compare(config: CompareConfig, log: CompareLog | None = None) -> Comparison:
    """Compare as `config` says, and write everything to `config.output`.

    What is finished in that folder is not repeated. A method that fails is a row with its error, and is tried
    again the next time.

    Raises:
        UserError: an unknown method, option or key of a training; a folder that holds another comparison; a
            teacher that cannot be read or is no better than chance; anything wrong with the task.
        KeyboardInterrupt: after Ctrl-C; what is finished is kept, and the same call goes on.
    """
    disable_progress_bar()
    spelled = {
        "teacher": one_spelling(config.teacher),
        "data": None if config.data is None else one_spelling(config.data),
        "output": config.output.expanduser(),
    }
    with log or CompareLog() as log:
        return _Run(config.model_copy(update=spelled), log).whole()


class _Run:
    def __init__(self, config: CompareConfig, log: CompareLog) -> None:
        self.config, self.log = config, log
        self.task: Task = find_task(config.task)
        self.chains = parse_chains(config.methods, config.overrides)
        for chain, text in zip(self.chains, config.methods, strict=True):
            if chain.name == TEACHER:
                raise UserError(f"{text}: the row of the teacher itself has that name; rename the file")
        # As the user wrote them: the name of a chain in a file is not where it lies.
        self.texts = dict(zip((chain.name for chain in self.chains), config.methods, strict=True))
        # What is known of a method's row beforehand.
        self.rows = {
            chain.name: Row(chain.name, chain.kind, self._command(chain), description=chain.description)
            for chain in self.chains
        }
        self.seeds = {chain.name: range(config.seeds if chain.trains else 1) for chain in self.chains}
        self.pieces = Pieces(config.output)
        self.errors: dict[str, str] = {}
        self.done: dict[str, dict[int, Piece]] = {chain.name: {} for chain in self.chains}
        self.measured: Measured | None = None

    def whole(self) -> Comparison:
        self._open()
        for chain in self.chains:  # before anything is made: what is wrong, or was made otherwise
            check_chain(chain, self.context)
            self._find(chain)
        self._score_teacher()
        self._write()
        to_make = [
            (chain, seed)
            for chain in self.chains
            for seed in self.seeds[chain.name]
            if seed not in self.done[chain.name]
        ]
        for number, (chain, seed) in enumerate(to_make, start=1):
            if chain.name not in self.errors:
                self._make(chain, seed, number, len(to_make))
                self._write()
        self._measure()
        return self._report()

    def _open(self) -> None:
        """The teacher, the held-out examples, and the folder."""
        config = self.config
        self.teacher, tokenizer = load_task_model(config.teacher, self.task, new_head=False)
        self.teacher_folder = model_folder(config.teacher)
        self.positions = max_positions(self.teacher)
        self.max_length = config.max_length or min(self.task.usual_length, self.positions)
        if self.max_length > self.positions:
            raise UserError(
                f"max_length is {self.max_length}, but {config.teacher} has only {self.positions} positions"
            )
        self.examples: Examples = read_examples(self.task, config.data, "validation")
        self.encoded: dict[str, EncodedTask] = {}
        self.held_out = self._encode(tokenizer)
        self.identity = {
            "teacher": {"source": config.teacher, "sha256": weights_sha256(self.teacher_folder)},
            "task": self.task.name,
            "data": config.data,
            "held_out": self.held_out.sha256,
            "max_length": self.max_length,
        }
        self.pieces.check(self.identity)
        self.machine = describe_machine()
        self.context = ChainContext(
            teacher=config.teacher,
            task=self.task,
            data=config.data,
            output=config.output,
            max_length=self.max_length,
            allow_weak_teacher=config.allow_weak_teacher,
            teacher_is_checked=True,
            say=lambda text: self.log.say(f"    {text}"),
        )

    def _encode(self, tokenizer: Any) -> EncodedTask:
        """The held-out examples in a model's tokens, which are those of the teacher for most."""
        key = tokenizer.backend_tokenizer.to_str()
        if key not in self.encoded:
            self.encoded[key] = encode(self.task, self.examples, tokenizer, self.max_length)
        return self.encoded[key]

    def _find(self, chain: Chain) -> None:
        for seed in self.seeds[chain.name]:
            if piece := self.pieces.find(chain.name, seed, _identity(chain)):
                self.done[chain.name][seed] = piece

    def _score_teacher(self) -> None:
        """The teacher's scores, before anything is learnt from it."""
        found = self.pieces.find(TEACHER, 0, {})
        scored = found is None
        if found is None:
            scores = evaluate_task(self.teacher, self.task, self.held_out)
            parameters = count_parameters(self.teacher)
            found = Piece({}, None, scores, parameters, bytes_on_disk(self.teacher_folder), None)
        self.teacher_piece = found
        del self.teacher
        check_teacher(
            self.config.teacher,
            self.task,
            found.scores,
            self.held_out.labels,
            self.log.say,
            allow_weak=self.config.allow_weak_teacher,
        )
        if scored:
            self.pieces.begin(self.identity)
            self.pieces.keep(TEACHER, 0, found)

    def _make(self, chain: Chain, seed: int, number: int, total: int) -> None:
        many = f", seed {seed}" if len(self.seeds[chain.name]) > 1 else ""
        self.log.begin_model(f"{chain.name}{many}", number, total)
        threads = torch.get_num_threads()
        try:
            folder = run_chain(chain, self.context, seed)
            piece = self._score(chain, seed, folder)
        except Exception as error:  # whatever it is, the other methods are of use
            self.errors[chain.name] = one_line(error)
            if not isinstance(error, UserError | RunError):
                self.pieces.traceback_file(chain.name, seed).write_text(traceback.format_exc())
            self.log.fail_model(self.errors[chain.name])
            return
        finally:
            torch.set_num_threads(threads)
        self.pieces.keep(chain.name, seed, piece)
        self.done[chain.name][seed] = piece
        self.log.end_model(", ".join(f"{name} {value:.4f}" for name, value in piece.scores.items()))

    def _score(self, chain: Chain, seed: int, folder: Path) -> Piece:
        model = load(folder)
        data = self._encode(load_fitting_tokenizer(folder, model, masks=False))
        record = chain_record(chain, self.context, seed)
        scores = evaluate_task(model, self.task, data)
        parameters, disk_bytes = count_parameters(model), bytes_on_disk(folder)
        write_card(
            folder,
            title=f"{Path(self.config.teacher).name}, {chain.name}",
            command=self._command(chain, seed),
            made_of=self.config.teacher,
            steps=chain.descriptions,
            facts=[
                *((f"{self.task.name}, {name}", f"{value:.4f}") for name, value in scores.items()),
                ("parameters", f"{parameters / 1e6:.2f} M"),
                ("size on disk", f"{disk_bytes / 1e6:.1f} MB"),
            ],
        )
        source = folder.relative_to(self.config.output).as_posix()
        return Piece(_identity(chain), source, scores, parameters, disk_bytes, record.seconds, record.notes)

    def _measure(self) -> None:
        """Time the models that are made, unless all of them have been, and together."""
        folders = {TEACHER: self.teacher_folder, **dict(self._folders())}
        known = {name: fingerprint(folder) for name, folder in folders.items()}
        setting = Setting(min(LENGTH, self.positions), self.config.rounds, self.config.device)
        measured = self.pieces.measured()
        if measured is None or not measured.covers(setting.key, known):
            self.log.say(f"measuring {len(folders)} models")
            measured = measure_costs(folders, known, setting, self.log.advance)
            self.log.end_bar()
            self.pieces.keep_measured(measured)
        self.measured = measured

    def _folders(self) -> Iterator[tuple[str, Path]]:
        """Method -> the model of its first seed."""
        for name, pieces in self.done.items():
            if pieces and name not in self.errors:
                folder = pieces[min(pieces)].folder
                assert folder is not None
                yield name, self.config.output / folder

    def _report(self) -> Comparison:
        from fastdistil.compare.page import write_page
        from fastdistil.compare.pictures import draw
        from fastdistil.compare.table import console_table, markdown

        comparison, output = self._write(), self.config.output
        draw(comparison, output)
        write_page(output, comparison)
        (output / "results.md").write_text(markdown(comparison), encoding="utf-8")
        self.log.print(console_table(comparison))
        self.log.say(f"written to {output}")
        return comparison

    def _write(self) -> Comparison:
        """All rows that there is something to say of."""
        rows = [self._row(name) for name in self.rows if self.done[name] or name in self.errors]
        pieces = [(name, piece) for name, own in self.done.items() for piece in own.values()]
        notes = [f"{name}: {note}" for name, piece in pieces for note in piece.notes]
        notes += [] if self.measured is None else self.measured.notes
        count = len(self.examples)
        comparison = Comparison(
            task=self.task.name,
            teacher=self.config.teacher,
            metrics=list(self.task.metrics),
            held_out=f"Scores on the {count:,} {self.examples.split} examples of {self.task.name}.",
            machine=self.machine,
            seeds=list(range(self.config.seeds)),
            rows=[self._teacher_row(), *rows],
            notes=list(dict.fromkeys(notes)),
        )
        write_comparison(self.config.output, comparison)
        return comparison

    def _teacher_row(self) -> Row:
        piece = self.teacher_piece
        row = Row(
            method=TEACHER,
            kind="teacher",
            command=shlex.join(["fastdistil", "evaluate", self.config.teacher, *self._on_task()]),
            description="the model that all others start or learn from, in float32",
            parameters=piece.parameters,
            disk_bytes=piece.disk_bytes,
            scores=[piece.scores],
        )
        return self._with_costs(row)

    def _row(self, name: str) -> Row:
        own = self.done[name]
        pieces = [own[seed] for seed in sorted(own)]
        row = replace(self.rows[name], error=self.errors.get(name))
        if pieces:
            times = [piece.seconds for piece in pieces if piece.seconds is not None]
            row = replace(
                row,
                folder=pieces[0].folder,
                parameters=pieces[0].parameters,
                disk_bytes=pieces[0].disk_bytes,
                scores=[piece.scores for piece in pieces],
                seconds=sum(times) / len(times) if times else None,
            )
        return self._with_costs(row)

    def _with_costs(self, row: Row) -> Row:
        if self.measured is None:
            return row
        if row.method in self.measured.failures:
            return replace(row, error=row.error or self.measured.failures[row.method])
        cost = self.measured.costs.get(row.method)
        if cost is None or row.error is not None:
            return row
        return replace(
            row,
            timings=cost.timings,
            sequences_per_second=cost.sequences_per_second,
            peak_bytes=cost.peak_bytes,
            joules=cost.joules,
        )

    def _command(self, chain: Chain, seed: int = 0) -> str:
        """What makes the chain's model."""
        config = self.config
        return compress_command(
            config.teacher,
            {"--method": self.texts[chain.name]},
            self.task.argument,
            config.data,
            chain.overrides,
            seed,
            slug(chain.name),
            allow_weak_teacher=config.allow_weak_teacher,
        )

    def _on_task(self) -> list[str]:
        data = [] if self.config.data is None else ["--data", self.config.data]
        return ["--task", self.task.argument, *data]


def _identity(chain: Chain) -> dict[str, Any]:
    """JSON-able, as it is when it is read again."""
    plain: dict[str, Any] = json.loads(json.dumps({"steps": [step.identity() for step in chain.steps]}))
    return plain
