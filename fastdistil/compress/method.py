"""What every way of compressing a model looks like to the code that chains, trains and compares them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastdistil.data.batches import Batch
from fastdistil.schema import Section

Kind = Literal["pruning", "quantisation", "low rank", "sharing", "clustering", "runtime"]


@dataclass(frozen=True)
class Calibration:
    """Training examples (never held-out ones) that a method may look at before it decides what goes.

    `loss` is the task's loss of a model on a batch, a mean over its examples, and differentiable.
    """

    batches: Sequence[Batch]  # on the model's device
    loss: Callable[[Any, Batch], Tensor]  # of a model, called in its current mode


@dataclass(frozen=True)
class Method:
    """One way to compress.

    `apply` takes a model in eval mode, which it may change in place, and returns the compressed one, in eval
    mode. Where the compressed model is not what its `transformers` config describes, `apply` has recorded
    that by `replacements.replace`, so that the folder which `save_pretrained` writes is restored by `load`.

    If the pipeline trains the model afterwards (recovery), `finish` then takes out what only training needs
    (masks, fake quantisation). It is called without training, too.
    """

    name: str
    kind: Kind
    description: str  # one line, for `fastdistil compress --help` and the tables
    paper: str | None
    options: type[Section]
    main: str | None  # the option that `name:value` sets
    apply: Callable[[Any, Any, Calibration | None], Any]  # model, options, examples
    finish: Callable[[Any, Any], Any] = lambda model, options: model
    recovers: bool = True  # whether training afterwards is of use, and is done by default
    uses_steps: bool = False  # `options.steps` is set to the optimiser steps of the recovery
    ends: bool = False  # whether no step can follow: what it makes is not trained or compressed further
