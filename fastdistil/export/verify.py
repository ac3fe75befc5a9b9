"""Compare what an exported model answers with what the model that it was made from answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.errors import RunError
from fastdistil.export.example import is_choice
from fastdistil.export.folder import Exported
from fastdistil.export.runtime import load_runtime
from fastdistil.models.taps import accepted_inputs

FLOAT_BOUND = 1e-3  # of the absolute error of an export in float32
INT8_COSINE = 0.5  # of the outputs, below which an int8 model is broken, not merely coarse
_LENGTH = 128
_BATCHES = 8  # of the given examples

_TEXT = (
    "The film is a quiet, patient study of two brothers who have not spoken for years. Nothing in it is "
    "hurried, and its last half hour, which a lesser director would have drowned in tears, is silent. "
    "I have seen it twice; the second time I noticed how often the camera stays on an empty room. Some will "
    "call it slow. What did you expect of a story in which the most important thing is what nobody says?"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Verification:
    """How far the outputs of an exported model are from those of the model that it was made from."""

    texts: int
    max_error: float  # absolute, of what is not padding
    agreement: float | None  # fraction of the rows whose largest entry is the same; None without logits
    cosine: float  # of all outputs as one vector

    def record(self, exported: Exported) -> Exported:
        return replace(exported, max_error=self.max_error, agreement=self.agreement)


def verify(
    folder: Path, model: Any, tokenizer: Any, examples: Sequence[Any] = (), *, bound: float = FLOAT_BOUND
) -> Verification:
    """Run both on texts of several lengths and batch sizes, and on the first of `examples`.

    Args:
        folder: exported.
        model: that it was made from.
        examples: `TaskBatch`es.
        bound: of the absolute error. An int8 model has none; its outputs must point the same way as the
            model's, within `INT8_COSINE`.

    Raises:
        RunError: it is too far off.
    """
    exported = load_runtime(folder, model.config)
    facts, training = exported.exported, model.training
    model.eval()
    try:
        with torch.inference_mode():
            given = [batch.inputs for batch in examples[:_BATCHES]]
            pairs = [_outputs(model, exported, x) for x in (*_texts(model, tokenizer, facts), *given)]
    finally:
        model.train(training)
    result = _compare(pairs)
    if facts.quantized is None and not result.max_error <= bound:
        raise RunError(
            f"the exported model's outputs differ from the model's by {result.max_error:.2g}, more than "
            f"{bound:.2g}; nothing was written"
        )
    if not result.cosine >= INT8_COSINE:
        raise RunError(
            f"the int8 model answers something else than the model: the cosine of their outputs is "
            f"{result.cosine:.2f}; nothing was written"
        )
    return result


def _texts(model: Any, tokenizer: Any, facts: Exported) -> Iterator[dict[str, Tensor]]:
    """One long text; then a batch of a short, a middling and a long one, padded."""
    length = min(_LENGTH, facts.max_length or _LENGTH)
    long = " ".join([_TEXT] * (length // len(_WORDS) + 1))
    texts = ["Slow.", " ".join(_WORDS[:16]), " ".join(_WORDS[16:60]), long]
    batches = [[long], texts[:3], texts]
    if is_choice(model):
        batches = [texts[:2], texts]
    for batch in batches:
        encoded = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"].bool()}
        inputs["token_type_ids"] = encoded.get("token_type_ids", torch.zeros_like(inputs["input_ids"]))
        if is_choice(model):
            inputs["attention_mask"] = inputs["attention_mask"].long()
            inputs = {name: value.unflatten(0, (-1, 2)) for name, value in inputs.items()}
        yield inputs


def _outputs(model: Any, exported: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
    """Outputs of model and exported model as rows (of logits or of hidden states), and whether they are
    logits."""
    on_device = {name: value.to(model.device) for name, value in accepted_inputs(model, inputs).items()}
    theirs, ours = model(**on_device), exported(**inputs)
    names = [name for name in ("start_logits", "end_logits", "logits", "last_hidden_state") if name in ours]
    mask = inputs["attention_mask"].bool()
    return (
        [_rows(theirs[name].float().cpu(), mask) for name in names],
        [_rows(ours[name].float(), mask) for name in names],
        "last_hidden_state" not in names,
    )


def _rows(values: Tensor, mask: Tensor) -> Tensor:
    """(N, C): (B, C) as it is, of (B, L) and (B, L, C) what is not padding."""
    if values.ndim == 2 and values.shape == mask.shape:
        return values.masked_fill(~mask, 0)
    return values if values.ndim == 2 else values[mask]


def _compare(pairs: list[tuple[list[Tensor], list[Tensor], bool]]) -> Verification:
    same = rows = texts = 0.0
    errors: list[Tensor] = []
    dot = ours_squared = theirs_squared = 0.0
    for theirs, ours, _ in pairs:
        texts += len(theirs[0])
        for expected, got in zip(theirs, ours, strict=True):
            errors.append((expected - got).abs().max())
            same += (expected.argmax(-1) == got.argmax(-1)).sum().item()
            rows += len(expected)
            dot += (expected.double() * got.double()).sum().item()
            ours_squared += got.double().square().sum().item()
            theirs_squared += expected.double().square().sum().item()
    cosine = dot / max((ours_squared * theirs_squared) ** 0.5, 1e-30)
    error = torch.stack(errors).max().item()  # NaN if one of them is
    return Verification(int(texts), error, same / rows if pairs[0][2] else None, cosine)
