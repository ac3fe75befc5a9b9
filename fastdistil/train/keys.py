"""Every key of a recipe, as the sections of the configuration declare them: what `--set` takes."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fastdistil.schema import Section
from fastdistil.train.config import PROSE, RunConfig
from fastdistil.train.objective_config import OBJECTIVES
from fastdistil.train.sections import StageConfig

_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclass(frozen=True)
class Key:
    name: str
    description: str  # with the values it takes and its default


@dataclass(frozen=True)
class KeyGroup:
    """The keys of one section."""

    name: str  # how a key of it is written, such as "optimizer.KEY"
    description: str
    keys: list[Key]


def key_groups() -> Iterator[KeyGroup]:
    """All keys, section by section."""
    yield _group("KEY", "Of the whole run.", _own(RunConfig))
    yield from _sections(RunConfig, "")
    for name, objective in OBJECTIVES.items():
        yield _group(f"objectives.N.KEY where name is {name}", objective.__doc__, _own(objective, "name"))
    shared = ", ".join(name for name in StageConfig.model_fields if name in RunConfig.model_fields)
    yield _group(
        "stages.N.KEY",
        f"Of a recipe with stages, counted from 0; each has these, too, as above: {shared}.",
        {name: field for name, field in _own(StageConfig).items() if name not in RunConfig.model_fields},
    )


def _sections(section: type[Section], prefix: str) -> Iterator[KeyGroup]:
    for name, field in section.model_fields.items():
        if inner := _section_of(field):
            yield _group(f"{prefix}{name}.KEY", inner.__doc__ or field.description, _own(inner))
            yield from _sections(inner, f"{prefix}{name}.")


def _group(name: str, description: str | None, fields: dict[str, FieldInfo]) -> KeyGroup:
    keys = [Key(name, _described(field)) for name, field in fields.items()]
    return KeyGroup(name, " ".join((description or "").split()), keys)


def _own(section: type[Section], *left_out: str) -> dict[str, FieldInfo]:
    """The fields that hold a value, not more keys."""
    return {
        name: field
        for name, field in section.model_fields.items()
        if _section_of(field) is None and name not in ("recipe", "objectives", "stages", *PROSE, *left_out)
    }


def _section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds or may hold."""
    for kind in _kinds(field.annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _described(field: FieldInfo) -> str:
    kinds = _kinds(field.annotation)
    choices = [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    if bool in kinds:
        choices = ["true", "false"]
    limits = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(limit, name)
    ]
    facts = [", ".join(choices), " and ".join(limits)]
    if not field.is_required() and field.default is not None:
        facts.append(f"default {_shown(field.default)}")
    told = "; ".join(fact for fact in facts if fact)
    return f"{field.description or ''} ({told})".strip() if told else field.description or ""


def _kinds(annotation: Any) -> list[Any]:
    """The types that a union is of, without what is annotated on them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _shown(value: Any) -> str:
    """As it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
