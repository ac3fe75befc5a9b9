"""`recipes`, `methods` and `doctor`: what there is, and what works here."""

import textwrap
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from fastdistil.cli.app import Debug, app
from fastdistil.errors import UserError


@app.command()
def recipes(
    recipe: Annotated[str | None, typer.Argument(help="Show this one's YAML, with all its numbers.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every key that --set takes instead.")] = False,
    debug: Debug = False,
) -> None:
    """List the recipes: the paper, its equations, the code that was read, variants, and what was measured."""
    from fastdistil.recipes import list_recipes, load_recipe

    if keys:
        if recipe is not None:
            raise UserError(f"--keys lists those of every recipe: leave out {recipe}, or --keys")
        _print_keys()
        return
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


def _print_keys() -> None:
    from fastdistil.train.keys import key_groups

    for number, group in enumerate(key_groups()):
        if number:
            print()
        typer.secho(group.name, bold=True)
        if group.description:
            _print_wrapped(group.description)
        for key in group.keys:
            _print_wrapped(key.description, key.name, width=24)


def _print_wrapped(text: str, label: str = "", width: int = 16) -> None:
    """Indented, at most 100 columns wide, with the label in a column of its own."""
    first = f"    {label:{width}} " if label else "    "
    wrapped = textwrap.wrap(
        text, 100, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )
    print("\n".join(wrapped))
