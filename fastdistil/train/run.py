"""A whole run, from a configuration to the report.

    config -> tokenizer, data -> [new teacher] -> student -> [baseline] -> held-out scores -> table, picture

Each trained model is a phase with its own checkpoints. A phase is finished when its model folder stands in
the output folder, under the phase's name; a resumed run skips it.

    output/
      config.yaml                the resolved configuration
      metrics.jsonl, tensorboard/
      checkpoints/<phase>/checkpoint-<step>/
      teacher/ head/ model/ student/ baseline/    `transformers` folders, those that the recipe trains
      results.json, results.md, curves.png
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from fastdistil.errors import RunError, UserError
from fastdistil.evaluate import count_parameters, evaluate_masked_lm, evaluate_objectives, measure_latency
from fastdistil.models.heads import mlm_head
from fastdistil.models.load import load_encoder, load_encoder_with_new_head, load_masked_lm
from fastdistil.models.student import make_student
from fastdistil.models.taps import fast_dtype, frozen_copy
from fastdistil.objectives import Objective, projections
from fastdistil.train.build import make_objectives, try_objectives
from fastdistil.train.checkpoint import load_projections, publish, write_durably
from fastdistil.train.config import (
    LoopConfig,
    NewTeacherConfig,
    RunConfig,
    ScheduleConfig,
    first_difference,
    read_config,
)
from fastdistil.train.logging import METRICS, RunLog, read_metrics
from fastdistil.train.loop import Phase, train
from fastdistil.train.objective_config import ObjectiveConfig, VocabularyConfig, describe
from fastdistil.train.prepare import check_length, prepare_data, prepare_tokenizer
from fastdistil.train.report import (
    BEFORE,
    ModelResult,
    console_table,
    draw_curves,
    model_card,
    shown,
    verdict,
    write_results,
)

CONFIG = "config.yaml"
_PHASES = ("teacher", "head", "model", "student", "baseline")


@dataclass(frozen=True)
class RunResult:
    """Where the run wrote, and its table: one row for each of teacher, student, baseline or model.

    Without a masked-language-model head: teacher, student before training, student.
    """

    output: Path
    models: list[ModelResult]


def run(config: RunConfig, resume: bool = False) -> RunResult:
    """Train as `config` says and write everything to `config.output`.

    With `resume`, go on with the run that is there. Under a launcher (torchrun, accelerate launch) every
    process calls this.

    Raises:
        UserError: the output folder holds a run and `resume` is off, or holds none, or another one, and it
            is on; anything wrong with models or text.
        RunError: a full disk, a loss that is not finite.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    disable_progress_bar()
    dtype = _autocast_dtype(config.run.precision)
    # Without an accelerator device, accelerate must be told so, or it ignores a launcher's processes.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        # A head reaches every parameter; layers that lie behind the last tap get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not config.uses_vocabulary)],
    )
    try:
        _claim_output(config, resume, accelerator)
        try:
            with RunLog(config.output, main=accelerator.is_main_process) as log:
                return _Run(config, accelerator, dtype, log).whole()
        except UserError:
            if accelerator.is_main_process and not resume:
                _release_output(config)
            raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        file = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        raise RunError(
            f"{reason}{file}; what was saved in {config.output} is kept: --resume goes on"
        ) from error


