"""A whole run, from a configuration to the report.

Text alone:

    config -> tokenizer, data -> [new teacher] -> student -> [baseline] -> held-out scores -> table, picture

A task:

    config -> teacher, scored first -> examples -> student, in stages -> [baseline] -> scores, table, picture

    output/
      config.yaml                the resolved configuration
      metrics.jsonl, tensorboard/
      checkpoints/<phase>/checkpoint-<step>/
      teacher/ head/ model/ <stage>/ student/ baseline/    `transformers` folders of what the recipe trains
      results.json, results.md, curves.png
"""

import os
import shutil

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from torch import accelerator as torch_accelerator
from transformers.utils.logging import disable_progress_bar

from fastdistil.errors import RunError, UserError
from fastdistil.train.checkpoint import write_durably
from fastdistil.train.config import RunConfig, first_difference, read_config, uses_vocabulary
from fastdistil.train.logging import RunLog
from fastdistil.train.phases import CHECKPOINTS, autocast_dtype, phase_names
from fastdistil.train.report import RunResult
from fastdistil.train.students import resolved
from fastdistil.train.task_run import TaskRun
from fastdistil.train.text_run import TextRun

CONFIG = "config.yaml"


def run(config: RunConfig, resume: bool = False, *, score: bool = True) -> RunResult:
    """Train as `config` says and write everything to `config.output`.

    With `resume`, go on with the run that is there. Under a launcher (torchrun, accelerate launch) every
    process calls this.

    Without `score` models are trained and saved, and that is all: for a run whose model goes on to be
    changed, and whose teacher was scored before. The result then has no models.

    Raises:
        UserError: the output folder holds a run and `resume` is off, or holds none, or another one, and it
            is on; anything wrong with models, text or task; a teacher that is no better than chance.
        RunError: a full disk, a loss that is not finite.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    disable_progress_bar()
    config = resolved(config)
    dtype = autocast_dtype(config.run.precision)
    everywhere = all(uses_vocabulary([stage]) for stage in config.student_stages)
    # An earlier run of this process may have had another precision, which accelerate would hold against us.
    AcceleratorState._reset_state()
    # Without an accelerator device, accelerate must be told so, or it ignores a launcher's processes.
    accelerator = Accelerator(
        cpu=not torch_accelerator.is_available(),
        mixed_precision="no" if dtype is None else "bf16",
        # A vocabulary head reaches every parameter; layers that lie behind the last tap get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not everywhere)],
    )
    try:
        _claim_output(config, resume, accelerator)
    except OSError as error:
        raise UserError(f"output {config.output}: {error.strerror or error}") from error
    try:
        try:
            with RunLog(config.output, main=accelerator.is_main_process) as log:
                kind = TextRun if config.task is None else TaskRun
                return kind(config, accelerator, log, score=score).whole()
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
    stages = phase_names(config.student_stages)
    trained = (
        config.output / name for name in (CHECKPOINTS, "teacher", "head", "model", "baseline", *stages)
    )
    if not any(path.exists() for path in trained):
        shutil.rmtree(config.output, ignore_errors=True)
