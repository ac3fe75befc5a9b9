"""Named recipes: one YAML file each, with the paper and the code that its numbers were checked against.

Besides the keys of a run a recipe may hold

- `tasks`: task -> `{dotted key: value}`, what the paper does otherwise on that task.
- `variants`: name -> `{dotted key: value}`, asked for as `recipe:variant`.
- `grid`: dotted key -> the values that the paper tried, for the reader.
- `measured`: where the results of this project's own runs of the recipe are.
"""

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fastdistil.errors import UserError


@dataclass(frozen=True)
class RecipeInfo:
    name: str
    description: str
    paper: str | None
    equations: str | None
    checked_against: str | None
    variants: tuple[str, ...]
    measured: str | None


def list_recipes() -> list[RecipeInfo]:
    """The recipes that ship with the package, by name."""
    plain = [load_recipe(name) for name in _names()]
    return [
        RecipeInfo(
            recipe["recipe"],
            recipe["description"],
            recipe.get("paper"),
            recipe.get("equations"),
            recipe.get("checked_against"),
            tuple(recipe.get("variants", ())),
            recipe.get("measured"),
        )
        for recipe in plain
    ]


def for_variant(recipe: dict[str, Any], variant: str) -> dict[str, Any]:
    """`{dotted key: value}` of a variant; `UserError` for one that the recipe has not."""
    variants: dict[str, dict[str, Any]] = recipe.get("variants") or {}
    if variant not in variants:
        known = f"has the variants {', '.join(variants)}" if variants else "has no variants"
        raise UserError(f"recipe {recipe.get('recipe')} {known}, not {variant!r}")
    return variants[variant]


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """The mapping of a shipped recipe, or of a YAML file given by its path.

    Raises `UserError` for an unknown name (with the nearest one) and for a file that is not a YAML mapping.
    """
    text = str(name_or_path)
    if text in _names():
        source = resources.files(__name__).joinpath(f"{text}.yaml").read_text(encoding="utf-8")
    elif text.endswith((".yaml", ".yml")):
        try:
            source = Path(text).expanduser().read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"cannot read recipe {text}: there is no such file") from None
        except OSError as error:
            raise UserError(f"cannot read recipe {text}: {(error.strerror or str(error)).lower()}") from None
        except UnicodeDecodeError:
            raise UserError(f"cannot read recipe {text}: it is not UTF-8 text") from None
    else:
        near = difflib.get_close_matches(text, _names(), n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]}?" if near else f"known: {', '.join(_names())}, or a path to a .yaml file"
        )
        raise UserError(f"unknown recipe {text!r}: {hint}")
    try:
        plain = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {text} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise UserError(f"recipe {text} must be a mapping of keys, got {type(plain).__name__}")
    return plain


def _names() -> list[str]:
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))
