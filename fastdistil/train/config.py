"""The whole configuration of a training run; the objectives' sections are in objective_config.py.

`load_config` reads a recipe (YAML), applies `key=value` overrides and returns a checked `RunConfig`.
Every key is documented on its field, with its unit; an unknown key is an error that names the nearest one.
"""

import contextlib
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from fastdistil.errors import UserError
from fastdistil.recipes import load_recipe
from fastdistil.train.objective_config import OBJECTIVES, ObjectiveConfig, Section, VocabularyConfig


class StudentConfig(Section):
    """The model that is trained. Sizes left at None are the teacher's."""

    num_layers: int | None = Field(
        default=None, ge=1, description="transformer layers; None: half of the teacher's"
    )
    teacher_layers: list[int] | None = Field(
        default=None,
        description="0-based teacher layers that the student's layers start from; None: evenly spaced",
    )
    hidden_size: int | None = Field(default=None, ge=1, description="width of the hidden states")
    num_attention_heads: int | None = Field(default=None, ge=1, description="attention heads a layer")
    intermediate_size: int | None = Field(default=None, ge=1, description="width of the feed-forward layer")
    from_model: str | None = Field(
        default=None,
        description="folder or hub id of the model to train or adapt (recipe mlm); no sizes then",
    )
    init: Literal["teacher", "random"] = Field(
        default="teacher", description="where the first weights come from"
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="probability, hidden and attention; None: as in the teacher's config",
    )


class NewTeacherConfig(Section):
    """A ModernBERT teacher that the run trains itself, as a masked language model, before it distils.

    Its rotary positions learn from a million tokens what BERT's position embeddings need many millions for.
    """

    num_layers: int = Field(default=6, ge=1, description="transformer layers")
    hidden_size: int = Field(default=256, ge=1, description="width of the hidden states")
    num_attention_heads: int = Field(default=4, ge=1, description="attention heads a layer")
    intermediate_size: int = Field(default=1024, ge=1, description="width of the feed-forward layer")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="probability, hidden and attention")
    steps: int = Field(description="optimiser steps", ge=1)
    lr: float = Field(default=5e-4, gt=0, description="peak learning rate")


class DataConfig(Section):
    corpus: str | None = Field(
        default=None,
        description="text file, folder, glob, parquet, jsonl, a `datasets` name, a prepared token store, "
        "or 'machine' (the English documentation that Python's installation holds)",
    )
    text_column: str = Field(default="text", description="column of parquet, jsonl and `datasets` rows")
    split: str = Field(default="train", description="split of a `datasets` name")
    streaming: bool = Field(
        default=False, description="read a `datasets` name as a stream instead of downloading it"
    )
    validation: str | None = Field(default=None, description="held-out corpus; None: a share of `corpus`")
    max_validation_sequences: int | None = Field(
        default=None, ge=1, description="stop reading `validation` here; None: read all"
    )
    validation_fraction: float = Field(
        default=0.01, gt=0, lt=1, description="share of the documents held out"
    )
    max_length: int = Field(default=128, ge=8, description="tokens a sequence, with [CLS] and [SEP]")
    max_sequences: int | None = Field(
        default=None, ge=1, description="stop reading the corpus here; None: read all"
    )
    tokenizer: str | None = Field(default=None, description="folder or hub id; None: the teacher's")
    vocab_size: int | None = Field(
        default=None,
        ge=64,
        description="train a WordPiece vocabulary of this many entries on the corpus instead",
    )
    cache_dir: Path | None = Field(
        default=None, description="where token stores are kept; None: ~/.cache/fastdistil"
    )


