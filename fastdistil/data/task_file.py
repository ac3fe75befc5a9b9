"""A task of the user's own: a YAML file that says what its columns, labels and metrics are.

columns: [title, body]            # of the texts, one or two
label: queue
labels: [billing, bug, feature]   # a column of numbers counts them from 0
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fastdistil.data.task_columns import NO_LABEL
from fastdistil.errors import UserError
from fastdistil.schema import Section, in_words, nearest

SUFFIXES = (".yaml", ".yml")


def _plain(value: Any) -> Any:
    """Stars 1 to 5 need no quotes; `yes` and `no` do, of which YAML does not say what was written."""
    if isinstance(value, bool) or value is None:
        raise ValueError("in YAML yes, no, on, off and null are no text: write it in quotes")
    return str(value) if isinstance(value, int) else value


Label = Annotated[str, BeforeValidator(_plain), Field(min_length=1)]


class TaskFile(Section):
    name: str | None = Field(default=None, min_length=1, description="None: the file's")
    kind: Literal["classification", "regression"] = Field(
        default="classification", description="one label of several, or a number"
    )
    columns: list[str] = Field(
        min_length=1, max_length=2, description="of the texts, in the order in which the model reads them"
    )
    label: str = Field(default="label", description="the column of the labels or numbers")
    labels: list[Label] = Field(
        default=[], description="the classes; a column of numbers counts them from 0, unless they are numbers"
    )
    metrics: list[Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"]] = Field(
        default=[],
        description="their mean is the score; default accuracy, or pearson and spearman; f1 is that of the "
        "second of two classes",
    )
    hub: str | None = Field(
        default=None, description="owner/dataset, or owner/dataset:configuration; None: --data has the files"
    )
    splits: list[str] = Field(
        default=["train", "validation"],
        min_length=2,
        description="the one to train on, then those to be scored on, the first being the usual one",
    )
    range: tuple[float, float] | None = Field(
        default=None, description="the least and the greatest number; None: any"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        of_kind = {"classification": ["accuracy", "f1", "macro_f1", "matthews"]}
        allowed = of_kind.get(self.kind, ["pearson", "spearman"])
        if wrong := [metric for metric in self.metrics if metric not in allowed]:
            raise ValueError(f"metrics: {wrong[0]} is not for {self.kind}, which has {', '.join(allowed)}")
        for key in ("columns", "labels", "metrics", "splits"):
            values = getattr(self, key)
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise ValueError(f"{key}: {twice[0]!r} stands there twice")
        if self.label in self.columns:
            raise ValueError(f"label: {self.label!r} is one of the columns")
        if self.kind == "regression":
            if self.labels:
                raise ValueError("labels: a regression has none")
            if self.range is not None and not self.range[0] < self.range[1]:
                raise ValueError(f"range: the first must be less than the second, got {[*self.range]}")
            return self
        if len(self.labels) < 2:
            raise ValueError("labels: name the classes, two or more, in the order of their numbers")
        if "f1" in self.metrics and len(self.labels) != 2:
            raise ValueError(f"metrics: f1 is for two classes, and there are {len(self.labels)}: macro_f1")
        if hidden := [label for label in self.labels if label in NO_LABEL]:
            raise ValueError(f"labels: {hidden[0]!r} marks a row without a label: choose another name")
        if self.range is not None:
            raise ValueError("range: a classification has none")
        return self


def read_task_file(file: Path) -> TaskFile:
    """`UserError`, one line with the file and the key, for anything that does not fit."""
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"task {file}: there is no such file") from None
    except OSError as error:
        raise UserError(f"task {file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"task {file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise UserError(f"task {file}: keys and values are wanted: {', '.join(TaskFile.model_fields)}")
    try:
        return TaskFile.model_validate(plain)
    except ValidationError as error:
        raise UserError(f"task {file}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}: {nearest(key, TaskFile.model_fields)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    return in_words(first, key)
