"""The heads of pretraining: that of a masked language model, split where distillation needs it, and BERT's
for the next sentence.

A masked-language-model head is `logits = transform(hidden) @ weight.T + bias`. Objectives call the cheap
`transform` on the rows they want and hand `weight` and `bias` to the vocabulary op, which never forms the
whole (N, V) product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.errors import UserError


@dataclass(frozen=True)
class MLMHead:
    """`logits = transform(hidden) @ weight.T + bias`, all three shared with the model they come from."""

    transform: Callable[[Tensor], Tensor]  # (..., D) -> (..., E); E is D except in ELECTRA
    # (V, E), the model's own parameter, tied to its word embeddings in most models; MobileBERT's joins two
    weight: Tensor
    bias: Tensor | None  # (V,)
    transform_parameters: tuple[nn.Parameter, ...]

    def parameters(self) -> list[nn.Parameter]:
        """What belongs to the head alone: transform and bias, without the (tied) vocabulary matrix.

        Of MobileBERT's matrix, whose word embeddings are narrower than its states, the rest is the head's.
        """
        bias = [self.bias] if isinstance(self.bias, nn.Parameter) else []
        return [*self.transform_parameters, *bias]


def mlm_head(model: Any) -> MLMHead:
    """The head of a `transformers` masked language model.

    Families: BERT, RoBERTa, DistilBERT, ELECTRA (generator), ModernBERT and MobileBERT, by
    `model.config.model_type`. Raises `UserError` for another family, naming the ones above.
    """
    family = model.config.model_type
    if family not in _SPLITS:
        raise UserError(
            f"{type(model).__name__} (model type {family!r}) has no masked-language-model head that "
            f"fastdistil can split; supported: {', '.join(sorted(_SPLITS))}"
        )
    parts, transform = _SPLITS[family](model)
    decoder = model.get_output_embeddings()
    weight = decoder.weight
    if family == "mobilebert":
        weight = torch.cat([weight, model.cls.predictions.dense.weight.mT], dim=1)
    parameters = tuple(parameter for part in parts for parameter in part.parameters())
    return MLMHead(transform, weight, decoder.bias, parameters)


def start_at_frequencies(head: MLMHead, token_counts: Tensor) -> None:
    """Sets the bias to the log frequency of each token, on which a few thousand steps would otherwise be
    spent. One is added to each count.

    `token_counts` are of the first tokens of the vocabulary, as a rule of all; the others have not occurred.
    Nothing is done to a head without bias.
    """
    if head.bias is None:
        return
    with torch.no_grad():
        counts = torch.ones_like(head.bias)
        counts[: len(token_counts)] += token_counts.to(counts.device)
        head.bias.copy_((counts / counts.sum()).log())


def next_sentence_head(model: Any) -> nn.Linear | None:
    """The layer that says of the pooled state whether the second segment follows the first (0) or is a
    random one (1), as BERT and MobileBERT have it; None where the model has none."""
    head: nn.Linear | None = getattr(getattr(model, "cls", None), "seq_relationship", None)
    return head


_Split = tuple[list[nn.Module], Callable[[Tensor], Tensor]]


def _bert(model: Any) -> _Split:
    transform = model.cls.predictions.transform
    return [transform], transform


def _roberta(model: Any) -> _Split:
    head = model.lm_head
    parts = [head.dense, head.layer_norm]
    return parts, lambda hidden: head.layer_norm(nn.functional.gelu(head.dense(hidden)))


def _distilbert(model: Any) -> _Split:
    dense, norm, activation = model.vocab_transform, model.vocab_layer_norm, model.activation
    return [dense, norm], lambda hidden: norm(activation(dense(hidden)))


def _electra(model: Any) -> _Split:
    transform = model.generator_predictions
    return [transform], transform


def _modernbert(model: Any) -> _Split:
    return [model.head], model.head


def _mobilebert(model: Any) -> _Split:
    predictions = model.cls.predictions
    return [predictions.transform, predictions.dense], predictions.transform


_SPLITS: dict[str, Callable[[Any], _Split]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "electra": _electra,
    "modernbert": _modernbert,
    "mobilebert": _mobilebert,
}
