"""`compress`, `compare` and `export`: a smaller model, all ways to one side by side, and other runtimes."""

from pathlib import Path
from typing import Annotated, Any

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
from fastdistil.errors import RunError, UserError

ChainOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME.KEY=VALUE",
        help="Change an option of a step: kd.run.epochs=2, prune-ffn.ratio=0.5, recover.run.epochs=1 (after "
        "every step), train.optimizer.lr=1e-4 (of all training). May be repeated.",
    ),
]


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
    allow_weak_teacher: AllowWeakTeacher = False,
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
        refuse("--target-speedup or --target-size", {"--candidates": candidates})
    if task is None:
        refuse("--task", {"--data": data, "--allow-weak-teacher": allow_weak_teacher or None})
    from fastdistil.compare.search import compress_for_target
    from fastdistil.compare.single import compress_model

    with going_on(ctx, "the same command goes on where it stopped"):
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
                allow_weak_teacher=allow_weak_teacher,
            )
        else:
            assert method is not None
            result = compress_model(
                model,
                method,
                output,
                task=task,
                data=data,
                overrides=overrides or (),
                seed=seed,
                allow_weak_teacher=allow_weak_teacher,
            )
    print_rows(result.rows())


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
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Of the timing, each three passes of every model; default 10, of quickstart 5.", min=1
        ),
    ] = None,
    allow_weak_teacher: AllowWeakTeacher = False,
    overrides: ChainOverrides = None,
    debug: Debug = False,
) -> None:
    """Shrink a model in many ways and show what each costs: a table, pictures and report.html.

    Interrupted, the same command goes on where it stopped.
    """
    names = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    with going_on(ctx, "the same command goes on where it stopped"):
        if teacher == "quickstart":
            weak = allow_weak_teacher or None
            refuse(
                "another teacher than quickstart",
                {"--task": task, "--data": data, "--allow-weak-teacher": weak},
            )
            from fastdistil.compare.quickstart import compare_quickstart

            folder = output or Path("runs/compare-quickstart")
            _require_any(compare_quickstart(folder, names, overrides or (), seeds=seeds, rounds=rounds))
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
        if rounds is not None:
            config = config.model_copy(update={"rounds": rounds})
        _require_any(run_comparison(config))


def _require_any(comparison: Any) -> None:
    """A `RunError` where every method failed; what was written says it of each."""
    methods = comparison.rows[1:]
    if all(row.error is not None for row in methods):
        raise RunError(f"no method could be made: {methods[0].method}: {methods[0].error}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model, compressed or not.")],
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.")],
    format: Annotated[str, typer.Option(help="onnx, onnx-int8 or executorch.")] = "onnx",
    task: TaskName = None,
    data: TaskFolder = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX; default torch's.")] = None,
    debug: Debug = False,
) -> None:
    """Write a model for another runtime, verified against PyTorch; with --task on its texts, and scored."""
    from fastdistil.export.model import export_model

    if task is None:
        refuse("--task", {"--data": data})
        print_rows(export_model(model, format, output, opset=opset).rows())
        return
    from fastdistil.compare.chain import ChainContext
    from fastdistil.compress.store import load
    from fastdistil.data.task_encoding import encode
    from fastdistil.data.tasks import find_task, read_examples
    from fastdistil.evaluate import evaluate_task
    from fastdistil.models.load import max_positions

    found = find_task(task)
    length = min(found.usual_length, max_positions(load(model)))
    context = ChainContext(teacher=model, task=found, data=data, output=output, max_length=length)
    held_out = encode(found, read_examples(found, data, "validation"), context.tokenizer, length)
    result = export_model(
        model,
        format,
        output,
        opset=opset,
        max_length=length,
        examples=context.calibration().batches,
        score=lambda model: evaluate_task(model, found, held_out),
        task=task,
        data=data,
    )
    print_rows(result.rows())
