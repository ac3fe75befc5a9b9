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
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

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


TaskName = Annotated[
    str | None,
    typer.Option(help="sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte, wnli, imdb, squad, race, ..."),
]
TaskFolder = Annotated[
    str | None, typer.Option(help="Folder of the task's files (parquet, tsv, json); without it, the hub.")
]
AllowWeakTeacher = Annotated[
    bool, typer.Option("--allow-weak-teacher", help="Learn from a teacher at chance level, too.")
]
ChainOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME.KEY=VALUE",
        help="Change an option of a step: kd.run.epochs=2, prune-ffn.ratio=0.5, recover.run.epochs=1 (after "
        "every step), train.optimizer.lr=1e-4 (of all training). May be repeated.",
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of parquet, jsonl and `datasets` rows.")]


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
    task: TaskName = None,
    data: TaskFolder = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; default runs/RECIPE.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Run so many seeds; mean and deviation in the table.", min=2)
    ] = None,
    allow_weak_teacher: AllowWeakTeacher = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train or distil a model by a recipe."""
    from fastdistil.train.config import load_config

    keys = [*(overrides or []), *(["allow_weak_teacher=true"] if allow_weak_teacher else [])]
    config = load_config(recipe, keys, teacher=teacher, corpus=corpus, task=task, data=data, output=output)
    # After the check: a mistyped key is told before transformers is loaded.
    from fastdistil.train.run import run
    from fastdistil.train.seeds import run_seeds

    try:
        if seeds is None:
            run(config, resume=resume)
        else:
            run_seeds(config, seeds, resume=resume)
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
    text_column: TextColumn = "text",
    split: Annotated[str, typer.Option(help="Split of a `datasets` name or of a folder.")] = "train",
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Pairs of segments for next-sentence prediction (recipe bert).")
    ] = False,
    document_column: Annotated[
        str | None,
        typer.Option(help="With --pairs: rows of parquet or jsonl with equal values in it are one document."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --pairs: of their choice; default 0.", min=0)] = None,
    debug: Debug = False,
) -> None:
    """Turn text into a token store, which `train` and `evaluate` take as their corpus."""
    if not pairs:
        _refuse("--pairs", {"--document-column": document_column, "--seed": seed})
    from rich.console import Console

    from fastdistil.data.corpus import open_corpus
    from fastdistil.data.sentence_pairs import build_pair_store
    from fastdistil.data.token_store import build_token_store
    from fastdistil.models.load import load_tokenizer

    documents = open_corpus(corpus, text_column=text_column, split=split, streaming=True)
    with Console(stderr=True).status(f"reading {corpus}") as status:
        if pairs:
            store = build_pair_store(
                documents,
                load_tokenizer(tokenizer),
                output,
                max_length,
                seed=seed or 0,
                document_column=document_column,
            )
        else:
            store = build_token_store(
                documents,
                load_tokenizer(tokenizer),
                output,
                max_length,
                on_progress=lambda read, made: status.update(f"{read:,} documents, {made:,} sequences"),
            )
    kind = "sequences" if store.pairs is None else "sentence pairs"
    print(f"{output}: {len(store):,} {kind} of {max_length}, {store.meta.num_tokens:,} tokens")


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a masked language model, or of one for the task.")
    ],
    task: TaskName = None,
    data: TaskFolder = None,
    corpus: Annotated[str | None, typer.Option(help="Held-out text, or a prepared token store.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a sequence; default 128, for squad 384.", min=8)
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of the task, default validation; of the corpus, default test.")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Use the corpus's first so many; default 2000.", min=1)
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the corpus's parquet, jsonl or `datasets` rows.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure a model: quality on a task or on text; latency, memory and size. Without either, cost alone."""
    if task is None:
        _refuse("--task", {"--data": data})
    if corpus is None:
        _refuse("--corpus", {"--max-sequences": max_sequences, "--text-column": text_column})
    elif task is not None:
        raise UserError("--task and --corpus exclude each other: measure one after the other")
    from fastdistil.evaluate.summary import summarize, summarize_task

    if task is not None:
        summary = summarize_task(model, task, data, max_length=max_length, split=split or "validation")
    else:
        summary = summarize(
            model,
            corpus,
            max_length=max_length,
            max_sequences=max_sequences or 2000,
            text_column=text_column or "text",
            split=split or "test",
        )
    _print_rows(summary.rows())


@app.command()
def compress(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of the model; with --task fine-tuned on it.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the result, model/, and for what leads to it.")],
    method: Annotated[
        str | None,
        typer.Option(help="A method or a chain, such as prune-ffn:0.5 or kd+prune-ffn+int8, or a YAML file."),
    ] = None,
    task: TaskName = None,
    data: TaskFolder = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)] = 0,
    target_speedup: Annotated[
        float | None, typer.Option(help="Search the chains for the best score that is so many times faster.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Search the chains for the best score in so many bytes, such as 20MB.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(help="With a target: how many chains are trained; default 3.", min=1)
    ] = None,
    overrides: ChainOverrides = None,
    debug: Debug = False,
) -> None:
    """Make a smaller model: by a method, by a chain of them, or by the chain that meets a target.

    With --task it is trained to recover, by distillation from MODEL, and scored beside it.
    """
    searches = target_speedup is not None or target_size is not None
    if searches == (method is not None):
        raise UserError("give --method NAME, or a target: --target-speedup, --target-size")
    if not searches:
        _refuse("--target-speedup or --target-size", {"--candidates": candidates})
    from fastdistil.compare.search import compress_for_target
    from fastdistil.compare.single import compress_model

    try:
        if searches:
            if task is None:
                raise UserError("a search needs --task NAME, to score what it finds")
            result = compress_for_target(
                model,
                task,
                data,
                output,
                target_speedup,
                target_size,
                candidates=candidates or 3,
                overrides=overrides or (),
                seed=seed,
            )
        else:
            assert method is not None
            result = compress_model(
                model, method, output, task=task, data=data, overrides=overrides or (), seed=seed
            )
    except KeyboardInterrupt:
        _say(f"interrupted; the same command goes on where it stopped: {_command(ctx)}")
        raise
    _print_rows(result.rows())


