"""The sections of a run's configuration, but for the objectives'; every key is documented on its field."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from fastdistil.schema import Section
from fastdistil.train.objective_config import ObjectiveConfig


class BiLSTMConfig(Section):
    """Sizes of a student of architecture bilstm (Tang et al. 2019, section 3.1)."""

    hidden_size: int = Field(default=150, ge=1, description="LSTM units in each direction")
    fc_size: int = Field(default=200, ge=1, description="width of the fully connected layer")


class MobileBertConfig(Section):
    """Sizes of a student of architecture mobilebert (Sun et al. 2020, table 1); its blocks are joined at the
    teacher's width."""

    bottleneck_size: int = Field(default=128, ge=1, description="width inside a block")
    num_feedforward_networks: int = Field(default=4, ge=1, description="stacked in a block")
    embedding_size: int = Field(default=128, ge=1, description="of a word; trigrams of them are projected")


def _copied_layers(value: Any) -> Any:
    if value in (None, "first", "spread"):
        return value
    if isinstance(value, list | tuple) and all(type(layer) is int for layer in value):
        return list(value)
    raise ValueError("must be first, spread or a list of layers")


CopiedLayers = Annotated[list[int] | Literal["first", "spread"] | None, PlainValidator(_copied_layers)]


class StudentConfig(Section):
    """The model that is trained. Sizes left at null are the teacher's."""

    from_model: str | None = Field(
        default=None,
        description="folder or hub id whose weights the student starts from; null: the teacher. It is taken "
        "as it is, or cut where num_layers or teacher_layers is given",
    )
    architecture: Literal["same", "distilbert", "bilstm", "mobilebert"] | None = Field(
        default=None,
        description="same: the family of what it starts from; null: distilbert for a BERT teacher on text, "
        "else same",
    )
    num_layers: int | None = Field(
        default=None, ge=1, description="transformer layers; null: half of the teacher's"
    )
    teacher_layers: CopiedLayers = Field(
        default=None,
        description="0-based layers of the teacher (or of from_model) that the student's layers start from, "
        "or which num_layers of them: the first, or spread evenly; null: spread, of a from_model all",
    )
    hidden_size: int | None = Field(default=None, ge=1, description="width of the hidden states")
    num_attention_heads: int | None = Field(default=None, ge=1, description="attention heads a layer")
    intermediate_size: int | None = Field(default=None, ge=1, description="width of the feed-forward layer")
    bilstm: BiLSTMConfig = BiLSTMConfig()
    mobilebert: MobileBertConfig = MobileBertConfig()
    init: Literal["teacher", "random"] = Field(
        default="teacher", description="where the first weights come from"
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="probability, hidden states and attention; null: as in the source's config",
    )


class NewTeacherConfig(Section):
    """A ModernBERT teacher that the run trains itself, as a masked language model, before it distils.

    Its rotary positions learn from a million tokens what BERT's position embeddings need many millions for.
    """

    num_layers: int = Field(default=6, ge=1, description="transformer layers")
    hidden_size: int = Field(default=256, ge=1, description="width of the hidden states")
    num_attention_heads: int = Field(default=4, ge=1, description="attention heads a layer")
    intermediate_size: int = Field(default=1024, ge=1, description="width of the feed-forward layer")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="probability, hidden and attention")
    steps: int = Field(description="optimiser steps", ge=1)
    lr: float = Field(default=5e-4, gt=0, description="peak learning rate")