class _Run:
    def __init__(
        self, config: RunConfig, accelerator: Accelerator, dtype: torch.dtype | None, log: RunLog
    ) -> None:
        self.config, self.accelerator, self.dtype, self.log = config, accelerator, dtype, log
        self.output = config.output
        self.load = load_masked_lm if config.uses_vocabulary else load_encoder
        self.trained: dict[str, Path] = {}

    def whole(self) -> RunResult:
        config = self.config
        source = config.teacher or config.student.from_model
        tokenizer = None
        if config.teacher is not None:
            teacher, tokenizer = self.load(config.teacher)
            self._try(teacher)
        elif config.student.from_model is not None:
            # A first look, for the tokenizer; the head's bias needs the token counts of the text.
            model, tokenizer = load_encoder_with_new_head(config.student.from_model)
        tokenizer = prepare_tokenizer(config, tokenizer, self.accelerator)
        if source is not None:
            check_length(teacher if config.teacher else model, config.data.max_length, source)
        self.data = prepare_data(config, tokenizer, self.accelerator, self.log)
        self.log.say(describe(config.objectives))

        if not config.uses_teacher:
            self._adapt()
            return self._report(None)
        if config.new_teacher is not None:
            folder = self._new_teacher(config.new_teacher)
            teacher, _ = self.load(folder)
            self._try(teacher)
        self._distil(teacher)
        return self._report(teacher)

    def _adapt(self) -> None:
        """Recipe mlm: optionally the new head alone, then all weights."""
        loop = self.config.run

        def fresh() -> Any:
            counts = torch.from_numpy(self.data.token_counts)
            return load_encoder_with_new_head(str(self.config.student.from_model), token_counts=counts)[0]

        build: Callable[[], Any] = fresh
        if loop.head_warmup_steps:
            head = self._phase(
                "head",
                fresh,
                steps=loop.head_warmup_steps,
                lr=loop.head_warmup_lr,
                schedule=ScheduleConfig(name="constant", warmup=0.1),
                head_only=True,
                seed=self.config.seed + 1,
            )

            def warmed() -> Any:
                return load_masked_lm(head)[0]

            build = warmed
        self._phase("model", build)

    def _new_teacher(self, sizes: NewTeacherConfig) -> Path:
        def fresh() -> Any:
            from transformers import ModernBertConfig, ModernBertForMaskedLM

            tokenizer = self.data.tokenizer
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
                    max_position_embeddings=max(self.config.data.max_length, 128),
                    pad_token_id=tokenizer.pad_token_id,
                    cls_token_id=tokenizer.cls_token_id,
                    sep_token_id=tokenizer.sep_token_id,
                    bos_token_id=tokenizer.cls_token_id,
                    eos_token_id=tokenizer.sep_token_id,
                )
            )

        # Its curve is not what the run is about: ten points will do.
        seldom = {"eval_every": max(self.config.run.eval_every, sizes.steps // 10)}
        return self._phase(
            "teacher",
            fresh,
            steps=sizes.steps,
            lr=sizes.lr,
            loop=self.config.run.model_copy(update=seldom),
            seed=self.config.seed + 1,
        )

    def _untrained(self, teacher: Any) -> tuple[Any, list[Objective]]:
        """The student at its first weights and its objectives, the same ones at each call."""
        torch.manual_seed(self.config.seed)
        student = make_student(teacher, **self.config.student.model_dump(exclude={"from_model"}))
        return student, make_objectives(self.config.objectives, student, teacher)

    def _try(self, teacher: Any) -> None:
        student, objectives = self._untrained(teacher)
        try_objectives(objectives, student, teacher)

    def _distil(self, teacher: Any) -> None:
        def fresh() -> Any:
            return make_student(teacher, **self.config.student.model_dump(exclude={"from_model"}))

        teacher.to(self.accelerator.device).eval().requires_grad_(False)
        self._phase("student", fresh, teacher=teacher, objectives=self.config.objectives)
        if self.config.baseline:
            self._phase("baseline", fresh)

    def _phase(
        self,
        name: str,
        build: Callable[[], Any],
        *,
        teacher: Any | None = None,
        objectives: list[ObjectiveConfig] | None = None,
        steps: int | None = None,
        lr: float | None = None,
        schedule: ScheduleConfig | None = None,
        loop: LoopConfig | None = None,
        head_only: bool = False,
        seed: int | None = None,
    ) -> Path:
        """The folder of one trained model; without `objectives` it is a masked language model."""
        config, accelerator, data = self.config, self.accelerator, self.data
        folder = self.output / name
        self.trained[name] = folder
        if folder.exists():
            self.log.say(f"{name}: finished before")
            return folder
        # Student and baseline draw the same weights, data order, masks and dropout from the same seed.
        seed = config.seed if seed is None else seed
        torch.manual_seed(config.seed)
        model = build()
        built = make_objectives(objectives or [VocabularyConfig(kd_weight=0, ce_weight=1)], model, teacher)
        compared = built if objectives and not config.uses_vocabulary else None
        some = data.held_out_rows[: config.run.eval_sequences]

        def evaluate(model: Any) -> dict[str, float]:
            scores = self._scores(model, some, compared, teacher, self.dtype)
            return {f"held_out_{measure}": scores[measure] for measure in shown(scores)}

        teacher_dtype = _autocast_dtype(config.run.teacher_precision)
        phase = Phase(
            name=name,
            model=model,
            teacher=None if teacher is None else frozen_copy(teacher, teacher_dtype),
            teacher_dtype=teacher_dtype,
            objectives=built,
            batches=data.batches(config.run, seed, accelerator),
            masker=data.masker(config, seed, accelerator.device),
            steps=steps or data.steps(config.run),
            seed=seed,
            optimizer=config.optimizer.model_copy(update={"lr": lr} if lr else {}),
            schedule=schedule or config.schedule,
            loop=loop or config.run,
            checkpoints=self.output / "checkpoints" / name,
            fingerprint=config.fingerprint(),
            evaluate=evaluate,
            parameters=mlm_head(model).parameters() if head_only else None,
        )
        train(phase, accelerator, self.log)
        if accelerator.is_main_process:
            partial = self.output / f".writing-{name}"
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(str(partial))
            data.tokenizer.save_pretrained(str(partial))
            for file in partial.iterdir():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            publish(partial, folder)
        accelerator.wait_for_everyone()
        accelerator.free_memory()
        return folder

    def _scores(
        self,
        model: Any,
        rows: np.ndarray,
        objectives: Sequence[Objective] | None,
        teacher: Any | None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, float]:
        """On held-out text: the terms of `objectives`, or as a masked language model."""
        data = self.data
        if objectives is not None:
            masker = data.masker(self.config, seed=0, device=model.device)  # the same tokens for every model
            return evaluate_objectives(model, teacher, objectives, masker, data.held_out, rows, dtype=dtype)
        score = evaluate_masked_lm(model, data.facts, data.held_out, rows, dtype=dtype)
        return {"loss": score.loss, "accuracy": score.accuracy, "perplexity": score.perplexity}

    def _report(self, teacher: Any | None) -> RunResult:
        """Evaluate every model on all held-out text; write table, picture and model cards (main process)."""
        results: list[ModelResult] = []
        if self.accelerator.is_main_process:
            self.log.say("evaluating on all held-out text, and timing on the CPU")
            results = self._measure(*self._final(teacher))
            for result in results:
                if result.name in self.trained:
                    card = model_card(self.config, result)
                    write_durably(self.output / result.name / "README.md", card.encode())
            draw_curves(self.output / "curves.png", read_metrics(self.output / METRICS), results)
            write_results(self.output, self.config, results, self.data.describe_held_out())
            self.log.print(console_table(results))
            for line in filter(None, (verdict(results), f"written to {self.output}")):
                self.log.say(line)
        self.accelerator.wait_for_everyone()
        return RunResult(self.output, results)

    def _final(self, teacher: Any | None) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """The models of the table, and their scores on all held-out text."""
        device, rows = self.accelerator.device, self.data.held_out_rows
        if self.config.uses_vocabulary:
            models = {"teacher": teacher} if teacher is not None else {}
            for name, folder in self.trained.items():
                if name not in ("teacher", "head"):  # the head's phase only prepares the model's
                    models[name] = load_masked_lm(folder)[0]
            return models, {n: self._scores(m.to(device), rows, None, None) for n, m in models.items()}

        before, objectives = self._untrained(teacher)
        learned = projections(objectives).to(device)
        scores = {"teacher": {}, BEFORE: self._scores(before.to(device), rows, objectives, teacher)}
        # The student's folder does not hold them.
        load_projections(learned, self.output / "checkpoints" / "student", self.config.fingerprint())
        after, _ = load_encoder(self.trained["student"])
        scores["student"] = self._scores(after.to(device), rows, objectives, teacher)
        return {"teacher": teacher, BEFORE: before, "student": after}, scores

    def _measure(self, models: dict[str, Any], scores: dict[str, dict[str, float]]) -> list[ModelResult]:
        records = read_metrics(self.output / METRICS)
        for model in models.values():
            model.to("cpu")
        latencies = measure_latency(models, batch_sizes=(1,), length=self.config.data.max_length)
        results = []
        for name, model in models.items():
            own = [r for r in records if r["phase"] == name and "tokens" in r]
            results.append(
                ModelResult(
                    name=name,
                    path=self._path(name),
                    layers=model.config.num_hidden_layers,
                    hidden_size=model.config.hidden_size,
                    parameters=count_parameters(model),
                    scores=scores[name],
                    latency_ms=latencies[name][0].p50_ms,
                    latency_p95_ms=latencies[name][0].p95_ms,
                    threads=latencies[name][0].threads,
                    train_steps=own[-1]["step"] if own else None,
                    train_tokens=own[-1]["tokens"] if own else None,
                    train_seconds=own[-1]["seconds"] if own else None,
                )
            )
        return results

    def _path(self, name: str) -> str | None:
        if name == "teacher" and name not in self.trained:
            return self.config.teacher
        return str(self.trained[name]) if name in self.trained else None


def _autocast_dtype(precision: str) -> torch.dtype | None:
    match precision:
        case "bf16":
            return torch.bfloat16
        case "auto":
            return fast_dtype(torch.accelerator.current_accelerator() or torch.device("cpu"))
        case _:
            return None


def _claim_output(config: RunConfig, resume: bool, accelerator: Accelerator) -> None:
    """Check that the folder is free (or holds this run, to be resumed) and leave the configuration there."""
    output, file = config.output, config.output / CONFIG
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file, not a folder")
    if resume:
        if not file.exists():
            raise UserError(
                f"nothing to resume: {output} holds no run; leave out --resume to start one there"
            )
        if difference := first_difference(read_config(file), config):
            raise UserError(
                f"cannot resume {output} with another configuration: {difference}; "
                "give the same recipe and keys, or choose another --output"
            )
    elif file.exists():
        other = read_config(file)
        which = (
            "this run" if first_difference(other, config) is None else f"another run (recipe {other.recipe})"
        )
        raise UserError(
            f"output {output} already holds {which}: add --resume to go on with it or choose another --output"
        )
    elif output.exists() and any(output.iterdir()):
        raise UserError(f"output {output} is not empty and holds no run: choose another --output")
    accelerator.wait_for_everyone()  # no process may see what the main one writes next
    if accelerator.is_main_process and not resume:
        output.mkdir(parents=True, exist_ok=True)
        partial = output / f".writing-{CONFIG}"
        write_durably(partial, config.to_yaml().encode())
        os.rename(partial, file)
    accelerator.wait_for_everyone()


def _release_output(config: RunConfig) -> None:
    """Take back a claim where a mistake was found before anything was trained: the next try may differ."""
    trained = (config.output / name for name in ("checkpoints", *_PHASES))
    if not any(path.exists() for path in trained):
        shutil.rmtree(config.output, ignore_errors=True)
