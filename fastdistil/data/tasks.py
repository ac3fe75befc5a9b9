"""The tasks that teachers and students are scored on: their columns, labels, metrics, and where they are.

Columns, labels and splits are those of the datasets on the hub. GLUE: Wang et al. 2019, "GLUE: A Multi-Task
Benchmark and Analysis Platform for Natural Language Understanding".
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdistil.data.machine_task import LIBRARIES
from fastdistil.data.task_columns import (
    answer_spans,
    chosen_options,
    class_numbers,
    joined_texts,
    option_lists,
    scores,
    texts,
)
from fastdistil.data.task_file import SUFFIXES, read_task_file
from fastdistil.data.task_files import (
    MACHINE,
    VALIDATION,
    Table,
    find_folder,
    read_files,
    read_hub,
    split_files,
)
from fastdistil.errors import UserError

Kind = Literal["classification", "regression", "span", "choice"]


@dataclass(frozen=True)
class Task:
    """What a model must answer, and how the answers are scored.

    Attributes:
        name: as the user writes it.
        kind: one label of several, a number, a span of the context, or one of several options.
        columns: of the texts, in the order in which the model reads them.
        label: the label's column.
        labels: the names of the classes or options, in the order of their numbers.
        metrics: `evaluate_task` computes these, and `mean_score` is their mean.
        hub: the dataset of the hub, and its configuration, which may be ""; or "machine", of a task that is
            on this machine already (`fastdistil.data.machine_task`); "" for both: in files alone.
        splits: the one to train on, then those to be scored on, the first being the usual one.
        aliases: column -> other names that it has in files.
        header: the columns of files that come without their names.
        stems: file name -> split, of files that do not say it themselves.
        score_range: the least and the greatest target of a regression.
        incomplete: the dataset has rows without a label or with a blank text, which are left out; in other
            tasks such a row is an error.
        file: that the task is written in; None: it is one of ours.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    hub: tuple[str, str]
    splits: tuple[str, ...] = ("train", "validation")
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    stems: dict[str, str] = field(default_factory=dict)
    score_range: tuple[float, float] | None = None
    incomplete: bool = False
    file: Path | None = None

    @property
    def argument(self) -> str:
        """What `find_task` finds it by, such as the option --task."""
        return self.name if self.file is None else str(self.file)

    @property
    def num_labels(self) -> int:
        """Outputs of the head: classes or options; 1 for a score, 2 for the start and end of a span."""
        return {"regression": 1, "span": 2}.get(self.kind, len(self.labels))

    @property
    def usual_length(self) -> int:
        """Tokens of an example; of a question and a window of its context as in BERT's code for SQuAD."""
        return 384 if self.kind == "span" else 128


@dataclass(frozen=True)
class Examples:
    """Texts and what a model should answer. N examples.

    Attributes:
        texts: N tuples of the task's columns; for a choice task the context, the question and the options.
        labels: (N,) int64 classes or options, -100 where unknown; (N,) float32 scores, NaN where unknown;
            (N, 2) int64 first character of the answer in the context and the one after its last.
        answers: for spans, N tuples of all the answers that count as right.
        split: which split they are.
        left_out: how many rows of the split are not here because they are incomplete.
    """

    texts: list[tuple[str, ...]]
    labels: np.ndarray
    answers: list[tuple[str, ...]] | None = None
    split: str = ""
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """The examples `rows`, in this order."""
        answers = None if self.answers is None else [self.answers[row] for row in rows]
        return replace(self, texts=[self.texts[r] for r in rows], labels=self.labels[rows], answers=answers)


def _glue(name: str, columns: tuple[str, ...], labels: tuple[str, ...], *metrics: str, **more: Any) -> Task:
    kind: Kind = "classification" if labels else "regression"
    return Task(name, kind, columns, "label", labels, metrics, ("nyu-mll/glue", name), **more)