class DataConfig(Section):
    corpus: str | None = Field(
        default=None,
        description="text file, parquet, json, csv or tsv file, folder, glob, a `datasets` name, a prepared "
        "token store, or 'machine' (the English documentation that Python's installation holds)",
    )
    text_column: str = Field(default="text", description="of parquet, json, csv, tsv and `datasets` rows")
    sentence_pairs: bool = Field(
        default=False, description="pairs of segments for next-sentence prediction, instead of packed text"
    )
    document_column: str | None = Field(
        default=None,
        description="with sentence_pairs: column of such files whose equal consecutive values make one "
        "document of several rows; null: each row is one",
    )
    short_probability: float = Field(
        default=0.1, ge=0, le=1, description="with sentence_pairs: share of pairs of a random shorter length"
    )
    split: str = Field(default="train", description="split of a `datasets` name")
    streaming: bool = Field(
        default=False, description="read a `datasets` name as a stream instead of downloading it"
    )
    validation: str | None = Field(default=None, description="held-out corpus; null: a share of `corpus`")
    validation_split: str = Field(
        default="validation", description="split of `validation`, where it is a folder or a `datasets` name"
    )
    max_validation_sequences: int | None = Field(
        default=None, ge=1, description="stop reading `validation` here; null: read all"
    )
    validation_fraction: float = Field(
        default=0.01, gt=0, lt=1, description="share of the documents held out"
    )
    max_length: int = Field(default=128, ge=8, description="tokens a sequence, with [CLS] and [SEP]")
    max_sequences: int | None = Field(
        default=None, ge=1, description="stop reading the corpus here; null: read all"
    )
    tokenizer: str | None = Field(default=None, description="folder or hub id; null: the teacher's")
    vocab_size: int | None = Field(
        default=None,
        ge=64,
        description="train a WordPiece vocabulary of this many entries on the corpus instead",
    )
    cache_dir: Path | None = Field(
        default=None, description="where token stores are kept; null: ~/.cache/fastdistil"
    )


class AugmentConfig(Section):
    """More training examples of a task, made before training and kept in `data.cache_dir`."""

    method: Literal["tinybert", "bilstm"] = Field(
        description="tinybert: words replaced by what a masked language model or word vectors propose (Jiao "
        "et al. 2020, algorithm 1); bilstm: masking, POS-guided replacement, n-grams (Tang et al. 2019, 3.3)"
    )
    copies: int = Field(default=20, ge=1, description="made of each example; duplicates are dropped")
    probability: float = Field(
        default=0.4, gt=0, le=1, description="tinybert: share of the words that are replaced"
    )
    num_candidates: int = Field(default=15, ge=1, description="tinybert: candidates for a word")
    masked_lm: str | None = Field(
        default=None,
        description="tinybert: folder or hub id of the masked language model that proposes candidates for "
        "words of one piece; null: word vectors for all words",
    )
    vectors: str | None = Field(
        default=None,
        description="tinybert: text file of word vectors (GloVe); null: the model's own word embeddings",
    )
    mask_probability: float = Field(default=0.1, ge=0, le=1, description="bilstm: share of words masked")
    pos_probability: float = Field(
        default=0.1, ge=0, le=1, description="bilstm: share replaced by a word of the same part of speech"
    )
    ngram_probability: float = Field(
        default=0.25, ge=0, le=1, description="bilstm: share of copies cut down to one n-gram of 1 to 5 words"
    )
    seed: int = Field(default=0, ge=0, description="of the copies, apart from the run's seed")

    @model_validator(mode="after")
    def _shares(self) -> "AugmentConfig":
        both = self.mask_probability + self.pos_probability
        if both > 1:
            raise ValueError(f"mask_probability + pos_probability must be at most 1, got {both:g}")
        return self


class TaskConfig(Section):
    """The task that teacher and student are trained for and scored on (`--task`, `--data`)."""

    name: str = Field(description="sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte, wnli, imdb, squad, ...")
    data: str | None = Field(default=None, description="folder of the task's files; null: the hub")
    max_length: int = Field(
        default=128,
        ge=8,
        description="tokens of an example, default 384 for spans; longer ones are truncated, of a span cut "
        "into windows",
    )
    max_examples: int | None = Field(
        default=None,
        ge=1,
        description="use so many of the training examples, drawn once for all runs; null: all",
    )
    validation_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the training examples to hold out and to be scored on, in place of the "
        "validation split: to choose hyper-parameters by",
    )
    max_tokens: int = Field(
        default=4096, ge=8, description="tokens of a forward pass, padding included; a batch is split to fit"
    )


