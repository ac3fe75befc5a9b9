"""The `fastdistil` command: reads arguments, calls the library, turns errors into one line and an exit code.

Exit codes: 0 done; 1 a failure while running; 2 bad usage or bad input; 130 interrupted.
Each command imports what it needs itself, so that `--help` and a mistyped option answer at once.
"""

import logging
import sys
import traceback
from collections.abc import Sequence

import typer

# Importing a command registers it, in the order in which --help lists them.
import fastdistil.cli.train  # isort: skip
import fastdistil.cli.compress  # isort: skip
import fastdistil.cli.catalogue  # noqa: F401  # isort: skip
from fastdistil.cli.app import Invocation, app, say
from fastdistil.errors import RunError, UserError

__all__ = ["main"]

# click's base class of every complaint about the command line. Newer typers carry click inside themselves,
# so its place differs; in all of them BadParameter is a UsageError is a ClickException.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    _silence_torchao()
    invocation = Invocation(list(sys.argv[1:] if arguments is None else arguments))
    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=invocation.arguments, prog_name="fastdistil", standalone_mode=False, obj=invocation
        )
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if invocation.debug:
            traceback.print_exc()
        say(_one_line(error))
        return 2 if isinstance(error, UserError | CommandLineError) else 1


def _silence_torchao() -> None:
    """transformers imports torchao wherever it is installed, and torchao then warns of each of its GPU
    libraries that does not load, and of its own use of torch."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _one_line(error: Exception) -> str:
    if isinstance(error, CommandLineError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "fastdistil"
        return f"{error.format_message().rstrip('.')}; see {command} --help"  # type: ignore[attr-defined]
    if isinstance(error, UserError | RunError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error} (--debug shows where)"