# Instead of SQuAD's nested "answers": one answer a row.
_SINGLE_ANSWER = ("answer_text", "answer_start")
_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")
_TASKS = (
    _glue("sst2", ("sentence",), ("negative", "positive"), "accuracy"),
    _glue(
        "cola",
        ("sentence",),
        ("unacceptable", "acceptable"),
        "matthews",
        header=("source", "label", "star", "sentence"),
    ),
    _glue(
        "mrpc",
        _PAIR,
        ("not_equivalent", "equivalent"),
        "accuracy",
        "f1",
        aliases={"sentence1": ("#1 String",), "sentence2": ("#2 String",), "label": ("Quality",)},
    ),
    _glue("stsb", _PAIR, (), "pearson", "spearman", aliases={"label": ("score",)}, score_range=(0.0, 5.0)),
    _glue(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        "accuracy",
        "f1",
        aliases={"label": ("is_duplicate",)},
        incomplete=True,
    ),
    _glue(
        "mnli",
        ("premise", "hypothesis"),
        _NLI,
        "accuracy",
        splits=("train", "validation_matched", "validation_mismatched"),
        aliases={"premise": ("sentence1",), "hypothesis": ("sentence2",), "label": ("gold_label",)},
        incomplete=True,
    ),
    _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment"), "accuracy"),
    _glue("rte", _PAIR, ("entailment", "not_entailment"), "accuracy"),
    _glue("wnli", _PAIR, ("not_entailment", "entailment"), "accuracy"),
    Task(
        "imdb",
        "classification",
        ("text",),
        "label",
        ("neg", "pos"),
        ("accuracy",),
        ("stanfordnlp/imdb", "plain_text"),
        splits=("train", "test"),
    ),
    Task(
        "snli",
        "classification",
        ("premise", "hypothesis"),
        "label",
        _NLI,
        ("accuracy",),
        ("stanfordnlp/snli", "plain_text"),
        splits=("train", "validation", "test"),
        aliases={"premise": ("sentence1",), "hypothesis": ("sentence2",), "label": ("gold_label",)},
        incomplete=True,
    ),
    Task(
        "squad",
        "span",
        ("question", "context"),
        "answers",
        (),
        ("exact_match", "f1"),
        ("rajpurkar/squad", "plain_text"),
        stems={"xquad_en": "validation"},
    ),
    Task(
        "race",
        "choice",
        ("article", "question", "options"),
        "answer",
        ("A", "B", "C", "D"),
        ("accuracy",),
        ("ehovy/race", "all"),
        splits=("train", "validation", "test"),
        aliases={"answer": ("label",)},
    ),
    Task(
        "dream",
        "choice",
        ("dialogue", "question", "choice"),
        "answer",
        ("A", "B", "C"),
        ("accuracy",),
        ("dataset-org/dream", "plain_text"),
        splits=("train", "validation", "test"),
        aliases={"dialogue": ("article",), "choice": ("options",), "answer": ("label",)},
    ),
    Task(
        "libraries",
        "classification",
        ("sentence",),
        "label",
        LIBRARIES,
        ("accuracy",),
        (MACHINE, "libraries"),
    ),
)
TASKS = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """The task of this name, without regard to case and hyphens ("SST-2" is "sst2"), or that is written in
    the YAML file of this path (see `fastdistil.data.task_file`). UserError if there is none."""
    if name.lower().endswith(SUFFIXES):
        return _own_task(Path(name).expanduser())
    wanted = name.lower().replace("-", "")
    if wanted in TASKS:
        return TASKS[wanted]
    near = difflib.get_close_matches(wanted, TASKS, n=1)
    known = f"the tasks are {', '.join(TASKS)}; one of your own is a YAML file, tasks/{wanted}.yaml"
    hint = f"did you mean {near[0]!r}?" if near else known
    raise UserError(f"unknown task {name!r}; {hint}")


def _own_task(file: Path) -> Task:
    own = read_task_file(file)
    path, _, configuration = (own.hub or "").partition(":")
    regression = own.kind == "regression"
    return Task(
        name=own.name or file.stem,
        kind=own.kind,
        columns=tuple(own.columns),
        label=own.label,
        labels=tuple(own.labels),
        metrics=tuple(own.metrics or (("pearson", "spearman") if regression else ("accuracy",))),
        hub=(path, configuration),
        splits=tuple(own.splits),
        score_range=own.range or (-math.inf, math.inf) if regression else None,
        file=file,
    )


