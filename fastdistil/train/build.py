"""From the sections of a configuration to objectives for two models, and whether they fit each other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastdistil.data.batches import Batch
from fastdistil.data.masking import MaskedBatch
from fastdistil.data.task_batches import TaskBatch
from fastdistil.errors import UserError
from fastdistil.models.bilstm import BiLSTMConfig
from fastdistil.models.layers import LayerPairs, check_layer, layer_pairs
from fastdistil.models.taps import Wanted, tap_teacher
from fastdistil.objectives import (
    AttentionTransferObjective,
    CosineObjective,
    EmbeddingsObjective,
    FeatureMapsObjective,
    HiddenObjective,
    NextSentenceObjective,
    Objective,
    PredictionObjective,
    RelationsObjective,
    VocabularyObjective,
)
from fastdistil.train.objective_config import (
    AttentionTransferConfig,
    CosineConfig,
    EmbeddingsConfig,
    FeatureMapsConfig,
    HiddenConfig,
    NextSentenceConfig,
    ObjectiveConfig,
    PredictionConfig,
    RelationsConfig,
    VocabularyConfig,
)


def make_objectives(
    configs: Sequence[ObjectiveConfig], student: Any, teacher: Any | None = None
) -> list[Objective]:
    """The objectives of `configs` for these two models; projections draw from torch's global random state.

    Raises `UserError`, naming the key, for a layer that is not there or sizes that do not fit.
    """
    if teacher is None:  # objectives that need none look at no layer of it
        teacher = student
    objectives: list[Objective] = []
    for i, config in enumerate(configs):
        objectives.append(_make(config, f"objectives.{i}", student, teacher, objectives))
    return objectives


def _make(
    config: ObjectiveConfig, key: str, student: Any, teacher: Any, before: Sequence[Objective]
) -> Objective:
    if student.config.model_type == BiLSTMConfig.model_type and not isinstance(config, PredictionConfig):
        raise UserError(
            f"{key}: {config.name} compares what a bilstm student does not have; it learns by objective "
            "prediction alone"
        )
    match config:
        case VocabularyConfig():
            return VocabularyObjective(**config.model_dump(exclude={"name"}))
        case NextSentenceConfig():
            return NextSentenceObjective(config.weight)
        case PredictionConfig():
            return PredictionObjective(**config.model_dump(exclude={"name"}))
        case CosineConfig():
            return CosineObjective(config.weight)
        case RelationsConfig():
            return RelationsObjective(
                _layer(config.student_layer, student, "student", key),
                _layer(config.teacher_layer, teacher, "teacher", key),
                config.num_heads,
                config.query_weight,
                config.key_weight,
                config.value_weight,
            )
        case AttentionTransferConfig():
            heads = [model.config.num_attention_heads for model in (student, teacher)]
            if heads[0] != heads[1]:
                raise UserError(
                    f"{key}: attention_transfer compares head by head, but the student has {heads[0]} heads "
                    f"and the teacher {heads[1]}: set student.num_attention_heads={heads[1]}, or use "
                    "objective relations, which splits the states anew"
                )
            pairs = _pairs(config.layers, student, teacher, key)
            return AttentionTransferObjective(pairs, heads[0], config.distance, config.weight)
        case HiddenConfig():
            pairs = _pairs(config.layers, student, teacher, key)
            projection = _projection(config.projection, student, teacher, key)
            return HiddenObjective(
                pairs,
                teacher.config.hidden_size,
                projection,
                config.normalize,
                config.weight,
                config.tokens,
                config.layer_reduction,
            )
        case FeatureMapsConfig():
            widths = [model.config.hidden_size for model in (student, teacher)]
            if widths[0] != widths[1]:
                raise UserError(
                    f"{key}: feature_maps compares the layers' outputs as they are, but the student is "
                    f"{widths[0]} wide and the teacher {widths[1]}: set student.hidden_size={widths[1]}, or "
                    "use objective hidden, which learns a projection"
                )
            pairs = _pairs(config.layers, student, teacher, key)
            weights = config.feature_weight, config.mean_weight, config.variance_weight
            return FeatureMapsObjective(pairs, widths[0], *weights)
        case EmbeddingsConfig():
            if config.share_projection:
                projection = _shared_projection(before, key)
            else:
                projection = _projection(config.projection, student, teacher, key)
            return EmbeddingsObjective(teacher.config.hidden_size, projection, config.weight)


def _layer(layer: int | None, model: Any, whose: str, key: str) -> int:
    depth = model.config.num_hidden_layers
    if layer is None:
        return int(depth) - 1
    check_layer(layer, depth, whose, f"{key}.{whose}_layer")
    return layer


def _pairs(layers: str | list[list[int]], student: Any, teacher: Any, key: str) -> LayerPairs:
    depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    return layer_pairs(layers, *depths, f"{key}.layers")


def _projection(wanted: bool | None, student: Any, teacher: Any, key: str) -> nn.Linear | None:
    ours, theirs = student.config.hidden_size, teacher.config.hidden_size
    if wanted is False and ours != theirs:
        raise UserError(
            f"{key}.projection is false, but the student is {ours} wide and the teacher {theirs}: "
            "leave it out or set it to true"
        )
    if wanted is False or (wanted is None and ours == theirs):
        return None
    return nn.Linear(ours, theirs)


def _shared_projection(before: Sequence[Objective], key: str) -> nn.Linear:
    for objective in before:
        if isinstance(objective, HiddenObjective) and objective.projection is not None:
            return objective.projection
    raise UserError(f"{key}.share_projection needs an objective hidden with a projection before it")


@torch.no_grad()
def try_objectives(
    objectives: Sequence[Objective], student: Any, teacher: Any | None = None, task_kind: str | None = None
) -> None:
    """Run both models and the objectives once, on two tokens, so that what does not fit is told at once.

    `task_kind` as of `Task.kind` makes it an example of such a task; None is masked text. Raises `UserError`
    with the words of the op, tap or objective that refuses.
    """
    batch = _two_tokens(student.device, task_kind)
    training = student.training
    try:
        ours = tap_teacher(
            student.eval(), batch.inputs, wanted=Wanted.union(o.student_taps for o in objectives)
        )
        theirs = None
        if teacher is not None:
            wanted = Wanted.union(o.teacher_taps for o in objectives)
            theirs = tap_teacher(teacher.eval(), batch.inputs, wanted=wanted)
        for objective in objectives:
            objective.loss(ours, theirs, batch, objective.counts(batch))
    except ValueError as error:
        raise UserError(str(error)) from error
    finally:
        student.train(training)


def _two_tokens(device: torch.device, task_kind: str | None) -> Batch:
    """One example of two tokens; of a choice task with two options."""
    choices = 2 if task_kind == "choice" else 1
    ids = torch.zeros(choices, 2, dtype=torch.int64, device=device)
    mask, first = torch.ones_like(ids, dtype=torch.bool), ids[:1, 0]
    if task_kind is None:
        return MaskedBatch(ids, mask, ids, ids[:, :1], ids[:, :1], next_sentence=first)
    labels = {"regression": first.float(), "span": ids[:1]}.get(task_kind, first)
    return TaskBatch(ids, mask, ids, labels, choices)
