"""Train one model of a run after the other, each with its own checkpoints and folder.

A phase is finished when its model folder stands in the output folder, under the phase's name; a resumed run
skips it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from fastdistil.data.batches import BatchSource
from fastdistil.errors import UserError
from fastdistil.models.layers import layer_pairs
from fastdistil.models.stack import embedding_parameters, layer_parameters
from fastdistil.models.taps import fast_dtype, frozen_copy
from fastdistil.objectives import Objective
from fastdistil.train.build import make_objectives
from fastdistil.train.checkpoint import save_model
from fastdistil.train.config import RunConfig
from fastdistil.train.logging import RunLog
from fastdistil.train.loop import Phase, train
from fastdistil.train.objective_config import ObjectiveConfig, describe
from fastdistil.train.sections import LoopConfig, OptimizerConfig, ScheduleConfig, StageConfig

CHECKPOINTS = "checkpoints"


class Examples(Protocol):
    """What a phase reads: masked text, or the examples of a task."""

    def steps_per_epoch(self, loop: LoopConfig) -> int | None:
        """None: a stream."""

    def steps(self, loop: LoopConfig) -> int:
        """Optimiser steps of a phase."""

    def batches(self, loop: LoopConfig, seed: int, accelerator: Accelerator) -> BatchSource: ...


class Phases:
    """Of one run: what all of its phases share, and the folders of those that are trained."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, log: RunLog, *, score: bool) -> None:
        self.config, self.accelerator, self.log, self.score = config, accelerator, log, score
        self.dtype = autocast_dtype(config.run.precision)
        self.trained: dict[str, Path] = {}

    def run(
        self,
        name: str,
        build: Callable[[], Any],
        objectives: Callable[[Any], Sequence[Objective]],
        examples: Examples,
        evaluate: Callable[[Any, Sequence[Objective]], dict[str, float]],
        tokenizer: Any,
        *,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        loop: LoopConfig,
        teacher: Any | None = None,
        parameters: Callable[[Any], list[nn.Parameter]] | None = None,
        seed: int | None = None,
    ) -> Path:
        """The folder of the trained model.

        Args:
            build: the model at its first weights, from torch's global random state.
            objectives: of that model.
            evaluate: a model's scores on held-out data, from the model and its objectives.
            teacher: in eval mode; None: no objective uses one.
            parameters: those of the model that are trained; None: all.
            seed: of data order, masks and dropout; None: the run's.
        """
        folder = self.config.output / name
        self.trained[name] = folder
        if folder.exists():
            self.log.say(f"{name}: finished before")
            return folder
        # Student and baseline draw the same weights, data order, masks and dropout from the same seed.
        seed = self.config.seed if seed is None else seed
        torch.manual_seed(self.config.seed)
        model = build()
        built = objectives(model)
        steps = examples.steps(loop)
        epoch = examples.steps_per_epoch(loop) or steps
        teacher_dtype = autocast_dtype(loop.teacher_precision)
        phase = Phase(
            name=name,
            model=model,
            teacher=None if teacher is None else frozen_copy(teacher, teacher_dtype),
            teacher_dtype=teacher_dtype,
            objectives=built,
            batches=examples.batches(loop, seed, self.accelerator),
            steps=steps,
            seed=seed,
            optimizer=optimizer,
            schedule=schedule,
            loop=loop,
            eval_every=loop.eval_every or epoch,
            checkpoint_every=loop.checkpoint_every or epoch,
            checkpoints=self.config.output / CHECKPOINTS / name,
            fingerprint=self.config.fingerprint(),
            evaluate=(lambda model: evaluate(model, built)) if self.score else None,
            parameters=None if parameters is None else parameters(model),
        )
        train(phase, self.accelerator, self.log)
        if self.accelerator.is_main_process:
            save_model(model, tokenizer, folder)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return folder

    def run_stage(
        self,
        stage: StageConfig,
        name: str,
        build: Callable[[], Any],
        load: Callable[[Path], Any],
        examples: Examples,
        evaluate: Callable[[Any, Sequence[Objective]], dict[str, float]],
        tokenizer: Any,
        teacher: Any | None,
        task_kind: str | None = None,
    ) -> Path:
        """The folder of the student after a stage, which is one phase, or one for each layer.

        `load` reads the model of a folder; the other arguments are as of `run`.
        """

        def phase(
            name: str,
            build: Callable[[], Any],
            configs: Sequence[ObjectiveConfig],
            parameters: Callable[[Any], list[nn.Parameter]] | None = None,
        ) -> Path:
            return self.run(
                name,
                build,
                lambda model: make_objectives(configs, model, teacher),
                examples,
                evaluate,
                tokenizer,
                optimizer=stage.optimizer,
                schedule=stage.schedule,
                loop=stage.run,
                teacher=teacher,
                parameters=parameters,
            )

        self.log.say(f"{name}: {describe(stage.objectives, task_kind)}")
        if not stage.layerwise:
            return phase(name, build, stage.objectives)
        assert teacher is not None
        depths = build().config.num_hidden_layers, teacher.config.num_hidden_layers
        folder = self.config.output / name
        for layer_name, configs, layer in layer_phases(name, stage, *depths):
            folder = phase(layer_name, build, configs, partial(_up_to_layer, layer=layer))
            build = partial(load, folder)
        return folder


def phase_names(stages: Sequence[StageConfig]) -> list[str]:
    """One name a stage; the last one's model is the student."""
    return [*(stage.name for stage in stages[:-1]), "student"]


def layer_phases(
    name: str, stage: StageConfig, student_depth: int, teacher_depth: int
) -> list[tuple[str, list[ObjectiveConfig], int]]:
    """`(phase, objectives, layer)` for each of the student's layers of a layerwise stage.

    Each objective with a layer mapping keeps the pair of that layer alone. Raises `UserError` for a layer
    that no objective is left for.
    """
    phases = []
    for layer in range(student_depth):
        objectives = []
        for objective in stage.objectives:
            if hasattr(objective, "layers"):
                pairs = layer_pairs(objective.layers, student_depth, teacher_depth)
                own = [[ours, theirs] for ours, theirs in pairs if ours == layer]
                if not own:
                    continue
                objective = objective.model_copy(update={"layers": own})
            objectives.append(objective)
        if not objectives:
            raise UserError(
                f"{name}: no objective of this layerwise stage has a pair for layer {layer + 1} of "
                f"{student_depth}: choose layers: uniform"
            )
        last = layer == student_depth - 1
        phases.append((name if last else f"{name}-layer-{layer + 1}", objectives, layer))
    return phases


def _up_to_layer(model: Any, *, layer: int) -> list[nn.Parameter]:
    """What a layer's phase trains; with the first layer, what feeds it."""
    own = layer_parameters(model, layer)
    return [*embedding_parameters(model), *own] if layer == 0 else own


def autocast_dtype(precision: str) -> torch.dtype | None:
    match precision:
        case "bf16":
            return torch.bfloat16
        case "auto":
            return fast_dtype(torch.accelerator.current_accelerator() or torch.device("cpu"))
        case _:
            return None
