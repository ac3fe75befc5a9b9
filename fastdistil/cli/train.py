"""`train`, `prepare` and `evaluate`: a model by a recipe, its text, and what it is worth."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastdistil.cli.app import (
    AllowWeakTeacher,
    Debug,
    TaskFolder,
    TaskName,
    app,
    going_on,
    print_rows,
    refuse,
)
from fastdistil.errors import UserError

TextColumn = Annotated[str, typer.Option(help="Column of parquet, json, csv, tsv and `datasets` rows.")]


@app.command()
def train(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `fastdistil recipes`) or a YAML file.")],
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub id of the teacher, or of the model that mlm adapts.")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Text, parquet, json, csv or tsv files (their column: --set data.text_column=NAME), a "
            "`datasets` name or a prepared folder."
        ),
    ] = None,
    task: TaskName = None,
    data: TaskFolder = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; default runs/RECIPE or runs/RECIPE-TASK.", show_default=False),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Run so many seeds; mean and deviation in the table.", min=2)
    ] = None,
    allow_weak_teacher: AllowWeakTeacher = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of the recipe (all: `fastdistil recipes --keys`); may be repeated.",
        ),
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

    with going_on(ctx, "resume with", "--resume"):
        if seeds is None:
            run(config, resume=resume)
        else:
            run_seeds(config, seeds, resume=resume)


@app.command()
def prepare(
    corpus: Annotated[
        str, typer.Argument(help="Text, parquet, json, csv or tsv files, a `datasets` name or `machine`.")
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
        typer.Option(help="With --pairs: rows of a file with equal values in this column are one document."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --pairs: of their choice; default 0.", min=0)] = None,
    debug: Debug = False,
) -> None:
    """Turn text into a token store, which `train` and `evaluate` take as their corpus."""
    if not pairs:
        refuse("--pairs", {"--document-column": document_column, "--seed": seed})
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
        str, typer.Argument(help="Folder or hub id of a masked language model, of one for the task, or any.")
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
        str | None, typer.Option(help="Column of the corpus's parquet, json, csv, tsv or `datasets` rows.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, unrounded.")] = False,
    debug: Debug = False,
) -> None:
    """Measure a model: quality on a task or on text; latency, memory and size. Without either, cost alone."""
    if task is None:
        refuse("--task", {"--data": data})
    if corpus is None:
        refuse("--corpus", {"--max-sequences": max_sequences, "--text-column": text_column})
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
    if as_json:
        print(json.dumps(summary.plain(), indent=2))
    else:
        print_rows(summary.rows())
