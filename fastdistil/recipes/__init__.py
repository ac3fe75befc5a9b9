"""Named recipes: one YAML file each, with the paper and the code that its numbers were checked against."""

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
    checked_against: str | None


def list_recipes() -> list[RecipeInfo]:
    """The recipes that ship with the package, by name."""
    recipes = [load_recipe(name) for name in _names()]
    return [
        RecipeInfo(r["recipe"], r["description"], r.get("paper"), r.get("checked_against")) for r in recipes
    ]


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """The mapping of a shipped recipe, or of a YAML file given by its path.

    Raises `UserError` for an unknown name (with the nearest one) and for a file that is not a YAML mapping.
    """
    text = str(name_or_path)
    if text in _names():
        source = resources.files(__name__).joinpath(f"{text}.yaml").read_text(encoding="utf-8")
    elif text.endswith((".yaml", ".yml")):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read recipe {text}: {error}") from None
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
