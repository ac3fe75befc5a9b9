"""The part of a run's configuration that says what the student is trained to match: one section an objective.

Each section's `formula` is its share of the loss in words, for the log.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from fastdistil.models.layers import MAPPINGS
from fastdistil.schema import Section

_TOKENS = "all tokens but padding"


def _layer_mapping(value: Any) -> Any:
    if value in MAPPINGS:
        return value
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if is_list and all(isinstance(pair, Sequence) and [*map(type, pair)] == [int, int] for pair in value):
        return [list(pair) for pair in value]
    raise ValueError(f"must be one of {', '.join(MAPPINGS)} or a list of [student layer, teacher layer]")


LayerMapping = Annotated[str | list[list[int]], PlainValidator(_layer_mapping)]


class VocabularyConfig(Section):
    """`kd_weight * T^2 * D(teacher || student) + ce_weight * CE(student, masked tokens)`."""

    name: Literal["vocabulary"] = "vocabulary"
    kd_weight: float = Field(default=1.0, ge=0, description="weight of the distillation term; 0: no teacher")
    ce_weight: float = Field(default=0.0, ge=0, description="weight of the masked-language-model term")
    temperature: float = Field(
        default=2.0, gt=0, description="T, of both distributions of the distillation term"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl", description="KL(teacher || student), KL(student || teacher) or Jensen-Shannon"
    )
    jsd_beta: float = Field(
        default=0.5, gt=0, lt=1, description="share of the teacher in the mixture of 'jsd'"
    )
    positions: Literal["masked", "all"] = Field(
        default="masked",
        description="where the distillation term acts: the masked tokens, or all but padding",
    )
    chunk_size: int | None = Field(
        default=None, ge=1, description="rows of logits at once; null: by cache size"
    )

    @property
    def needs_masked_tokens(self) -> bool:
        return self.ce_weight > 0 or self.positions == "masked"

    def formula(self) -> str:
        parts = []
        if self.kd_weight:
            where = "the masked tokens" if self.positions == "masked" else _TOKENS
            kd = _divergence(self.divergence, self.jsd_beta, self.temperature)
            parts.append(f"{self.kd_weight:g} · {kd} [mean over {where}]")
        if self.ce_weight:
            parts.append(f"{self.ce_weight:g} · CE at T=1 [mean over the masked tokens]")
        return " + ".join(parts)


class CosineConfig(Section):
    """`weight * (1 - cos(student, teacher))` of the last hidden states, over all tokens but padding."""

    name: Literal["cosine"] = "cosine"
    weight: float = Field(default=1.0, ge=0, description="of the objective")

    def formula(self) -> str:
        return f"{self.weight:g} · (1 − cos) of the last hidden states [mean over {_TOKENS}]"


class PredictionConfig(Section):
    """`kd_weight * T^2 * D(teacher || student) + task_weight * (loss on the labels)` of a task's logits."""

    name: Literal["prediction"] = "prediction"
    kd_weight: float = Field(default=1.0, ge=0, description="weight of the distillation term; 0: no teacher")
    task_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the loss on the labels: cross-entropy, or MSE of a regression",
    )
    temperature: float = Field(
        default=2.0, gt=0, description="T, of both distributions of the distillation term with distance 'kl'"
    )
    distance: Literal["kl", "mse"] = Field(
        default="kl",
        description="divergence of the predicted distributions, or MSE of the logits; a regression has MSE",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl", description="which one, with distance 'kl'"
    )
    jsd_beta: float = Field(
        default=0.5, gt=0, lt=1, description="share of the teacher in the mixture of 'jsd'"
    )

    def formula(self, task_kind: str | None = None) -> str:
        """`task_kind` as of `Task.kind`."""
        parts = []
        rows = "examples and both ends" if task_kind == "span" else "examples"
        if self.kd_weight:
            if task_kind == "regression":
                kd = f"MSE of the teacher's scores [mean over {rows}]"
            elif self.distance == "mse":
                classes = "the tokens" if task_kind == "span" else "the classes"
                kd = f"MSE of the logits [mean over {rows} and {classes}]"
            else:
                kd = f"{_divergence(self.divergence, self.jsd_beta, self.temperature)} [mean over {rows}]"
            parts.append(f"{self.kd_weight:g} · {kd}")
        if self.task_weight:
            task = "MSE" if task_kind == "regression" else "CE at T=1"
            parts.append(f"{self.task_weight:g} · {task} of the labels [mean over labelled {rows}]")
        return " + ".join(parts)