class MaskingConfig(Section):
    """Devlin et al. 2019, section 3.1; smoothing from the DistilBERT code."""

    probability: float = Field(
        default=0.15, gt=0, lt=1, description="share of a sequence's tokens to predict"
    )
    mask: float = Field(default=0.8, ge=0, le=1, description="share of those shown as [MASK]")
    random: float = Field(default=0.1, ge=0, le=1, description="share shown as a random token")
    keep: float = Field(default=0.1, ge=0, le=1, description="share left as they are")
    smoothing: float | None = Field(
        default=None, ge=0, description="tokens are picked with weight count^-smoothing; None: all alike"
    )
    whole_word: bool = Field(default=False, description="pick all pieces of a word together")

    @model_validator(mode="after")
    def _shares(self) -> "MaskingConfig":
        if abs(self.mask + self.random + self.keep - 1) > 1e-6:
            raise ValueError(f"mask + random + keep must be 1, got {self.mask + self.random + self.keep:g}")
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019)."""

    lr: float = Field(default=5e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="not applied to biases and norms")
    max_grad_norm: float = Field(default=5.0, gt=0, description="gradients are clipped to this L2 norm")


class ScheduleConfig(Section):
    name: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="shape after the warm-up"
    )
    warmup: float = Field(
        default=0.05, ge=0, le=1, description="share of the steps with a linear rise from 0"
    )


class LoopConfig(Section):
    steps: int | None = Field(default=None, ge=1, description="optimiser steps; this or `epochs`")
    epochs: float | None = Field(default=None, gt=0, description="passes over the training sequences")
    batch_size: int = Field(
        default=32, ge=1, description="sequences an optimiser step, over all processes and micro-batches"
    )
    micro_batch_size: int = Field(default=32, ge=1, description="sequences a forward pass of one process")
    eval_every: int = Field(default=200, ge=1, description="optimiser steps between held-out evaluations")
    eval_sequences: int = Field(
        default=512, ge=1, description="held-out sequences of an evaluation while training"
    )
    checkpoint_every: int = Field(default=500, ge=1, description="optimiser steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    log_every: int = Field(default=10, ge=1, description="optimiser steps between log lines")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="bf16: autocast; auto: bf16 where the device has the instructions"
    )
    teacher_precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="of the teacher, which needs no gradient; auto: bf16 where the device has the "
        "instructions, whatever `precision` is",
    )
    head_warmup_steps: int = Field(
        default=0,
        ge=0,
        description="optimiser steps that train the new prediction head alone, before the rest",
    )

    head_warmup_lr: float = Field(default=1e-3, gt=0, description="peak learning rate of these steps")

    @model_validator(mode="after")
    def _length_and_sizes(self) -> "LoopConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class RunConfig(Section):
    recipe: str = Field(description="name of the recipe this run started from")
    description: str = ""
    paper: str | None = Field(default=None, description="what the recipe reproduces")
    checked_against: str | None = Field(default=None, description="the code its numbers were read from")
    output: Path = Field(default=Path("runs/fastdistil"), description="folder for everything the run writes")
    seed: int = Field(
        default=0, ge=0, description="of the weights, the data order, the masks and the dropout"
    )
    teacher: str | None = Field(
        default=None,
        description="folder or hub id; with a masked-LM head where objective `vocabulary` is used",
    )
    new_teacher: NewTeacherConfig | None = Field(default=None, description="train the teacher first")
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    masking: MaskingConfig | None = Field(
        default=MaskingConfig(), description="None: the models read the text as it is"
    )
    objectives: list[ObjectiveConfig] = Field(min_length=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    run: LoopConfig
    baseline: bool = Field(
        default=False,
        description="also train the same student, from the same weights on the same data, without teacher",
    )

    @property
    def uses_teacher(self) -> bool:
        return any(o.name != "vocabulary" or o.kd_weight > 0 for o in self.objectives)

    @property
    def uses_vocabulary(self) -> bool:
        """Whether teacher and student need a masked-language-model head."""
        return any(o.name == "vocabulary" for o in self.objectives)

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the result (so not of where it is written)."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        plain = self.model_dump(mode="json")
        del plain["output"], plain["data"]["cache_dir"]
        return plain

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    teacher: str | None = None,
    corpus: str | None = None,
    output: str | Path | None = None,
) -> RunConfig:
    """Read a recipe by name or path, apply `"a.b=value"` overrides (values are YAML) and check the result.

    `teacher` is the model to learn from; for a recipe without distillation, the model to adapt.
    Raises `UserError`, one line with the dotted key, for anything that does not fit.
    """
    plain = load_recipe(recipe)
    plain.setdefault("recipe", Path(recipe).stem)
    for override in overrides:
        _apply(plain, override)
    config = _validate(plain)
    if teacher is not None:
        if config.new_teacher is not None:
            raise UserError(
                f"recipe {config.recipe} trains its own teacher: use recipe distilbert for {teacher}"
            )
        if config.uses_teacher:
            plain["teacher"] = teacher
        else:
            plain.setdefault("student", {})["from_model"] = teacher
    if corpus is not None:
        plain.setdefault("data", {})["corpus"] = corpus
    plain["output"] = str(output or plain.get("output") or Path("runs") / config.recipe)
    config = _validate(plain)
    _check_complete(config)
    return config


def read_config(path: Path) -> RunConfig:
    """The resolved configuration that a run left in its output folder."""
    try:
        return _validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not the configuration of a run: {error}") from None


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


def _apply(plain: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"an override reads key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}: {text!r} is not a YAML value") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 (no dot) as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    if key in ("run.steps", "run.epochs"):  # either replaces the recipe's choice of the other
        plain.get("run", {}).pop("epochs" if key == "run.steps" else "steps", None)
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
    else:
        node[last] = value


def _item(node: list[Any], part: str, key: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"{key}: expected an index from 0 to {len(node) - 1}, got {part!r}")
    return node[int(part)]


def _validate(plain: Any) -> RunConfig:
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    # An unknown key explains the others (a missing one may be misspelt), so it goes first.
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    location = first["loc"]
    if location[:1] == ("objectives",):
        location = location[:2] + location[3:]  # without the name of the objective
    path = [str(part) for part in location]
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"known: {', '.join(known)}"
        return f"unknown key {dotted}: {hint}"
    if first["type"] == "missing":
        return f"{dotted} is missing"
    if first["type"] == "union_tag_invalid":
        return f"{dotted}.name must be one of {', '.join(OBJECTIVES)}, got {first['ctx']['tag']!r}"
    message = first["msg"].removeprefix("Value error, ")
    where = f"{dotted}: " if dotted else ""
    shown = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return f"{where}{message[0].lower()}{message[1:]}{shown}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a pydantic error location."""
    if location[:1] == ("objectives",):
        return list(OBJECTIVES[str(location[2])].model_fields)
    section: type[BaseModel] = RunConfig
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        options = (annotation, *get_args(annotation))
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)


