"""What the commands share: the application, options that several have, and what they print."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

import fastdistil
from fastdistil.errors import UserError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make small encoder models out of big ones, and show what each way of shrinking costs.",
)


def _print_version(value: bool) -> None:
    if value:
        print(f"fastdistil {fastdistil.__version__}")
        raise typer.Exit


@app.callback()
def _of_no_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@dataclass
class Invocation:
    """One call of the command; typer hands it to every command as `ctx.obj`."""

    arguments: list[str]
    debug: bool = False


def _set_debug(ctx: typer.Context, value: bool) -> None:
    ctx.obj.debug = value


Debug = Annotated[
    bool,
    typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error."),
]


TaskName = Annotated[
    str | None,
    typer.Option(
        help="sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte, wnli, imdb, squad, race, ..., or a YAML file."
    ),
]
TaskFolder = Annotated[
    str | None, typer.Option(help="Folder of the task's files (parquet, tsv, json); without it, the hub.")
]
AllowWeakTeacher = Annotated[
    bool, typer.Option("--allow-weak-teacher", help="Learn from a teacher at chance level, too.")
]


@contextmanager
def going_on(ctx: typer.Context, hint: str, *more: str) -> Iterator[None]:
    """On Ctrl-C say how to go on: `hint`, and the command line with `more`."""
    try:
        yield
    except KeyboardInterrupt:
        again = [argument for argument in ctx.obj.arguments if argument not in more]
        say(f"interrupted; {hint}: {shlex.join(['fastdistil', *again, *more])}")
        raise


def refuse(needed: str, given: dict[str, object]) -> None:
    """A `UserError` for an option that is `given` and would do nothing without the one that is `needed`."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} is for {needed}: add it, or leave {name} out")


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:{width}}  {value}")


def say(text: str) -> None:
    print(f"fastdistil: {' '.join(text.split())}", file=sys.stderr)