class NextSentenceConfig(Section):
    """`weight` times the cross-entropy of whether the second segment follows the first."""

    name: Literal["next_sentence"] = "next_sentence"
    weight: float = Field(default=1.0, gt=0, description="of the objective")

    def formula(self) -> str:
        return f"{self.weight:g} · CE of next-sentence prediction [mean over sequences]"


class RelationsConfig(Section):
    """KL of the Q-Q, K-K and V-V relations of one layer of each model; a weight of 0 leaves one out."""

    name: Literal["relations"] = "relations"
    query_weight: float = Field(default=1.0, ge=0, description="of the Q-Q relations")
    key_weight: float = Field(default=1.0, ge=0, description="of the K-K relations")
    value_weight: float = Field(default=1.0, ge=0, description="of the V-V relations")
    num_heads: int = Field(default=48, ge=1, description="relation heads; must divide both models' widths")
    teacher_layer: int | None = Field(default=None, description="0-based; null: the last")
    student_layer: int | None = Field(default=None, description="0-based; null: the last")

    def formula(self) -> str:
        weights = {"Q-Q": self.query_weight, "K-K": self.key_weight, "V-V": self.value_weight}
        kinds = " + ".join(
            f"{weight:g} · KL(teacher‖student) of {name}" for name, weight in weights.items() if weight
        )

        def layer(number: int | None) -> str:
            return "the last layer" if number is None else f"layer {number}"

        where = f"{layer(self.teacher_layer)} of the teacher and {layer(self.student_layer)} of the student"
        return f"{kinds} relations of {where} [mean over {self.num_heads} relation heads and {_TOKENS}]"


class AttentionTransferConfig(Section):
    """`weight` times the sum over layer pairs of the distance of the attention scores or distributions."""

    name: Literal["attention_transfer"] = "attention_transfer"
    distance: Literal["mse", "kl"] = Field(
        default="mse", description="MSE of the raw scores, or KL(teacher || student) of the distributions"
    )
    weight: float = Field(default=1.0, gt=0, description="of the objective")
    layers: LayerMapping = Field(
        default="uniform", description="uniform, skip, last, first, or pairs of [student, teacher] layers"
    )

    def formula(self) -> str:
        if self.distance == "mse":
            what, over = "MSE of raw attention scores", "heads and pairs of tokens"
        else:
            what, over = "KL(teacher‖student) of attention", f"heads and {_TOKENS}"
        return f"{self.weight:g} · {what} [mean over {over}, sum over layers: {_mapping(self.layers)}]"


class HiddenConfig(Section):
    """`weight` times the sum or the mean over layer pairs of the mean squared error of their outputs."""

    name: Literal["hidden"] = "hidden"
    weight: float = Field(default=1.0, gt=0, description="of the objective")
    layers: LayerMapping = Field(
        default="uniform", description="uniform, skip, last, first, or pairs of [student, teacher] layers"
    )
    projection: bool | None = Field(
        default=None,
        description="learn one linear map from the student's width to the teacher's; null: where they differ",
    )
    normalize: bool = Field(default=False, description="divide both states by their L2 norm")
    tokens: Literal["all", "first"] = Field(
        default="all", description="all but padding, or the first of each sequence alone ([CLS])"
    )
    layer_reduction: Literal["sum", "mean"] = Field(default="sum", description="over the layer pairs")

    def formula(self) -> str:
        kind = "normalised hidden states" if self.normalize else "hidden states"
        tokens = "the first tokens" if self.tokens == "first" else _TOKENS
        return (
            f"{self.weight:g} · MSE of {kind} [mean over {tokens} and the width, "
            f"{self.layer_reduction} over layers: {_mapping(self.layers)}]"
        )


