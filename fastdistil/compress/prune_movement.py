"""Movement pruning: the weights that training moves towards zero go (Sanh et al. 2020).

    W' = W ⊙ Top_v(S),   ∂L/∂S = ∂L/∂W' ⊙ W      (section 4, the straight-through estimator)

so that a score rises where a step makes its weight larger in magnitude. Top_v keeps the share v of each
matrix.

The paper's scores start from zero (`start: zero`): the first weights to go are those that the first steps
happened to move, and it takes the paper's many epochs to mend that. A model that has learnt its task already
is moved by little but noise. So by default they start from |W|, as in HYDRA (Sehwag et al. 2020, "scaled
initialization") up to its factor: at first that is magnitude pruning, and training corrects it.

The paper gives the scores a learning rate of their own (1e-2, weights 3e-5). Top_v only compares scores of
one matrix with each other, so from zero a factor on all of them changes no mask, and from |W| they are of the
size of the weights: they are trained with the weights' learning rate, and without weight decay.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from fastdistil.compress.encoded import code_of, coded_weights, weights_to_compress
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.weight_masks import add_mask, bake, count_zeros
from fastdistil.errors import UserError
from fastdistil.schema import Section

NAME = "prune-movement"


class PruneMovementOptions(Section):
    sparsity: float = Field(default=0.5, ge=0, lt=1, description="share of each matrix that becomes zero")
    embeddings: bool = Field(default=False, description="prune the embeddings, too")
    steps: int | None = Field(
        default=None, ge=1, description="optimiser steps of the recovery, in which the scores are learned"
    )
    start: Literal["zero", "magnitude"] = Field(
        default="magnitude",
        description="of the scores: each weight's magnitude, or the paper's zero, which needs many epochs",
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="share of the steps at the start without a mask"
    )
    cooldown: float = Field(
        default=0.3, ge=0, lt=1, description="share of the steps at the end with the full sparsity"
    )

    @model_validator(mode="after")
    def _shares(self) -> "PruneMovementOptions":
        if self.warmup + self.cooldown >= 1:
            raise ValueError(f"warmup + cooldown must be < 1, got {self.warmup + self.cooldown:g}")
        return self


def prune_movement(model: Any, options: PruneMovementOptions, calibration: Calibration | None) -> Any:
    """The model with a mask and scores on each linear layer of the encoder, the pooler included.

    `finish` stores what the last scores leave, sparse.

    Raises:
        UserError: no `steps`; in `finish` scores from zero that no training has changed; a weight is pruned,
            clustered or quantised already, there is none, or `embeddings` of a language model, whose output
            matrix they are.
    """
    if options.steps is None:
        raise UserError(f"{NAME} learns in the recovery which weights to keep: give it recovery steps")
    schedule = {"steps": options.steps, "warmup": options.warmup, "cooldown": options.cooldown}
    for path, module in weights_to_compress(model, NAME, embeddings=options.embeddings):
        zeros = count_zeros(module.weight.numel(), options.sparsity)
        add_mask(model, path, {"rule": "movement", "zeros": zeros, "start": options.start, **schedule})
    return model


def _finish(model: Any, options: PruneMovementOptions) -> Any:
    masks = [code_of(model.get_submodule(path)) for path, _ in coded_weights(model, "masked")]
    if not all(mask.scores.any() for mask in masks):
        raise UserError(
            f"{NAME}: the model was not trained, so no weight has a score: give it recovery steps"
        )
    return bake(model)


METHODS = (
    Method(
        name=NAME,
        kind="pruning",
        description="zero the weights that training moves towards zero; stored sparse, no faster by itself",
        paper="Sanh et al. 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning",
        options=PruneMovementOptions,
        main="sparsity",
        apply=prune_movement,
        finish=_finish,
        uses_steps=True,
    ),
)
