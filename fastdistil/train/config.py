"""The whole configuration of a training run; its sections are in sections.py and objective_config.py.

`load_config` reads a recipe (YAML), applies `key=value` overrides and returns a checked `RunConfig`.
An unknown key is an error that names the nearest one.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from fastdistil.data.tasks import find_task
from fastdistil.errors import UserError
from fastdistil.paths import one_spelling
from fastdistil.recipes import for_variant, load_recipe
from fastdistil.schema import Section, in_words, nearest
from fastdistil.train.check import check_complete
from fastdistil.train.objective_config import OBJECTIVES, ObjectiveConfig
from fastdistil.train.overrides import OF_A_STAGE, apply_overrides, last_value, set_key, with_whole_stages
from fastdistil.train.sections import (
    AugmentConfig,
    DataConfig,
    LoopConfig,
    MaskingConfig,
    NewTeacherConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    StudentConfig,
    TaskConfig,
)

# Keys of a model, a file or a folder: wherever they stand, the same place may be spelt in several ways.
_SOURCES = ("teacher", "from_model", "data", "corpus", "validation", "tokenizer", "masked_lm", "vectors")
# What gives a key that is missing.
_HINTS = {"task.name": ": --task NAME (sst2, mrpc, ...)"}
# Of a recipe, for its reader: they decide nothing.
PROSE = ("description", "paper", "equations", "checked_against", "measured")


class RunConfig(Section):
    recipe: str = Field(description="name of the recipe this run started from")
    description: str = ""
    paper: str | None = Field(default=None, description="what the recipe reproduces")
    equations: str | None = Field(default=None, description="of the paper, for each term")
    checked_against: str | None = Field(default=None, description="the code its numbers were read from")
    measured: str | None = Field(default=None, description="where results of this recipe are")
    output: Path = Field(default=Path("runs/fastdistil"), description="folder for everything the run writes")
    seed: int = Field(
        default=0, ge=0, description="of the weights, the data order, the masks and the dropout"
    )
    teacher: str | None = Field(
        default=None,
        description="folder or hub id; fine-tuned on the task, or with a masked-LM head where objective "
        "`vocabulary` is used",
    )
    new_teacher: NewTeacherConfig | None = Field(default=None, description="train the teacher first")
    student: StudentConfig = StudentConfig()
    task: TaskConfig | None = Field(default=None, description="null: the student is trained on text alone")
    augment: AugmentConfig | None = Field(default=None, description="of the task's training examples")
    data: DataConfig = DataConfig()
    masking: MaskingConfig | None = Field(
        default=MaskingConfig(), description="null: the models read the text as it is"
    )
    objectives: list[ObjectiveConfig] = Field(default=[], description="of the only stage")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    run: LoopConfig
    stages: list[StageConfig] = Field(
        default=[], description="trained one after the other, instead of the keys above"
    )
    baseline: bool = Field(
        default=False,
        description="also train the same student, from the same weights on the same data, without teacher",
    )
    baseline_epochs: float | None = Field(
        default=None, gt=0, description="of the baseline on a task; null: as many as the last stage"
    )
    allow_weak_teacher: bool = Field(
        default=False, description="go on where the teacher is no better than chance on the task"
    )

    @property
    def student_stages(self) -> list[StageConfig]:
        """What the student goes through; the last one's folder is the run's result."""
        if self.stages:
            return self.stages
        kept = {name: getattr(self, name) for name in OF_A_STAGE}
        return [StageConfig(name="student", reads="text" if self.task is None else "task", **kept)]

    @property
    def uses_teacher(self) -> bool:
        return any(uses_teacher(o) for stage in self.student_stages for o in stage.objectives)

    @property
    def uses_vocabulary(self) -> bool:
        """Whether teacher and student need a masked-language-model head."""
        return uses_vocabulary(self.student_stages)

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the result (so not of where it is written)."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        plain = self.model_dump(mode="json", exclude={"output", "allow_weak_teacher", *PROSE})
        for section in (plain, *plain["stages"]):
            del section["data"]["cache_dir"]
        normal: dict[str, Any] = _with_normal_paths(plain)
        return normal

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _with_normal_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _with_normal_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_normal_paths(item) for item in value]
    return one_spelling(value) if key in _SOURCES and isinstance(value, str) else value


def uses_teacher(objective: ObjectiveConfig) -> bool:
    return objective.name != "next_sentence" and getattr(objective, "kd_weight", 1.0) > 0


def uses_vocabulary(stages: Sequence[StageConfig]) -> bool:
    return any(o.name == "vocabulary" for stage in stages for o in stage.objectives)


def load_config(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    teacher: str | None = None,
    corpus: str | None = None,
    task: str | None = None,
    data: str | None = None,
    output: str | Path | None = None,
) -> RunConfig:
    """Read a recipe by name or path, apply `"a.b=value"` overrides (values are YAML) and check the result.

    A name may end in `:variant`. What the recipe says of the task goes first, then its variant, then the
    overrides. `teacher` is the model to learn from; for a recipe without distillation, the model to train.
    `task` and `data` are the name of a task and the folder of its files. An override that names no stage,
    such as run.epochs=2, is one of all stages, but for a stage with an override of its own.

    Raises `UserError`, one line with the dotted key, for anything that does not fit.
    """
    name, _, variant = str(recipe).partition(":")
    plain = load_recipe(name)
    plain.setdefault("recipe", Path(name).stem)
    named = last_value(overrides, "task.name")
    if task is None:
        task = _task_of(plain) if named is None else str(named)
    elif named is not None and find_task(str(named)).argument != find_task(task).argument:
        raise _two_values("--task", task, "task.name", named)
    found = None if task is None else find_task(task)
    task = None if found is None else found.argument  # however it is spelt
    tasks = plain.get("tasks") or {}
    changes = [*tasks.get(task, {}).items(), *(for_variant(plain, variant).items() if variant else ())]
    if variant:
        plain["recipe"] += f":{variant}"
    for key in ("tasks", "variants", "grid"):
        plain.pop(key, None)
    for key, value in changes:
        set_key(plain, key, value)
    apply_overrides(plain, overrides)
    for section, key, text in (("task", "name", task), ("task", "data", data), ("data", "corpus", corpus)):
        if text is not None:
            other = last_value(overrides, f"{section}.{key}")
            if key != "name" and other not in (None, text):
                raise _two_values(f"--{key}", text, f"{section}.{key}", other)
            if not isinstance(plain.get(section), dict | None):
                raise UserError(f"{section} is a section of keys, got {plain[section]!r}")
            plain[section] = {**(plain.get(section) or {}), key: text}
    if found is not None:
        plain["task"].setdefault("max_length", found.usual_length)
    config = _validate(plain)
    if teacher is not None:
        if config.new_teacher is not None:
            raise UserError(
                f"recipe {config.recipe} trains its own teacher: use recipe distilbert for {teacher}"
            )
        key = "teacher" if config.uses_teacher else "student.from_model"
        if (other := last_value(overrides, key)) not in (None, teacher):
            raise _two_values("--teacher", teacher, key, other)
        set_key(plain, key, teacher)
    name = config.recipe.replace(":", "-") + ("" if found is None else f"-{found.name}")
    plain["output"] = str(Path(output or plain.get("output") or Path("runs") / name).expanduser())
    config = _validate(plain)
    check_complete(config)
    if corpus is not None and all(stage.reads == "task" for stage in config.student_stages):
        raise UserError(f"--corpus: recipe {config.recipe} reads the task's examples alone; leave it out")
    return config


def _task_of(plain: dict[str, Any]) -> str | None:
    """The task that the recipe names."""
    section = plain.get("task")
    name = section.get("name") if isinstance(section, dict) else None
    return name if isinstance(name, str) else None


def _two_values(option: str, value: str, key: str, other: Any) -> UserError:
    return UserError(f"{option} {value} and {key}={other} contradict each other: give one of them")


def read_config(path: Path) -> RunConfig:
    """The resolved configuration that a run left in its output folder."""
    try:
        return _validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is not the configuration of a run: {reason}") from None


def first_difference(old: RunConfig, new: RunConfig) -> str | None:
    """`key: old value -> new value` of the first key that differs, None if the runs are the same."""
    return _difference(old.identity(), new.identity(), "")


def _difference(old: Any, new: Any, path: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else f"{path} was {old!r}, is {new!r}"
    found = (_difference(a, b, f"{path}.{key}" if path else key) for key, a, b in pairs)
    return next((text for text in found if text), None)


def _validate(plain: Any) -> RunConfig:
    try:
        config = RunConfig.model_validate(with_whole_stages(plain))
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    if not (config.objectives or config.stages):
        raise UserError("objectives: name at least one")
    return config


def _explain(error: ValidationError) -> str:
    # An unknown key explains the others (a missing one may be misspelt), so it goes first.
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    location = first["loc"]
    if "objectives" in location:
        name = location.index("objectives") + 2
        location = location[:name] + location[name + 1 :]
    path = [str(part) for part in location]
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        prefix = dotted.removesuffix(path[-1])
        return f"unknown key {dotted}: {nearest(path[-1], _keys_at(first['loc'][:-1]), prefix)}"
    if first["type"] == "missing":
        return f"{dotted} is missing" + _HINTS.get(dotted, "")
    if first["type"] == "too_short":
        return f"{dotted}: name at least one"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{dotted} is a section of keys, got {first['input']!r}"
    if first["type"] == "union_tag_not_found":
        return f"{dotted}.name is missing: one of {', '.join(OBJECTIVES)}"
    if first["type"] == "union_tag_invalid":
        return f"{dotted}.name must be one of {', '.join(OBJECTIVES)}, got {first['ctx']['tag']!r}"
    return in_words(first, dotted)


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a pydantic error location."""
    if "objectives" in location:
        return list(OBJECTIVES[str(location[location.index("objectives") + 2])].model_fields)
    section: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int):  # of the stages
            section = StageConfig
            continue
        annotation = section.model_fields[str(part)].annotation
        options = (annotation, *get_args(annotation))
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
