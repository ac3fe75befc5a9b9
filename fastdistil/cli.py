"""The `fastdistil` command: reads arguments, calls the library, turns errors into one line and an exit code.

Exit codes: 0 done; 1 a failure while running; 2 bad usage or bad input; 130 interrupted.
Each command imports what it needs itself, so that `--help` and a mistyped option answer at once.
"""

import shlex
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastdistil.errors import RunError, UserError

# click's base class of every complaint about the command line. Newer typers carry click inside themselves,
# so its place differs; in all of them BadParameter is a UsageError is a ClickException.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make small encoder models out of big ones, and show what each way of shrinking costs.",
)


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


TextColumn = Annotated[str, typer.Option(help="Column of parquet, jsonl and `datasets` rows.")]
Split = Annotated[str, typer.Option(help="Split of a `datasets` name, or of a folder with files of each.")]


@app.command()
def train(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `fastdistil recipes`) or a YAML file.")],
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub id of the teacher, or of the model that mlm adapts.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Text files, parquet, jsonl, a `datasets` name or a prepared folder.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; default runs/RECIPE.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train or distil a model by a recipe."""
    from fastdistil.train.config import load_config

    config = load_config(recipe, overrides or [], teacher=teacher, corpus=corpus, output=output)
    # After the check: a mistyped key is told before transformers is loaded.
    from fastdistil.train.run import run

    try:
        run(config, resume=resume)
    except KeyboardInterrupt:
        again = [argument for argument in ctx.obj.arguments if argument != "--resume"]
        _say(f"interrupted; resume with: {shlex.join(['fastdistil', *again, '--resume'])}")
        raise


@app.command()
def prepare(
    corpus: Annotated[
        str, typer.Argument(help="Text files, parquet, jsonl, a `datasets` name or `machine`.")
    ],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id, as a rule the teacher's.")],
    output: Annotated[Path, typer.Option(help="Folder of the token store, which must not exist.")],
    max_length: Annotated[int, typer.Option(help="Tokens a sequence, with [CLS] and [SEP].")] = 128,
    text_column: Annotated[str, typer.Option(help="Column of parquet, jsonl and `datasets` rows.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a `datasets` name or of a folder.")] = "train",
    debug: Debug = False,
) -> None:
    """Turn text into a token store, which `train` and `evaluate` take as their corpus."""
    from rich.console import Console

    from fastdistil.data.corpus import open_corpus
    from fastdistil.data.token_store import build_token_store
    from fastdistil.models.load import load_tokenizer

    documents = open_corpus(corpus, text_column=text_column, split=split, streaming=True)
    with Console(stderr=True).status(f"reading {corpus}") as status:
        store = build_token_store(
            documents,
            load_tokenizer(tokenizer),
            output,
            max_length,
            on_progress=lambda read, made: status.update(f"{read:,} documents, {made:,} sequences"),
        )
    print(f"{output}: {len(store):,} sequences of {max_length}, {store.meta.num_tokens:,} tokens")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a masked language model.")],
    corpus: Annotated[
        str | None, typer.Option(help="Held-out text, or a prepared token store; without it, cost alone.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a sequence; default 128.", min=8)] = None,
    max_sequences: Annotated[int, typer.Option(help="Use the corpus's first so many.", min=1)] = 2000,
    text_column: TextColumn = "text",
    split: Split = "test",
    debug: Debug = False,
) -> None:
    """Measure a model: loss, accuracy and perplexity on text; latency, memory and size."""
    from fastdistil.evaluate.summary import summarize

    summary = summarize(
        model,
        corpus,
        max_length=max_length,
        max_sequences=max_sequences,
        text_column=text_column,
        split=split,
    )
    rows = summary.rows()
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:{width}}  {value}")


@app.command()
def recipes(debug: Debug = False) -> None:
    """List the recipes, each with its paper."""
    from fastdistil.recipes import list_recipes

    for info in list_recipes():
        print(info.name)
        for text in filter(None, (info.description, info.paper)):
            print(textwrap.fill(text, width=100, initial_indent="    ", subsequent_indent="    "))


@app.command()
def doctor(debug: Debug = False) -> None:
    """Show versions, devices, and which implementation each op uses here and why not a faster one."""
    from fastdistil.doctor import report

    print(report())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
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
        _say(_one_line(error))
        return 2 if isinstance(error, UserError | CommandLineError) else 1


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


def _say(text: str) -> None:
    print(f"fastdistil: {' '.join(text.split())}", file=sys.stderr)
