"""`compress`, `compare` and `export`: a smaller model, all ways to one side by side, and other runtimes."""

from collections.abc import Sequence
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
from fastdistil.errors import UserError

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
            )
        else:
            assert method is not None
            result = compress_model(
                model, method, output, task=task, data=data, overrides=overrides or (), seed=seed
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
            refuse("another teacher than quickstart", {"--task": task, "--data": data})
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
        refuse("--task", {"--data": data})
    from fastdistil.export.model import export_model

    examples: Sequence[Any] = ()
    if task is not None:
        from fastdistil.compare.chain import ChainContext
        from fastdistil.data.tasks import find_task

        context = ChainContext(teacher=model, task=find_task(task), data=data, output=output)
        examples = context.calibration().batches
    print_rows(export_model(model, format, output, opset=opset, examples=examples).rows())
