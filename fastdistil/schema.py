"""The base of every section of a configuration, and what is said where one does not fit."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Section(BaseModel):
    """Documented keys, each with its type and range; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def in_words(error: "ErrorDetails", where: str) -> str:
    """`where: what must hold, got what is there`, of one of pydantic's errors; `where` may be empty."""
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{shown}".removeprefix(": ")


def nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean prefix + the known key that is like it?`, or all that are known."""
    known = [*known]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
