"""From the name of a chain, such as `kd+prune-ffn:0.5+int8`, to its steps and their options."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastdistil.compare.results import Kind
from fastdistil.compress.method import Method
from fastdistil.compress.registry import find_method, methods
from fastdistil.errors import UserError
from fastdistil.recipes import for_variant, list_recipes, load_recipe
from fastdistil.schema import Section, in_words, nearest
from fastdistil.train.overrides import parse_value

# What a user may write who does not want to choose.
ALIASES = {"distil": "kd", "distill": "kd", "prune": "prune-ffn", "quantize": "int8"}
# Recipes that are not a step: of text for a new teacher, and what follows every step.
_NOT_STEPS = ("quickstart", "recover")


@dataclass(frozen=True)
class Step:
    """One recipe or one method.

    `options` are of a recipe its dotted keys, of a method its options. `recover` are dotted keys of recipe
    `recover`, which trains the model after a method; None: it does not.
    """

    name: str
    value: str | None = None  # what stands behind the colon: a recipe's variant, a method's main option
    options: dict[str, Any] = field(default_factory=dict)
    recover: dict[str, Any] | None = None

    @property
    def is_recipe(self) -> bool:
        return self.name in _recipes()

    @property
    def method(self) -> Method:
        return find_method(self.name)

    @property
    def trains(self) -> bool:
        return self.is_recipe or self.recover is not None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}:{self.value}"

    def identity(self) -> dict[str, Any]:
        """JSON-able: everything that decides what the step makes."""
        return {"step": str(self), "options": self.options, "recover": self.recover}

    def method_options(self, **more: Any) -> Section:
        """The checked options of a method; `UserError` names the key that is wrong."""
        method, plain = self.method, {**self.options, **more}
        if self.value is not None:
            if method.main is None:
                raise UserError(f"{self}: {self.name} takes no value")
            plain[method.main] = parse_value(str(self), self.value)
        try:
            return method.options(**plain)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or self.name
            if first["type"] == "extra_forbidden":
                hint = nearest(key, method.options.model_fields)
                raise UserError(f"unknown option {self.name}.{key}: {hint}") from None
            raise UserError(in_words(first, f"{self.name}.{key}")) from None


@dataclass(frozen=True)
class Chain:
    """Steps, each of which starts from what the one before it made."""

    name: str
    steps: tuple[Step, ...]
    overrides: tuple[str, ...] = field(default=(), compare=False)  # of those given, the ones for its steps

    @property
    def kind(self) -> Kind:
        if len(self.steps) > 1:
            return "chain"
        return "distillation" if self.steps[0].is_recipe else self.steps[0].method.kind

    @property
    def descriptions(self) -> list[str]:
        """One line a step."""
        return [
            load_recipe(step.name)["description"].split(":")[0].strip().rstrip(".")
            if step.is_recipe
            else step.method.description
            for step in self.steps
        ]

    @property
    def description(self) -> str:
        return "; then ".join(self.descriptions)

    @property
    def trains(self) -> bool:
        return any(step.trains for step in self.steps)

    def prefix(self, count: int) -> "Chain":
        steps = self.steps[:count]
        return Chain("+".join(map(str, steps)), steps)


def parse_chain(text: str, overrides: Sequence[str] = ()) -> Chain:
    """A chain from its name, or from a YAML file (`*.yaml`) with

        steps:
          - {method: kd, set: {run.epochs: 3}}
          - {method: "prune-ffn:0.5", set: {importance: taylor}, recover: {run.epochs: 1}}
          - {method: int8, recover: false}

    Args:
        overrides: `NAME.KEY=VALUE`. NAME is that of a step or its number from 1; KEY one of its options (of a
            recipe a dotted key), or `recover.` and a dotted key of recipe `recover`, or `recover` (false: no
            training after this step). NAME `recover` stands for the recovery of every step, `train` for
            every training.

    Raises:
        UserError: an unknown method or recipe (with the nearest one), an option that is unknown or out of its
            range, an override for a step that is not in the chain, a step after one that ends a chain.
    """
    chain = _parse(text, overrides)
    _refuse_unused(overrides, chain.overrides)
    return chain


def parse_chains(texts: Sequence[str], overrides: Sequence[str] = ()) -> list[Chain]:
    """As `parse_chain`; an override must be for a step of one of them, at least."""
    parsed = [_parse(text, overrides) for text in texts]
    _refuse_unused(overrides, [override for chain in parsed for override in chain.overrides])
    names = [chain.name for chain in parsed]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"method {name} is given twice")
    return parsed


def _parse(text: str, overrides: Sequence[str]) -> Chain:
    if text.endswith((".yaml", ".yml")):
        name, steps = Path(text).stem, _read(text)
    else:
        name, steps = text, [_step(part) for part in text.split("+")]
    used = []
    for override in overrides:
        changed = [_override(step, i, override) for i, step in enumerate(steps)]
        if any(changed):
            used.append(override)
            steps = [new or step for new, step in zip(changed, steps, strict=True)]
    for step in steps:
        if step.is_recipe:
            if step.value is not None:
                for_variant(load_recipe(step.name), step.value)
        else:
            step.method_options()
    for step in steps[:-1]:
        if not step.is_recipe and step.method.ends:
            raise UserError(f"{name}: {step} must be the last step, nothing can be done to what it makes")
    return Chain(name, tuple(steps), tuple(used))


def _step(text: str) -> Step:
    name, colon, value = text.strip().partition(":")
    name = ALIASES.get(name, name)
    if name not in _recipes() and name not in methods():
        known = [*_recipes(), *methods()]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"unknown method {name!r}: {hint}")
    recovers = name not in _recipes() and find_method(name).recovers
    return Step(name, value if colon else None, recover={} if recovers else None)


def _read(path: str) -> list[Step]:
    plain = load_recipe(path)
    steps = plain.get("steps")
    if not isinstance(steps, list) or not steps:
        raise UserError(f"{path}: a chain has a list of steps")
    read = []
    for i, item in enumerate(steps):
        if not isinstance(item, dict) or "method" not in item or set(item) - {"method", "set", "recover"}:
            raise UserError(f"{path}: steps.{i} has the keys method, set and recover, got {item!r}")
        step = _step(str(item["method"]))
        if item.get("recover") is not None:
            step = _with_recover(step, "", item["recover"])
        read.append(replace(step, options=dict(item.get("set") or {})))
    return read


def _override(step: Step, place: int, override: str) -> Step | None:
    """The step with the override, None if it is for another one."""
    key, equals, text = override.partition("=")
    name, dot, rest = key.partition(".")
    if not equals or not dot or not rest:
        raise UserError(f"an override of a chain reads NAME.KEY=VALUE, got {override!r}")
    value = parse_value(key, text)
    if name in ("recover", "train"):
        if step.is_recipe:
            return replace(step, options={**step.options, rest: value}) if name == "train" else None
        return None if step.recover is None else replace(step, recover={**step.recover, rest: value})
    if ALIASES.get(name, name) != step.name and name != str(place + 1):
        return None
    head, _, tail = rest.partition(".")
    if head == "recover" and not step.is_recipe:
        return _with_recover(step, tail, value)
    return replace(step, options={**step.options, rest: value})


def _with_recover(step: Step, key: str, value: Any) -> Step:
    if key:
        return replace(step, recover={**(step.recover or {}), key: value})
    if isinstance(value, dict):
        return replace(step, recover=value)
    if not isinstance(value, bool):
        raise UserError(f"{step.name}.recover is true, false or a mapping of keys, got {value!r}")
    return replace(step, recover=(step.recover or {}) if value else None)


def _refuse_unused(overrides: Sequence[str], used: Sequence[str]) -> None:
    for override in overrides:
        if override not in used:
            name = override.partition(".")[0]
            raise UserError(f"{override}: no step called {name!r} takes it")


@cache
def _recipes() -> list[str]:
    return [info.name for info in list_recipes() if info.name not in _NOT_STEPS]