class FeatureMapsConfig(Section):
    """Weighted distances of the normalised outputs of layer pairs and of their means and variances."""

    name: Literal["feature_maps"] = "feature_maps"
    feature_weight: float = Field(default=100.0, ge=0, description="of the MSE of the normalised outputs")
    mean_weight: float = Field(default=5000.0, ge=0, description="of the squared difference of the means")
    variance_weight: float = Field(default=5.0, ge=0, description="of the difference of the variances")
    layers: LayerMapping = Field(
        default="uniform", description="uniform, skip, last, first, or pairs of [student, teacher] layers"
    )

    def formula(self) -> str:
        weights = {
            f"MSE of normalised feature maps [mean over {_TOKENS} and the width]": self.feature_weight,
            f"(difference of their means)² [mean over {_TOKENS}]": self.mean_weight,
            f"|difference of their variances| [mean over {_TOKENS}]": self.variance_weight,
        }
        parts = " + ".join(f"{weight:g} · {what}" for what, weight in weights.items() if weight)
        return f"{parts} [sum over layers: {_mapping(self.layers)}]"


class EmbeddingsConfig(Section):
    """`weight` times the mean squared error of what enters the first layer."""

    name: Literal["embeddings"] = "embeddings"
    weight: float = Field(default=1.0, gt=0, description="of the objective")
    projection: bool | None = Field(
        default=None,
        description="learn a linear map from the student's width to the teacher's; null: where they differ",
    )
    share_projection: bool = Field(
        default=False, description="use the projection of objective `hidden` instead of one of its own"
    )

    def formula(self) -> str:
        return f"{self.weight:g} · MSE of embeddings [mean over {_TOKENS} and the width]"


ObjectiveConfig = Annotated[
    VocabularyConfig
    | CosineConfig
    | RelationsConfig
    | AttentionTransferConfig
    | HiddenConfig
    | EmbeddingsConfig
    | PredictionConfig
    | FeatureMapsConfig
    | NextSentenceConfig,
    Field(discriminator="name"),
]
OBJECTIVES: dict[str, type[Section]] = {
    "vocabulary": VocabularyConfig,
    "cosine": CosineConfig,
    "relations": RelationsConfig,
    "attention_transfer": AttentionTransferConfig,
    "hidden": HiddenConfig,
    "embeddings": EmbeddingsConfig,
    "prediction": PredictionConfig,
    "feature_maps": FeatureMapsConfig,
    "next_sentence": NextSentenceConfig,
}


def describe(objectives: Sequence[ObjectiveConfig], task_kind: str | None = None) -> str:
    """The loss as it is computed, for the log: weights, T^2, and what each mean is over.

    `task_kind` as of `Task.kind`, of objectives on a task.
    """
    total = " + ".join(
        objective.formula(task_kind) if isinstance(objective, PredictionConfig) else objective.formula()
        for objective in objectives
    )
    return f"loss = {total}; each mean is over the whole batch of an optimiser step"


def _divergence(divergence: str, jsd_beta: float, temperature: float) -> str:
    name = {
        "forward_kl": "KL(teacher‖student)",
        "reverse_kl": "KL(student‖teacher)",
        "jsd": f"JSD(β={jsd_beta:g})",
    }[divergence]
    return f"T²·{name} at T={temperature:g}"


def _mapping(layers: str | list[list[int]]) -> str:
    if isinstance(layers, str):
        return layers
    return ", ".join(f"{student}←{teacher}" for student, teacher in layers)
