"""What a teacher says of a task's examples: asked once, and kept in the cache."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdistil.data.batches import to_device
from fastdistil.data.task_batches import read_task_batch, within_budget
from fastdistil.data.task_encoding import EncodedTask, TeacherAnswers
from fastdistil.models.taps import Wanted, frozen_copy, tap_teacher
from fastdistil.train.cache import cache_file, model_fingerprint, write_aside
from fastdistil.train.logging import RunLog

_MAX_TOKENS = 8192  # of a forward pass, padding counted
_MAX_BYTES = 8 << 30  # on disk: more is not written unasked


def ask_once(
    teacher: Any,
    source: str,
    data: EncodedTask,
    examples: np.ndarray,
    layers: Sequence[int],
    *,
    dtype: torch.dtype | None,
    cache_dir: Path | None,
    log: RunLog,
) -> TeacherAnswers | None:
    """The teacher's logits, and its layers' outputs at the first token; None: they would be too many bytes.

    Args:
        source: folder or hub id of the teacher.
        examples: (M,) int64 in ascending order, those of `data` that it is asked about.
        layers: in ascending order, from 0.
        dtype: autocast of the teacher's passes.
        cache_dir: None: ~/.cache/fastdistil.
    """
    width = data.num_choices * len(layers) * teacher.config.hidden_size if layers else 0
    shape = len(examples), data.task.num_labels + width
    size = 4 * shape[0] * shape[1]
    if size > _MAX_BYTES:
        log.say(f"the teacher's answers would be {size / 2**30:.1f} GiB: it is asked at every batch instead")
        return None
    identity: list[Any] = [model_fingerprint(source), str(dtype), data.sha256, list(layers)]
    if len(examples) < len(data):
        identity.append(hashlib.sha256(examples.astype("<i8").tobytes()).hexdigest())
    file = cache_file("teacher-answers", identity, ".npy", cache_dir)
    if not file.exists():
        log.say(f"asking the teacher about {len(examples):,} examples, once for all epochs")

        def write(partial: Path) -> None:
            # On disk from the first row on: there may be more of them than fit in memory.
            rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a write to a mapped page that the disk has no room for kills
                with partial.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
            _ask(frozen_copy(teacher, dtype), data, examples, layers, dtype, rows)
            rows.flush()

        write_aside(file, write)
    return TeacherAnswers(np.load(file, mmap_mode="r"), tuple(layers), examples)


def _ask(
    teacher: Any,
    data: EncodedTask,
    examples: np.ndarray,
    layers: Sequence[int],
    dtype: torch.dtype | None,
    answers: np.ndarray,
) -> None:
    """Fills `answers`, the longest examples first: what does not fit fails at once."""
    wanted = Wanted(hidden=frozenset(layers), logits=True)
    longest_first = examples[np.argsort(-data.lengths[examples], kind="stable")]
    for rows in within_budget(data, longest_first, _MAX_TOKENS):
        batch = to_device(read_task_batch(data, rows), teacher.device)
        taps = tap_teacher(teacher, batch.inputs, dtype, wanted)
        assert taps.logits is not None
        parts = [taps.logits.reshape(len(rows), -1).float()]
        if layers:
            first = torch.stack([taps.hidden[layer][:, 0].float() for layer in layers], dim=1)
            parts.append(first.reshape(len(rows), -1))
        answers[np.searchsorted(examples, rows)] = torch.cat(parts, dim=1).cpu().numpy()
