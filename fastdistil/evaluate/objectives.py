"""How near a student is to its teacher in the terms it is trained on, on held-out text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdistil.data.batches import evaluation_batches
from fastdistil.data.masking import Masker, Unmasked, mask_batch
from fastdistil.data.token_store import TokenStore
from fastdistil.models.taps import Wanted, tap_teacher
from fastdistil.objectives import Objective


def evaluate_objectives(
    student: Any,
    teacher: Any,
    objectives: Sequence[Objective],
    masker: Masker | Unmasked,
    store: TokenStore,
    rows: np.ndarray,
    *,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Term -> its mean over the sequences `rows` (n,) of `store`, without its weight.

    Each term is a mean over what it compares in all sequences together, as in a training step. Both models
    are in eval mode; the student is put back into the mode it was in.

    Args:
        masker: makes the batches that both models read, from epoch 0 of the sequences.
        dtype: autocast of the forward passes; default the precision of the weights.
    """
    device = student.device
    student_taps = Wanted.union(objective.student_taps for objective in objectives)
    teacher_taps = Wanted.union(objective.teacher_taps for objective in objectives)
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    training = student.training
    student.eval()
    try:
        for tokens in evaluation_batches(store, rows, batch_size):
            tokens = tokens.to(device)
            batch = mask_batch(masker, tokens)
            ours = tap_teacher(student, batch.inputs, dtype, student_taps)
            theirs = tap_teacher(teacher, batch.inputs, dtype, teacher_taps)
            for objective in objectives:
                own = objective.counts(batch)
                with torch.no_grad():
                    terms = objective.loss(ours, theirs, batch, own).sums
                for term, value in terms.items():
                    sums[term] = sums.get(term, value.new_zeros((), dtype=torch.float64)) + value
                    counts[term] = counts.get(term, torch.zeros_like(own[term])) + own[term]
    finally:
        student.train(training)
    return {term: (value / counts[term].clamp(min=1)).item() for term, value in sums.items()}