class MaskingConfig(Section):
    """Devlin et al. 2019, section 3.1; smoothing from the DistilBERT code."""

    probability: float = Field(
        default=0.15, gt=0, lt=1, description="share of a sequence's tokens to predict"
    )
    mask: float = Field(default=0.8, ge=0, le=1, description="share of those shown as [MASK]")
    random: float = Field(default=0.1, ge=0, le=1, description="share shown as a random token")
    keep: float = Field(default=0.1, ge=0, le=1, description="share left as they are")
    smoothing: float | None = Field(
        default=None, ge=0, description="tokens are picked with weight count^-smoothing; null: all alike"
    )
    whole_word: bool = Field(default=False, description="pick all pieces of a word together")

    @model_validator(mode="after")
    def _shares(self) -> "MaskingConfig":
        if abs(self.mask + self.random + self.keep - 1) > 1e-6:
            raise ValueError(f"mask + random + keep must be 1, got {self.mask + self.random + self.keep:g}")
        return self


Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019) or Adadelta (Zeiler 2012)."""

    name: Literal["adamw", "adadelta"] = Field(default="adamw", description="which of them")
    lr: float = Field(default=5e-4, gt=0, description="peak learning rate")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.98), description="of AdamW")
    rho: float = Field(default=0.95, gt=0, lt=1, description="of Adadelta")
    eps: float = Field(default=1e-6, gt=0, description="added to what a step is divided by")
    weight_decay: float = Field(default=0.0, ge=0, description="not applied to biases and norms")
    max_grad_norm: float = Field(default=5.0, gt=0, description="gradients are clipped to this L2 norm")


class ScheduleConfig(Section):
    name: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="shape after the warm-up"
    )
    warmup: float = Field(
        default=0.05, ge=0, le=1, description="share of the steps with a linear rise from 0"
    )


class LoopConfig(Section):
    steps: int | None = Field(default=None, ge=1, description="optimiser steps; this or `epochs`")
    epochs: float | None = Field(default=None, gt=0, description="passes over the training sequences")
    batch_size: int = Field(
        default=32, ge=1, description="sequences an optimiser step, over all processes and micro-batches"
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="sequences a forward pass of one process; null: all at once. On a task: task.max_tokens",
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="optimiser steps between held-out evaluations; null: an epoch"
    )
    eval_sequences: int = Field(
        default=512, ge=1, description="held-out sequences of an evaluation while training"
    )
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="optimiser steps between checkpoints; null: an epoch"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    log_every: int = Field(default=10, ge=1, description="optimiser steps between log lines")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="bf16: autocast; auto: bf16 where the device has the instructions"
    )
    teacher_precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="of the teacher, which needs no gradient; auto: bf16 where the device has the "
        "instructions, whatever `precision` is",
    )
    head_warmup_steps: int = Field(
        default=0,
        ge=0,
        description="optimiser steps that train the new prediction head alone, before the rest",
    )

    head_warmup_lr: float = Field(default=1e-3, gt=0, description="peak learning rate of these steps")

    @model_validator(mode="after")
    def _length_and_sizes(self) -> "LoopConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.micro_batch_size and self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class StageConfig(Section):
    """One stage of a recipe with `stages`. What it leaves out is as at the top of the recipe."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$", description="of its folder and its records")
    reads: Literal["text", "task"] = Field(
        description="what it reads: data.corpus, or the examples of `task`"
    )
    teacher: str | None = Field(default=None, description="folder or hub id; null: that of the run")
    layerwise: bool = Field(
        default=False,
        description="one layer after the other, from the first: only it is trained, by its pair of each "
        "objective's layers, for run.steps each (progressive knowledge transfer, Sun et al. 2020)",
    )
    data: DataConfig
    masking: MaskingConfig | None
    augment: AugmentConfig | None = None
    objectives: list[ObjectiveConfig] = Field(min_length=1)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    run: LoopConfig
