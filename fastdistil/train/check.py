"""Whether the keys of a run's configuration go together."""

from typing import TYPE_CHECKING

from fastdistil.errors import UserError
from fastdistil.train.objective_config import VocabularyConfig
from fastdistil.train.sections import StageConfig

if TYPE_CHECKING:
    from fastdistil.train.config import RunConfig

# Folders that a run has besides those of its stages.
_FOLDERS = ("teacher", "student", "baseline", "model", "head", "tokenizer", "checkpoints", "tensorboard")


def check_complete(config: "RunConfig") -> None:
    """Raise `UserError`, one line, for keys that do not go together or a key that is missing."""
    stages = config.student_stages
    _check_stages(config)
    for stage in stages:
        if stage.reads == "text" and stage.data.corpus is None:
            raise UserError(f"recipe {config.recipe} needs a corpus: --corpus ID_OR_PATH")
        if stage.reads == "task" and config.task is None:
            raise UserError(_needs_task(config))
    if config.uses_teacher and config.teacher is None and config.new_teacher is None:
        raise UserError(f"recipe {config.recipe} needs a teacher: --teacher ID_OR_DIR")
    if config.new_teacher is not None and config.task is not None:
        raise UserError("new_teacher: is trained on text; fine-tune one for a task (recipe finetune)")
    if config.teacher is not None and config.new_teacher is not None:
        raise UserError("teacher and new_teacher exclude each other")
    if not config.uses_teacher:
        if config.teacher is not None:
            raise UserError("teacher: no objective uses it (all have kd_weight 0)")
        if config.baseline:
            raise UserError("baseline: a run without a teacher is its own baseline")
        if config.student.from_model is None:
            raise UserError(f"recipe {config.recipe} needs a model to train: --teacher ID_OR_DIR")
    elif config.student.from_model is not None and config.task is None:
        raise UserError("student.from_model: a distilled student starts from its teacher; leave it out")
    if config.run.head_warmup_steps and (config.uses_teacher or config.task is not None):
        raise UserError("run.head_warmup_steps is for a masked language model without a teacher")
    layers, count = config.student.teacher_layers, config.student.num_layers
    if isinstance(layers, list) and count is not None and len(layers) != count:
        raise UserError(f"student.teacher_layers names {len(layers)} layers, student.num_layers is {count}")


def _check_stages(config: "RunConfig") -> None:
    if not config.stages:
        _check_only_stage(config)
    names = [stage.name for stage in config.stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"stages: {name} is given twice")
    for number, stage in enumerate(config.student_stages):
        key = f"stages.{number}." if config.stages else ""
        _check_objectives(stage, f"{key}objectives")
        if config.stages and stage.name in _FOLDERS:
            raise UserError(f"{key}name: {stage.name} is another folder of the run; choose another name")
        if stage.run.precision != config.run.precision:
            raise UserError(f"{key}run.precision: it is the same for all stages; set run.precision")
        if stage.layerwise and not any(hasattr(objective, "layers") for objective in stage.objectives):
            raise UserError(f"{key}layerwise: none of its objectives compares layers")
        if stage.layerwise and stage.run.steps is None:
            raise UserError(f"{key}run.steps: a layerwise stage needs it, for each layer")
        if stage.teacher is not None and config.task is None:
            raise UserError(f"{key}teacher: a run on text alone has one teacher for all stages; set teacher")
        if stage.augment is not None and stage.reads == "text":
            raise UserError(f"{key}augment: makes examples of a task, but this stage reads text")
    last = config.student_stages[-1]
    if config.task is not None and last.reads == "text":
        raise UserError("task: the last stage of the recipe reads text; leave the task out")
    if config.task is not None and not any(o.name == "prediction" for o in last.objectives):
        raise UserError(
            f"recipe {config.recipe} does not train the head of a task: leave out --task, or add objective "
            "prediction"
        )
    masked = all(stage.masking is not None for stage in config.student_stages)
    if config.task is None:
        if len(config.stages) > 1 and not config.uses_teacher:
            raise UserError("stages: without a teacher, text is read in one; run a recipe for each instead")
        if any(stage.data.streaming and stage.data.sentence_pairs for stage in config.student_stages):
            raise UserError("data.streaming: sentence pairs are drawn from the whole corpus; leave it out")
        if config.baseline and config.uses_teacher and not config.uses_vocabulary:
            raise UserError(
                "baseline: trains the student as a masked language model, which needs objective vocabulary; "
                "a run without it compares with the student before training"
            )
        if not masked and (config.baseline or config.new_teacher):
            which = "baseline" if config.baseline else "new_teacher"
            raise UserError(f"masking: {which} trains a masked language model and needs it")


def _check_only_stage(config: "RunConfig") -> None:
    """Whether it reads text or a task is for the command line to say, which the objectives must fit."""
    names = {objective.name for objective in config.objectives}
    if config.task is None and "prediction" in names:
        raise UserError(_needs_task(config))
    if config.task is not None and names & {"vocabulary", "next_sentence"}:
        raise UserError(f"recipe {config.recipe} reads text, not a task: leave out --task")


def _needs_task(config: "RunConfig") -> str:
    return f"recipe {config.recipe} needs a task: --task NAME (sst2, mrpc, ...)"


def _check_objectives(stage: StageConfig, key: str) -> None:
    names = [objective.name for objective in stage.objectives]
    for i, objective in enumerate(stage.objectives):
        if names.count(objective.name) > 1:
            raise UserError(f"{key}: {objective.name} is given twice")
        if objective.name == "prediction" and stage.reads == "text":
            raise UserError(f"{key}.{i}: prediction compares a task's logits; text has none")
        if objective.name == "next_sentence" and not stage.data.sentence_pairs:
            raise UserError(f"{key}.{i}: next_sentence reads pairs of segments; set data.sentence_pairs=true")
        if objective.name in ("vocabulary", "next_sentence") and stage.reads == "task":
            raise UserError(f"{key}.{i}: {objective.name} reads masked text, but this stage reads a task")
        if (
            stage.masking is None
            and isinstance(objective, VocabularyConfig)
            and objective.needs_masked_tokens
        ):
            raise UserError(
                f"{key}.{i}: without masking there are no masked tokens; set masking.probability, or "
                "positions to all and ce_weight to 0"
            )
