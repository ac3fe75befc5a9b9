"""How good a model is, and what it costs to run."""

from fastdistil.evaluate.cost import (
    Latency,
    bytes_on_disk,
    count_parameters,
    measure_latency,
    measure_peak_memory,
)
from fastdistil.evaluate.masked_lm import MaskedLMScore, evaluate_masked_lm
from fastdistil.evaluate.objectives import evaluate_objectives
from fastdistil.evaluate.task import chance_score, check_teacher, evaluate_task, mean_score

__all__ = [
    "Latency",
    "MaskedLMScore",
    "bytes_on_disk",
    "chance_score",
    "check_teacher",
    "count_parameters",
    "evaluate_masked_lm",
    "evaluate_objectives",
    "evaluate_task",
    "mean_score",
    "measure_latency",
    "measure_peak_memory",
]
