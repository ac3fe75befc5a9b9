"""A run on text alone: pretraining, adapting, and distillation before any task is known."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastdistil.evaluate import evaluate_masked_lm, evaluate_objectives
from fastdistil.models.heads import mlm_head, next_sentence_head, start_at_frequencies
from fastdistil.models.load import load_encoder, load_encoder_with_new_head, load_masked_lm
from fastdistil.objectives import Objective, projections
from fastdistil.train.build import make_objectives, try_objectives
from fastdistil.train.checkpoint import load_projections
from fastdistil.train.config import RunConfig
from fastdistil.train.logging import RunLog
from fastdistil.train.objective_config import NextSentenceConfig, ObjectiveConfig, VocabularyConfig
from fastdistil.train.phases import CHECKPOINTS, Phases, phase_names
from fastdistil.train.prepare import (
    MaskedText,
    Texts,
    check_length,
    prepare_tokenizer,
)
from fastdistil.train.report import BEFORE, RunResult, finish, shown
from fastdistil.train.sections import LoopConfig, NewTeacherConfig, ScheduleConfig, StageConfig
from fastdistil.train.students import build_student

_MASKED_LM: list[ObjectiveConfig] = [VocabularyConfig(kd_weight=0, ce_weight=1)]


class TextRun:
    def __init__(
        self, config: RunConfig, accelerator: Accelerator, log: RunLog, *, score: bool = True
    ) -> None:
        self.config, self.accelerator, self.log, self.score = config, accelerator, log, score
        self.phases = Phases(config, accelerator, log, score=score)
        self.stages = config.student_stages
        self.last = self.stages[-1]
        self.next_sentence = any(isinstance(o, NextSentenceConfig) for s in self.stages for o in s.objectives)
        self.is_language_model = config.uses_vocabulary or self.next_sentence
        self.load = (
            partial(load_masked_lm, next_sentence=self.next_sentence)
            if self.is_language_model
            else load_encoder
        )

    def whole(self) -> RunResult:
        config = self.config
        source = config.teacher or config.student.from_model
        tokenizer = None
        if config.teacher is not None:
            teacher, tokenizer = self.load(config.teacher)
            self._try(teacher)
        elif config.student.from_model is not None:
            # A first look, for the tokenizer; the head's bias needs the token counts of the text.
            model, tokenizer = self._own_model()
        self.tokenizer = prepare_tokenizer(config, tokenizer, self.accelerator)
        if source is not None:
            longest = max(stage.data.max_length for stage in self.stages)
            check_length(teacher if config.teacher else model, longest, source)
        self.text = Texts(self.tokenizer, self.accelerator, self.log)

        if not config.uses_teacher:
            self._adapt()
            return self._report(None)
        if config.new_teacher is not None:
            teacher, _ = self.load(self._new_teacher(config.new_teacher))
            self._try(teacher)
        self._distil(teacher)
        return self._report(teacher)

    def _adapt(self) -> None:
        """Recipes mlm and bert: optionally the new heads alone, then all weights."""
        loop = self.config.run

        def fresh() -> Any:
            return self._own_model(torch.from_numpy(self.text(self.last.data).token_counts))[0]

        build: Callable[[], Any] = fresh
        if loop.head_warmup_steps:
            head = self._masked_lm(
                "head",
                fresh,
                loop=loop.model_copy(update={"steps": loop.head_warmup_steps, "epochs": None}),
                lr=loop.head_warmup_lr,
                schedule=ScheduleConfig(name="constant", warmup=0.1),
                head_only=True,
                seed=self.config.seed + 1,
            )
            build = partial(self._load_model, head)
        self._masked_lm("model", build)

    def _own_model(self, token_counts: Tensor | None = None) -> tuple[Any, Any]:
        """`student.from_model`, whole, cut, or anew, with the heads that it lacks; and its tokenizer."""
        student = self.config.student
        model, tokenizer = load_encoder_with_new_head(
            str(student.from_model), token_counts=token_counts, next_sentence=self.next_sentence
        )
        model = build_student(student, model)
        if student.init == "random" and token_counts is not None:
            start_at_frequencies(mlm_head(model), token_counts)
        return model, tokenizer

    def _new_teacher(self, sizes: NewTeacherConfig) -> Path:
        def fresh() -> Any:
            from transformers import ModernBertConfig, ModernBertForMaskedLM

            tokenizer = self.tokenizer
            return ModernBertForMaskedLM(
                ModernBertConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=sizes.hidden_size,
                    num_hidden_layers=sizes.num_layers,
                    num_attention_heads=sizes.num_attention_heads,
                    intermediate_size=sizes.intermediate_size,
                    embedding_dropout=sizes.dropout,
                    attention_dropout=sizes.dropout,
                    mlp_dropout=sizes.dropout,
                    max_position_embeddings=max(self.last.data.max_length, 128),
                    pad_token_id=tokenizer.pad_token_id,
                    cls_token_id=tokenizer.cls_token_id,
                    sep_token_id=tokenizer.sep_token_id,
                    bos_token_id=tokenizer.cls_token_id,
                    eos_token_id=tokenizer.sep_token_id,
                )
            )

        loop = self.config.run
        # Its curve is not what the run is about: ten points will do.
        seldom = max(loop.eval_every or sizes.steps, sizes.steps // 10)
        return self._masked_lm(
            "teacher",
            fresh,
            loop=loop.model_copy(update={"steps": sizes.steps, "epochs": None, "eval_every": seldom}),
            lr=sizes.lr,
            seed=self.config.seed + 1,
        )

    def _distil(self, teacher: Any) -> None:
        teacher.to(self.accelerator.device).eval().requires_grad_(False)
        first = build = partial(self._student, teacher)
        for stage, name in zip(self.stages, phase_names(self.stages), strict=True):
            folder = self.phases.run_stage(
                stage,
                name,
                build,
                self._load_model,
                self._examples(stage),
                partial(self._while_training, stage, teacher),
                self.tokenizer,
                teacher,
            )
            build = partial(self._load_model, folder)
        if self.config.baseline:
            self._masked_lm("baseline", first)

    def _masked_lm(
        self,
        name: str,
        build: Callable[[], Any],
        *,
        loop: LoopConfig | None = None,
        lr: float | None = None,
        schedule: ScheduleConfig | None = None,
        head_only: bool = False,
        seed: int | None = None,
    ) -> Path:
        """Train a masked language model without a teacher, as the last stage says where nothing is given."""
        stage = self.last
        configs = stage.objectives
        if self.config.uses_teacher:
            configs = [*_MASKED_LM, *(o for o in configs if isinstance(o, NextSentenceConfig))]
        return self.phases.run(
            name,
            build,
            lambda model: make_objectives(configs, model),
            self._examples(stage),
            partial(self._while_training, stage, None),
            self.tokenizer,
            optimizer=stage.optimizer.model_copy(update={"lr": lr} if lr else {}),
            schedule=schedule or stage.schedule,
            loop=loop or stage.run,
            parameters=_head_parameters if head_only else None,
            seed=seed,
        )

    def _student(self, teacher: Any) -> Any:
        """The student at its first weights, the same ones at each call."""
        torch.manual_seed(self.config.seed)
        return build_student(self.config.student, teacher)

    def _try(self, teacher: Any) -> None:
        for stage in self.stages:
            student = self._student(teacher)
            try_objectives(make_objectives(stage.objectives, student, teacher), student, teacher)

    def _load_model(self, folder: Path) -> Any:
        return self.load(folder)[0]

    def _examples(self, stage: StageConfig) -> MaskedText:
        return MaskedText(self.text(stage.data), stage.masking)

    def _while_training(
        self, stage: StageConfig, teacher: Any | None, model: Any, objectives: Sequence[Objective]
    ) -> dict[str, float]:
        rows = self.text(stage.data).held_out_rows[: stage.run.eval_sequences]
        compared = objectives if teacher is not None and not self.is_language_model else None
        scores = self._scores(stage, model, rows, compared, teacher, self.phases.dtype)
        return {f"held_out_{name}": scores[name] for name in shown(scores)}

    def _scores(
        self,
        stage: StageConfig,
        model: Any,
        rows: np.ndarray,
        objectives: Sequence[Objective] | None = None,
        teacher: Any | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, float]:
        """On held-out text: the terms of `objectives`, or as a masked language model."""
        data = self.text(stage.data)
        if objectives is not None:
            # The same tokens for every model.
            masker = data.masker(stage.masking, seed=0, device=model.device)
            return evaluate_objectives(model, teacher, objectives, masker, data.held_out, rows, dtype=dtype)
        score = evaluate_masked_lm(model, data.facts, data.held_out, rows, dtype=dtype)
        scores = {"loss": score.loss, "accuracy": score.accuracy, "perplexity": score.perplexity}
        if score.next_sentence_accuracy is not None:
            scores["next_sentence_accuracy"] = score.next_sentence_accuracy
        return scores

    def _report(self, teacher: Any | None) -> RunResult:
        if not self.score:
            return RunResult(self.config.output, [])
        self.log.say("evaluating on all held-out text, and timing on the CPU")
        return finish(
            self.config,
            self.accelerator,
            self.log,
            self.phases.trained,
            lambda: self._final(teacher),
            f"Held out: {self.text(self.last.data).describe_held_out()}.",
        )

    def _final(self, teacher: Any | None) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """The models of the table, and their scores on all held-out text."""
        device, rows = self.accelerator.device, self.text(self.last.data).held_out_rows
        if self.is_language_model:
            models = {"teacher": teacher} if teacher is not None else {}
            for name in ("model", "student", "baseline"):
                if name in self.phases.trained:
                    models[name] = self._load_model(self.phases.trained[name])
            return models, {n: self._scores(self.last, m.to(device), rows) for n, m in models.items()}

        before = self._student(teacher)
        objectives = make_objectives(self.last.objectives, before, teacher)
        learned = projections(objectives).to(device)
        scores = {
            "teacher": {},
            BEFORE: self._scores(self.last, before.to(device), rows, objectives, teacher),
        }
        # The student's folder does not hold them.
        load_projections(learned, self.config.output / CHECKPOINTS / "student", self.config.fingerprint())
        after = self._load_model(self.phases.trained["student"])
        scores["student"] = self._scores(self.last, after.to(device), rows, objectives, teacher)
        return {"teacher": teacher, BEFORE: before, "student": after}, scores


def _head_parameters(model: Any) -> list[nn.Parameter]:
    parameters = mlm_head(model).parameters()
    head = next_sentence_head(model)
    if head is not None:
        parameters += [*model.base_model.pooler.parameters(), *head.parameters()]
    return parameters
