"""A table's columns as checked texts, labels and answers. Rows count from 1 in messages.

Every function here takes `where`, the file or dataset, and the column's `name` and `values`; its UserError
names the first row that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastdistil.errors import UserError

# A label that is kept back, as the hub, GLUE's files and SNLI's files write it.
NO_LABEL = (None, "", "-", -1, "-1")


def texts(where: str, name: str, values: Sequence[Any], *, incomplete: bool = False) -> list[str | None]:
    """Strings that are not blank; with `incomplete`, None where there is none or a blank one."""
    for row, value in enumerate(values, 1):
        if value is None and not incomplete:
            raise UserError(f"{where}, row {row}: {name!r} is missing")
        if not isinstance(value, str | None):
            raise UserError(f"{where}, row {row}: {name!r} is {value!r}, not text")
        if value is not None and not value.strip() and not incomplete:
            raise UserError(f"{where}, row {row}: {name!r} is empty")
    return [value if value and value.strip() else None for value in values]


def joined_texts(where: str, name: str, values: Sequence[Any]) -> list[str]:
    """As `texts`, of lists of strings too, which are put together with a line break between them."""
    plain = []
    for row, value in enumerate(values, 1):
        if isinstance(value, list):
            if not all(isinstance(part, str) for part in value):
                raise UserError(f"{where}, row {row}: {name!r} holds something that is not text")
            value = "\n".join(value)
        plain.append(value)
    return [text for text in texts(where, name, plain) if text is not None]


def class_numbers(
    where: str, name: str, values: Sequence[Any], classes: tuple[str, ...], *, incomplete: bool = False
) -> list[int | None]:
    """The number of each label, which is a number or the name of a class; of classes that are called by
    numbers, such as 1 to 5, the name.

    With `incomplete`, None where there is no label, unless there is none at all.
    """
    _refuse_hidden(where, name, values, incomplete)
    number_of = {label: number for number, label in enumerate(classes)}
    names_alone = any(_whole_number(label) is not None for label in classes)
    numbers: list[int | None] = []
    for row, value in enumerate(values, 1):
        if value in NO_LABEL:
            numbers.append(None)
            continue
        whole = _whole_number(value)
        number = number_of.get(value if isinstance(value, str) else str(whole))
        if number is None and not names_alone:
            number = whole
        if number is None or not 0 <= number < len(classes):
            numbered = [f"{number} ({label})" for number, label in enumerate(classes)]
            known = ", ".join(classes if names_alone else numbered)
            raise UserError(f"{where}, row {row}: {name!r} is {value!r}; the classes are {known}")
        numbers.append(number)
    return numbers


def scores(where: str, name: str, values: Sequence[Any], least: float, greatest: float) -> list[float]:
    """Numbers in [least, greatest]."""
    _refuse_hidden(where, name, values, incomplete=False)
    numbers = []
    for row, value in enumerate(values, 1):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (least <= number <= greatest and math.isfinite(number)):
            bounds = "" if math.inf in (-least, greatest) else f" from {least:g} to {greatest:g}"
            raise UserError(f"{where}, row {row}: {name!r} is {value!r}, not a number{bounds}")
        numbers.append(number)
    return numbers


def option_lists(where: str, name: str, values: Sequence[Any], count: int) -> list[tuple[str, ...]]:
    """`count` strings a row."""
    options = []
    for row, value in enumerate(values, 1):
        if not isinstance(value, list) or not all(
            isinstance(option, str) and option.strip() for option in value
        ):
            raise UserError(f"{where}, row {row}: {name!r} is {value!r}, not a list of texts")
        if len(value) != count:
            raise UserError(f"{where}, row {row}: {name!r} has {len(value)} options, the task has {count}")
        options.append(tuple(value))
    return options


def chosen_options(
    where: str,
    name: str,
    values: Sequence[Any],
    options: Sequence[tuple[str, ...]],
    classes: tuple[str, ...],
) -> list[int | None]:
    """Which option is right, from a column of numbers, of letters or of the options' own texts."""
    short = [value in NO_LABEL or value in classes or _whole_number(value) is not None for value in values]
    worded = all(value in choices for value, choices in zip(values, options, strict=True))
    # An option may itself be a letter or a number: a column of options' texts may hold a few such.
    if all(short) or (any(short) and not worded):
        return class_numbers(where, name, values, classes)
    for row, (value, choices) in enumerate(zip(values, options, strict=True), 1):
        if value not in choices:
            raise UserError(f"{where}, row {row}: {name!r} is {value!r}, which is none of the row's options")
    return [choices.index(value) for value, choices in zip(values, options, strict=True)]


def answer_spans(
    where: str, name: str, values: Sequence[Any], contexts: Sequence[str]
) -> tuple[list[tuple[int, int]], list[tuple[str, ...]]]:
    """Where the first answer of each row stands in its context, as its first character and the one after its
    last, and all its answers.

    A value is {"text": [...], "answer_start": [...]}, as on the hub, or a list of {"text": ...,
    "answer_start": ...}, as in SQuAD's files.
    """
    spans, answers = [], []
    for row, (value, context) in enumerate(zip(values, contexts, strict=True), 1):
        given = _answers_of(f"{where}, row {row}", name, value)
        if not given:
            raise UserError(f"{where}, row {row}: {name!r} has no answer")
        for text, _ in given:
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}, row {row}: {name!r} is {text!r}, not text")
        text, at = given[0]
        start = _whole_number(at)
        if start is None or start < 0 or not context.startswith(text, start):
            raise UserError(f"{where}, row {row}: the answer {text!r} is not at {at!r} of the context")
        # Blanks at its ends would reach for the tokens beside it.
        start += len(text) - len(text.lstrip())
        spans.append((start, start + len(text.strip())))
        answers.append(tuple(text for text, _ in given))
    return spans, answers


def _answers_of(where: str, name: str, value: Any) -> list[tuple[Any, Any]]:
    """Text and start of each answer of a row."""
    if value is None:
        return []
    keys = ("text", "answer_start")
    if isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
        return [(answer.get(keys[0]), answer.get(keys[1])) for answer in value]
    if isinstance(value, dict):
        texts, starts = (value.get(key) for key in keys)
        texts, starts = texts or [], [] if starts is None else starts
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return list(zip(texts, starts, strict=True))
        if isinstance(texts, str) and not isinstance(starts, list):
            return [(texts, starts)]
    raise UserError(
        f'{where}: {name!r} is {value!r}, not {{"text": [...], "answer_start": [...]}} with as many of both, '
        "nor a list of such answers"
    )


def _refuse_hidden(where: str, name: str, values: Sequence[Any], incomplete: bool) -> None:
    without = [row for row, value in enumerate(values, 1) if value in NO_LABEL]
    if without and (len(without) == len(values) or not incomplete):
        value = values[without[0] - 1]
        what = "missing" if value in (None, "") else repr(value)
        raise UserError(
            f"{where}, row {without[0]}: {name!r} is {what}: this split has hidden labels and can neither be "
            "learned nor scored"
        )


def _whole_number(value: Any) -> int | None:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
        return int(value)
    return None
