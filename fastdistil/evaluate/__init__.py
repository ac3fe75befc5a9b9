"""How good a model is, and what it costs to run."""

from fastdistil.evaluate.cost import (
    Latency,
    bytes_on_disk,
    count_parameters,
    measure_latency,
    measure_peak_memory,
)
from fastdistil.evaluate.masked_lm import MaskedLMScore, evaluate_masked_lm

__all__ = [
    "Latency",
    "MaskedLMScore",
    "bytes_on_disk",
    "count_parameters",
    "evaluate_masked_lm",
    "measure_latency",
    "measure_peak_memory",
]
