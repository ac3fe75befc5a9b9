"""A run that ends with a model for a task: fine-tuning, and distillation in one stage or several."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fastdistil.data.tasks import Task, find_task
from fastdistil.errors import UserError
from fastdistil.evaluate import check_teacher, evaluate_objectives, evaluate_task
from fastdistil.models.layers import layer_pairs
from fastdistil.models.load import load_encoder, load_masked_lm, load_tokenizer, max_positions
from fastdistil.models.student import check_same_tokenizer
from fastdistil.models.task import load_task_model
from fastdistil.objectives import Objective
from fastdistil.train.answers import ask_once
from fastdistil.train.build import make_objectives, try_objectives
from fastdistil.train.config import RunConfig, uses_teacher, uses_vocabulary
from fastdistil.train.logging import RunLog
from fastdistil.train.objective_config import ObjectiveConfig, PredictionConfig
from fastdistil.train.phases import Phases, autocast_dtype, phase_names
from fastdistil.train.prepare import MaskedText, PreparedData, Texts
from fastdistil.train.prepare_task import TaskData, TaskExamples
from fastdistil.train.report import RunResult, finish
from fastdistil.train.sections import StageConfig
from fastdistil.train.students import build_student

_LABELS_ALONE: list[ObjectiveConfig] = [PredictionConfig(kd_weight=0, task_weight=1)]


class TaskRun:
    def __init__(
        self, config: RunConfig, accelerator: Accelerator, log: RunLog, *, score: bool = True
    ) -> None:
        assert config.task is not None
        self.config, self.accelerator, self.log, self.score = config, accelerator, log, score
        self.task: Task = find_task(config.task.name)
        self.phases = Phases(config, accelerator, log, score=score)
        self.stages = config.student_stages
        self.last = self.stages[-1]
        self.teachers: dict[tuple[str, str], Any] = {}

    def whole(self) -> RunResult:
        config = self.config
        assert config.task is not None
        self.tokenizer = self._first_look()
        self.text = Texts(self.tokenizer, self.accelerator, self.log)
        self.data = TaskData(config, self.task, self.tokenizer, self.accelerator, self.log)
        self.teacher_scores: dict[str, float] | None = None
        if config.teacher is not None and self.score:
            self._score_teacher()
        name = "student" if config.uses_teacher else "model"
        build: Callable[[], Any] | None = None
        baseline: Callable[[], Any] | None = None
        for stage, phase in zip(self.stages, [*phase_names(self.stages)[:-1], name], strict=True):
            build = self._first_student(stage) if build is None else build
            if stage.reads == "task" and baseline is None:
                baseline = build
            folder = self._stage(stage, phase, build)
            build = self._loader(folder, self._next(stage))
        if config.baseline:
            assert baseline is not None
            self._baseline(baseline)
        return self._report() if self.score else RunResult(config.output, [])

    def _first_look(self) -> Any:
        """The tokenizer; what does not fit is told before anything is read."""
        config = self.config
        source = config.student.from_model or config.teacher
        assert source is not None
        kind = self.stages[0]
        student = self._first_student(kind)()
        tokenizer = load_tokenizer(source, masks=kind.reads == "text")
        self._check_lengths(student, source)
        self.depth: int = getattr(student.config, "num_hidden_layers", 0)  # a BiLSTM has no such layers
        for stage in self.stages:
            if not any(uses_teacher(o) for o in stage.objectives):
                continue
            teacher, theirs = self._teacher(stage)
            check_same_tokenizer(theirs, tokenizer)
            self._check_lengths(teacher, stage.teacher or str(config.teacher))
            if stage.reads == kind.reads and not stage.layerwise:
                objectives = make_objectives(stage.objectives, student, teacher)
                try_objectives(objectives, student, teacher, self._kind(stage))
        return tokenizer

    def _check_lengths(self, model: Any, source: str) -> None:
        assert self.config.task is not None
        positions = max_positions(model)
        lengths = {"task.max_length": self.config.task.max_length}
        for stage in self.stages:
            if stage.reads == "text":
                lengths["data.max_length"] = max(stage.data.max_length, lengths.get("data.max_length", 0))
        for key, length in lengths.items():
            if length > positions:
                raise UserError(f"{key} is {length}, but {source} has only {positions} positions")

    def _kind(self, stage: StageConfig) -> str | None:
        return self.task.kind if stage.reads == "task" else None

    def _score_teacher(self) -> None:
        """The teacher's scores, before anything is learnt from it."""
        stage = self.last
        if not any(uses_teacher(o) for o in stage.objectives):
            stage = next(s for s in self.stages if any(uses_teacher(o) for o in s.objectives))
        if stage.reads == "text":
            return
        teacher, _ = self._teacher(stage)
        source, held_out = stage.teacher or self.config.teacher, self.data.held_out
        self.teacher_scores = evaluate_task(teacher, self.task, held_out)
        allow_weak = self.config.allow_weak_teacher
        check_teacher(
            source, self.task, self.teacher_scores, held_out.labels, self.log.say, allow_weak=allow_weak
        )

    def _stage(self, stage: StageConfig, phase: str, build: Callable[[], Any]) -> Path:
        teacher = None
        if any(uses_teacher(o) for o in stage.objectives):
            teacher = self._teacher(stage)[0]
        examples: Any
        evaluate: Callable[[Any, Sequence[Objective]], dict[str, float]]
        if stage.reads == "task":
            examples, evaluate = self.data.training(stage.augment), self._while_training
            if teacher is not None and self._answers_suffice(stage):
                examples = self._answered(stage, examples, teacher)
        else:
            text = self.text(stage.data)
            examples = MaskedText(text, stage.masking)
            evaluate = partial(self._distance, stage, text, teacher)
        return self.phases.run_stage(
            stage,
            phase,
            build,
            lambda folder: self._load(str(folder), stage)[0],
            examples,
            evaluate,
            self.tokenizer,
            teacher,
            self._kind(stage),
        )

    def _answers_suffice(self, stage: StageConfig) -> bool:
        """Whether the teacher may be asked once for all epochs, and for all runs that read the same examples:
        logits and outputs at the first token are all that is compared."""
        few = all(
            objective.name == "prediction" or (objective.name == "hidden" and objective.tokens == "first")
            for objective in stage.objectives
        )
        return few and self.task.kind != "span"

    def _answered(self, stage: StageConfig, examples: TaskExamples, teacher: Any) -> TaskExamples:
        mappings = [objective.layers for objective in stage.objectives if objective.name == "hidden"]
        depth = teacher.config.num_hidden_layers if mappings else 0
        pairs = (pair for mapping in mappings for pair in layer_pairs(mapping, self.depth, depth))
        with self.accelerator.main_process_first():
            answers = ask_once(
                teacher,
                str(stage.teacher or self.config.teacher),
                examples.data,
                examples.rows_read(stage.run, self.config.seed),
                sorted({layer for _, layer in pairs}),
                dtype=autocast_dtype(stage.run.teacher_precision),
                cache_dir=self.config.data.cache_dir,
                log=self.log,
            )
        return replace(examples, data=replace(examples.data, answers=answers))

    def _baseline(self, build: Callable[[], Any]) -> None:
        """The same student from the same weights, from the labels alone."""
        stage, epochs = self.last, self.config.baseline_epochs
        update = {"epochs": epochs, "steps": None} if epochs else {}
        self.phases.run(
            "baseline",
            build,
            lambda model: make_objectives(_LABELS_ALONE, model),
            self.data.training(None),
            self._while_training,
            self.tokenizer,
            optimizer=stage.optimizer,
            schedule=stage.schedule,
            loop=stage.run.model_copy(update=update),
        )

    def _first_student(self, stage: StageConfig) -> Callable[[], Any]:
        config = self.config.student
        source = config.from_model or stage.teacher or self.config.teacher
        assert source is not None

        def build() -> Any:
            torch.manual_seed(self.config.seed)
            model, _ = self._load(source, stage)
            return build_student(config, model, pairs=len(self.task.columns) > 1)

        return build

    def _next(self, stage: StageConfig) -> StageConfig:
        following = self.stages[self.stages.index(stage) + 1 :]
        return following[0] if following else stage

    def _loader(self, folder: Path, stage: StageConfig) -> Callable[[], Any]:
        return lambda: self._load(str(folder), stage)[0]

    def _load(self, source: str, stage: StageConfig) -> tuple[Any, Any]:
        """A student, or what it is made of, with the head that the stage's objectives need."""
        if stage.reads == "task":
            return load_task_model(source, self.task, new_head=True)
        return load_masked_lm(source) if uses_vocabulary([stage]) else load_encoder(source)

    def _teacher(self, stage: StageConfig) -> tuple[Any, Any]:
        source = stage.teacher or self.config.teacher
        assert source is not None
        kind = "task" if stage.reads == "task" else "vocabulary" if uses_vocabulary([stage]) else "encoder"
        if (source, kind) not in self.teachers:
            if kind == "task":
                model, tokenizer = load_task_model(source, self.task, new_head=False)
            else:
                model, tokenizer = self._load(source, stage)
            model.to(self.accelerator.device).eval().requires_grad_(False)
            self.teachers[source, kind] = model, tokenizer
        found: tuple[Any, Any] = self.teachers[source, kind]
        return found

    def _while_training(self, model: Any, objectives: Sequence[Objective]) -> dict[str, float]:
        scores = evaluate_task(model, self.task, self.data.held_out, dtype=self.phases.dtype)
        return {f"held_out_{name}": value for name, value in scores.items()}

    def _distance(
        self,
        stage: StageConfig,
        text: PreparedData,
        teacher: Any,
        model: Any,
        objectives: Sequence[Objective],
    ) -> dict[str, float]:
        rows = text.held_out_rows[: stage.run.eval_sequences]
        masker = text.masker(stage.masking, seed=0, device=model.device)
        scores = evaluate_objectives(
            model, teacher, objectives, masker, text.held_out, rows, dtype=self.phases.dtype
        )
        return {f"held_out_{name}": value for name, value in scores.items()}

    def _report(self) -> RunResult:
        self.log.say(f"scoring on {self.task.name}, and timing on the CPU")
        return finish(
            self.config,
            self.accelerator,
            self.log,
            self.phases.trained,
            self._final,
            self.data.describe(),
            task=self.task,
        )

    def _final(self) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        models, scores = {}, {}
        if self.teacher_scores is not None:
            models["teacher"] = self._teacher(self.last)[0]
            scores["teacher"] = self.teacher_scores
        for name in ("model", "student", "baseline"):
            if name in self.phases.trained:
                model, _ = load_task_model(self.phases.trained[name], self.task, new_head=False)
                models[name] = model.to(self.accelerator.device)
                scores[name] = evaluate_task(models[name], self.task, self.data.held_out)
        return models, scores