@app.command()
def compare(
    ctx: typer.Context,
    teacher: Annotated[
        str, typer.Argument(help="Folder or hub id of a model fine-tuned on the task, or `quickstart`.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison; default runs/compare-TASK.", show_default=False),
    ] = None,
    task: TaskName = None,
    data: TaskFolder = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods and chains, with commas between; default: one of each, and chains."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Of each method that trains.", min=1)] = 1,
    allow_weak_teacher: AllowWeakTeacher = False,
    overrides: ChainOverrides = None,
    debug: Debug = False,
) -> None:
    """Shrink a model in many ways and show what each costs: a table, pictures and report.html.

    Interrupted, the same command goes on where it stopped.
    """
    names = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    try:
        if teacher == "quickstart":
            _refuse("another teacher than quickstart", {"--task": task, "--data": data})
            from fastdistil.compare.quickstart import compare_quickstart

            compare_quickstart(output or Path("runs/compare-quickstart"), names, overrides or (), seeds=seeds)
            return
        if task is None:
            raise UserError("compare needs --task NAME (sst2, mrpc, ...), or the teacher `quickstart`")
        from fastdistil.compare.defaults import DEFAULT_METHODS
        from fastdistil.compare.run import CompareConfig
        from fastdistil.compare.run import compare as run_comparison

        config = CompareConfig(
            teacher=teacher,
            task=task,
            data=data,
            methods=names or list(DEFAULT_METHODS),
            output=output or Path(f"runs/compare-{task}"),
            seeds=seeds,
            allow_weak_teacher=allow_weak_teacher,
            overrides=overrides or [],
        )
        run_comparison(config)
    except KeyboardInterrupt:
        _say(f"interrupted; the same command goes on where it stopped: {_command(ctx)}")
        raise


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model, compressed or not.")],
    output: Annotated[Path, typer.Option(help="Folder to write, which must not exist.")],
    format: Annotated[str, typer.Option(help="onnx, onnx-int8 or executorch.")] = "onnx",
    task: TaskName = None,
    data: TaskFolder = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX; default torch's.")] = None,
    debug: Debug = False,
) -> None:
    """Write a model for another runtime, verified against PyTorch; with --task on its texts, too."""
    if task is None:
        _refuse("--task", {"--data": data})
    from fastdistil.export.model import export_model

    examples: Sequence[Any] = ()
    if task is not None:
        from fastdistil.compare.chain import ChainContext
        from fastdistil.data.tasks import find_task

        context = ChainContext(teacher=model, task=find_task(task), data=data, output=output)
        examples = context.calibration().batches
    _print_rows(export_model(model, format, output, opset=opset, examples=examples).rows())


@app.command()
def recipes(
    recipe: Annotated[str | None, typer.Argument(help="Show this one's YAML, with all its numbers.")] = None,
    debug: Debug = False,
) -> None:
    """List the recipes: the paper, its equations, the code that was read, variants, and what was measured."""
    from fastdistil.recipes import list_recipes, load_recipe

    if recipe is not None:
        load_recipe(recipe)  # a mistyped name is told with the nearest one
        file = resources.files("fastdistil.recipes") / f"{recipe}.yaml"
        print((file if file.is_file() else Path(recipe)).read_text(encoding="utf-8").strip())
        return
    for number, info in enumerate(list_recipes()):
        if number:
            print()
        typer.secho(info.name, bold=True)
        _print_wrapped(info.description)
        for label, text in (
            ("paper", info.paper),
            ("equations", info.equations),
            ("checked against", info.checked_against),
            ("variants", ", ".join(f"{info.name}:{variant}" for variant in info.variants)),
            ("status", f"measured here: {info.measured}" if info.measured else "not measured here"),
        ):
            if text:
                _print_wrapped(text, label)


@app.command()
def methods(
    method: Annotated[str | None, typer.Argument(help="Show this one's options alone.")] = None,
    debug: Debug = False,
) -> None:
    """List the methods of `compress` and `compare`; the first option is what stands behind a colon."""
    from fastdistil.compress.registry import find_method
    from fastdistil.compress.registry import methods as all_methods

    shown = list(all_methods().values()) if method is None else [find_method(method)]
    for number, info in enumerate(shown):
        if number:
            print()
        typer.secho(info.name, bold=True)
        _print_wrapped(f"{info.description} ({info.kind})")
        if info.paper:
            _print_wrapped(info.paper, "paper")
        # The one that a value behind the name's colon sets, then the others.
        fields = sorted(info.options.model_fields.items(), key=lambda field: field[0] != info.main)
        for name, field in fields:
            if not (name == "steps" and info.uses_steps):
                default = "" if field.default is None else f" (default {field.default})"
                _print_wrapped(f"{field.description}{default}", name)


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


def _refuse(needed: str, given: dict[str, object]) -> None:
    """A `UserError` for an option that is `given` and would do nothing without the one that is `needed`."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} is for {needed}: add it, or leave {name} out")


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:{width}}  {value}")


def _command(ctx: typer.Context) -> str:
    return shlex.join(["fastdistil", *ctx.obj.arguments])


def _print_wrapped(text: str, label: str = "") -> None:
    """Indented, at most 100 columns wide, with the label in a column of its own."""
    first = f"    {label:16} " if label else "    "
    wrapped = textwrap.wrap(
        text, 100, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )
    print("\n".join(wrapped))


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