def read_examples(task: Task, data: str | Path | None, split: str) -> Examples:
    """The examples of a split.

    Args:
        data: the folder of the task's files, or one that has it as `<task>/` or `glue/<task>/`; None reads
            the dataset of the hub, or what is on this machine, for which "machine" may be given, too.
        split: "train", "validation" or one of the task's own. "validation" is the usual split to be scored
            on: MNLI's is the matched one, and of IMDb, which has none, or where its files are not there, it
            is the test split. `Examples.split` says which it was.

    Raises:
        UserError: what is missing or wrong, with the file, the row (counted from 1) and the column.
    """
    splits = [split]
    if split in VALIDATION:
        splits = sorted(dict.fromkeys((*task.splits[1:], "validation")), key=lambda name: name == "test")
    wanted = {name for column in (*task.columns, task.label) for name in _spellings(task, column)}
    wanted |= set(_SINGLE_ANSWER)
    if data is None and not task.hub[0]:
        raise UserError(f"{task.file} names no dataset of the hub: give the folder of its files, --data")
    if data is None or (data == MACHINE and task.hub[0] == MACHINE):
        there = task.splits[1] if split in VALIDATION else split
        return _examples(task, read_hub(*task.hub, there, wanted), there)
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'there is no such folder'}")
    folder = find_folder(root, task.name)
    errors = []
    for candidate in splits:
        try:
            files = split_files(folder, candidate, task.stems)
        except UserError as error:
            errors.append(error)
        else:
            return _examples(task, read_files(files, wanted, task.header), candidate)
    raise errors[0]


def _examples(task: Task, table: Table, split: str) -> Examples:
    columns = [_column(task, table, column) for column in task.columns]
    if not columns[0][1]:
        raise UserError(f"{table.where} has no rows")
    if task.kind == "span":
        return _span_examples(task, table, columns, split)
    if task.kind == "choice":
        return _choice_examples(task, table, columns, split)
    where, (label, values) = table.where, _column(task, table, task.label)
    read = [texts(where, *column, incomplete=task.incomplete) for column in columns]
    if task.score_range is not None:
        targets = np.array(scores(where, label, values, *task.score_range), dtype=np.float32)
        return Examples(list(zip(*read, strict=True)), targets, split=split)  # type: ignore[arg-type]
    numbers = class_numbers(where, label, values, task.labels, incomplete=task.incomplete)
    rows: list[Any] = [row for row in zip(*read, numbers, strict=True) if None not in row]
    labels = np.array([row[-1] for row in rows], dtype=np.int64)
    return Examples([row[:-1] for row in rows], labels, split=split, left_out=len(numbers) - len(rows))


def _choice_examples(task: Task, table: Table, columns: list[tuple[str, list[Any]]], split: str) -> Examples:
    passage, question, options = columns
    choices = option_lists(table.where, *options, task.num_labels)
    numbers = chosen_options(table.where, *_column(task, table, task.label), choices, task.labels)
    read = zip(joined_texts(table.where, *passage), texts(table.where, *question), choices, strict=True)
    rows: list[Any] = [(text, asked, *answers) for text, asked, answers in read]
    return Examples(rows, np.array(numbers, dtype=np.int64), split=split)


def _span_examples(task: Task, table: Table, columns: list[tuple[str, list[Any]]], split: str) -> Examples:
    question, context = (joined_texts(table.where, *column) for column in columns)
    spans, answers = answer_spans(table.where, *_answers(task, table), context)
    labels = np.array(spans, dtype=np.int64)
    return Examples(list(zip(question, context, strict=True)), labels, answers, split)


def _spellings(task: Task, column: str) -> tuple[str, ...]:
    return (column, *task.aliases.get(column, ()))


def _column(task: Task, table: Table, column: str) -> tuple[str, list[Any]]:
    """The column's name in the table, and its values."""
    for name in _spellings(task, column):
        if name in table.columns:
            return name, table.columns[name]
    spellings = " or ".join(map(repr, _spellings(task, column)))
    raise UserError(f"{table.where}: no column {spellings}; the columns there are {', '.join(table.names)}")


def _answers(task: Task, table: Table) -> tuple[str, list[Any]]:
    if set(_SINGLE_ANSWER) <= table.columns.keys():
        name, start = _SINGLE_ANSWER
        pairs = zip(table.columns[name], table.columns[start], strict=True)
        return name, [{"text": [text], "answer_start": [at]} for text, at in pairs]
    return _column(task, table, task.label)