def _check_complete(config: RunConfig) -> None:
    if config.data.corpus is None:
        raise UserError(f"recipe {config.recipe} needs a corpus: --corpus ID_OR_PATH")
    _check_objectives(config)
    if config.uses_teacher and config.teacher is None and config.new_teacher is None:
        raise UserError(f"recipe {config.recipe} needs a teacher: --teacher ID_OR_DIR")
    if config.teacher is not None and config.new_teacher is not None:
        raise UserError("teacher and new_teacher exclude each other")
    if not config.uses_teacher:
        if config.teacher is not None:
            raise UserError("teacher: no objective uses it (all have kd_weight 0)")
        if config.baseline:
            raise UserError("baseline: a run without a teacher is its own baseline")
        if config.student.from_model is None:
            raise UserError(f"recipe {config.recipe} needs a model to train: --teacher ID_OR_DIR")
    elif config.student.from_model is not None:
        raise UserError("student.from_model: a distilled student starts from its teacher; leave it out")
    if config.run.head_warmup_steps and config.uses_teacher:
        raise UserError("run.head_warmup_steps is for a run without a teacher")
    layers, count = config.student.teacher_layers, config.student.num_layers
    if layers is not None and count is not None and len(layers) != count:
        raise UserError(f"student.teacher_layers names {len(layers)} layers, student.num_layers is {count}")


def _check_objectives(config: RunConfig) -> None:
    names = [objective.name for objective in config.objectives]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"objectives: {name} is given twice")
    for i, objective in enumerate(config.objectives):
        if (
            config.masking is None
            and isinstance(objective, VocabularyConfig)
            and objective.needs_masked_tokens
        ):
            raise UserError(
                f"objectives.{i}: without masking there are no masked tokens; set masking.probability, or "
                "positions to all and ce_weight to 0"
            )
    if config.baseline and config.uses_teacher and not config.uses_vocabulary:
        raise UserError(
            "baseline: trains the student as a masked language model, which needs objective vocabulary; a "
            "run without it compares with the student before training"
        )
    if config.masking is None and (config.baseline or config.new_teacher):
        which = "baseline" if config.baseline else "new_teacher"
        raise UserError(f"masking: {which} trains a masked language model and needs it")
