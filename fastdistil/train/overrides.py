"""Recipes as plain mappings: overrides of dotted keys, and what stages take over from the top."""

import contextlib
from collections.abc import Sequence
from typing import Any

import yaml

from fastdistil.errors import UserError

# What a stage may say anew; the rest of a recipe is the same for all of them.
OF_A_STAGE = ("data", "masking", "augment", "objectives", "optimizer", "schedule", "run")


def apply_overrides(plain: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set the keys of `overrides`, such as "run.epochs=2", in place.

    What a stage would not take over from the top, because it says something of its own there, is set in the
    stage, too. A key of one stage, "stages.0.run.epochs", wins over one of all, wherever it stands.
    """
    pairs = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"an override reads key=value, got {override!r}")
        pairs.append((key, parse_value(key, text)))
    for key, value in sorted(pairs, key=lambda pair: pair[0].split(".")[0] == "stages"):
        stages = plain.get("stages")
        if not isinstance(stages, list):
            stages = []
        if stages and key.startswith("objectives."):
            raise UserError(f"{key}: each stage has objectives of its own; set stages.N.{key}")
        set_key(plain, key, value)
        for stage in stages:
            if _says(stage, key):
                set_key(stage, key, value)


def last_value(overrides: Sequence[str], key: str) -> Any:
    """What the last of the `overrides` of `key` sets, None where there is none."""
    pairs = (override.partition("=") for override in overrides)
    return next((parse_value(key, text) for name, _, text in reversed([*pairs]) if name == key), None)


def _says(stage: Any, key: str) -> bool:
    """Whether the stage has the key itself, so that it would not take it over from the top."""
    *parents, last = key.split(".")
    if [*parents, last][0] not in OF_A_STAGE:
        return False
    for part in parents:
        stage = stage.get(part) if isinstance(stage, dict) else None
    names = {"steps", "epochs"} if parents == ["run"] and last in ("steps", "epochs") else {last}
    return isinstance(stage, dict) and bool(names & stage.keys())


def parse_value(key: str, text: str) -> Any:
    """The YAML value that the user gave for `key`."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}: {text!r} is not a YAML value") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 (no dot) as a string.
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def set_key(plain: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = plain
    for part in parents:
        if isinstance(node, list):
            node = _item(node, part, key)
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"{key}: {part} is a value, not a section")
    if isinstance(node, list):
        _item(node, last, key)
        node[int(last)] = value
        return
    if parents[-1:] == ["run"] and last in ("steps", "epochs"):  # either replaces the choice of the other
        node.pop("epochs" if last == "steps" else "steps", None)
    node[last] = value


def _item(node: list[Any], part: str, key: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"{key}: expected an index from 0 to {len(node) - 1}, got {part!r}")
    return node[int(part)]


def with_whole_stages(plain: Any) -> Any:
    """Each stage with what it takes over from the top of the recipe; `plain` is not changed."""
    if not isinstance(plain, dict) or not isinstance(plain.get("stages"), list):
        return plain
    shared = {key: plain[key] for key in OF_A_STAGE if key in plain}
    stages = [_merged(shared, stage) if isinstance(stage, dict) else stage for stage in plain["stages"]]
    for stage in stages:
        if isinstance(stage, dict):
            for key in ("data", "optimizer", "schedule", "masking"):
                stage.setdefault(key, {})
    return {**plain, "stages": stages}


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    old = dict(old)
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if new.get(key) is not None:  # either replaces the other
            old.pop(other, None)
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
