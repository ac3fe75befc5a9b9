"""The Distilled BiLSTM (Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural
Networks", section 3.1), a `transformers` model.

Importing this module registers it with the `Auto` classes, which then load its folders like any other.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from fastdistil.errors import UserError


class BiLSTMConfig(PreTrainedConfig):
    """Sizes of a BiLSTM.

    Attributes:
        embedding_size: of the word embeddings.
        hidden_size: LSTM units in each direction.
        fc_size: width of the fully connected layer.
        dropout: of the fully connected layer's output.
        pairs: whether a text is two sentences, which the siamese form compares.
        max_position_embeddings: the longest text; not a limit of the model, but of the teacher it has.
        initializer_range: deviation of fresh word embeddings.
    """

    model_type = "fastdistil-bilstm"

    vocab_size: int = 30522
    embedding_size: int = 384
    hidden_size: int = 150
    fc_size: int = 200
    dropout: float = 0.1
    pairs: bool = False
    pad_token_id: int | None = 0
    max_position_embeddings: int = 512
    initializer_range: float = 0.05
    num_hidden_layers: int = 1
    num_attention_heads: int = 0  # reports show what every model has


class BiLSTMPreTrainedModel(PreTrainedModel):
    config_class = BiLSTMConfig
    base_model_prefix = "bilstm"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As torch initialises them, which is what the paper's code has; only embeddings are narrower."""
        if isinstance(module, nn.LSTM | nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class BiLSTMModel(BiLSTMPreTrainedModel):
    """Word embeddings and one bidirectional LSTM layer: a vector of features for each text."""

    _input_embed_layer = "embeddings"

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        # Two of one direction: the backward one reads reversed text, so that padding comes last for both
        # and nothing needs the lengths on the host, as a packed sequence would.
        self.forward_lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.backward_lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        attention_mask: Tensor | None = None,  # (B, L)
        token_type_ids: Tensor | None = None,  # (B, L)
    ) -> BaseModelOutputWithPooling:
        """`pooler_output` (B, F), the features; `last_hidden_state` is the same as one token, (B, 1, F).

        The states h of a sentence are the last one of the forward direction and of the backward direction,
        (B, 2H), without [CLS] and [SEP]. A single sentence has the features h, a pair
        `[h1, h2, h1 * h2, |h1 - h2|]`. Padding is on the right. A sentence without words is read as one
        token, the one that stands there.
        """
        mask = (
            torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        starts, lengths, longest = self._sentences(mask.bool(), token_type_ids)
        states = self._states(input_ids, starts, lengths, longest)
        features = states[0]
        if self.config.pairs:
            first, second = states
            features = torch.cat([first, second, first * second, (first - second).abs()], dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=features[:, None], pooler_output=features)

    def _sentences(self, mask: Tensor, token_type_ids: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """Where the S sentences begin and how long they are, both (S, B), and a bound of their lengths.

        `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, where B has the token type 1.
        """
        total = mask.sum(1)
        if not self.config.pairs:
            return torch.ones_like(total)[None], (total - 2).clamp(min=1)[None], max(mask.shape[1] - 2, 1)
        second = torch.zeros_like(total) if token_type_ids is None else ((token_type_ids == 1) & mask).sum(1)
        first = total - second
        starts = torch.stack([torch.ones_like(first), torch.minimum(first, total - 1)])
        lengths = torch.stack([first - 2, second - 1]).clamp(min=1)
        # A wait for the device, but without it both sentences are as long as the two together.
        return starts, lengths, int(lengths.max())

    def _states(self, input_ids: Tensor, starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """(S, B, 2H): the last states of both directions."""
        steps = torch.arange(longest, device=input_ids.device)
        ends = starts + lengths - 1
        positions = torch.stack([starts[..., None] + steps, ends[..., None] - steps])  # (2, S, B, T)
        positions = positions.clamp(0, input_ids.shape[1] - 1)
        words = input_ids.expand(*positions.shape[:2], -1, -1).gather(-1, positions).flatten(1, 2)
        forward, backward = self.embeddings(words)  # (S * B, T, E)
        last = (lengths.flatten() - 1)[:, None, None].expand(-1, 1, self.config.hidden_size)
        states = [
            lstm(words)[0].gather(1, last)[:, 0]
            for lstm, words in ((self.forward_lstm, forward), (self.backward_lstm, backward))
        ]
        return torch.cat(states, dim=-1).unflatten(0, lengths.shape)


class BiLSTMForSequenceClassification(BiLSTMPreTrainedModel):
    """The features, a fully connected layer with ReLU and dropout, and the output layer."""

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__(config)
        self.bilstm = BiLSTMModel(config)
        features = (8 if config.pairs else 2) * config.hidden_size
        self.fc = nn.Linear(features, config.fc_size)
        self.dropout = nn.Dropout(config.dropout)
        assert config.num_labels is not None
        self.output = nn.Linear(config.fc_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        features = self.bilstm(input_ids, attention_mask, token_type_ids).pooler_output
        logits = self.output(self.dropout(self.fc(features).relu()))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def make_bilstm(
    teacher: Any,
    *,
    pairs: bool,
    hidden_size: int = 150,
    fc_size: int = 200,
    embedding_size: int | None = None,
    dropout: float = 0.1,
    init: Literal["teacher", "random"] = "teacher",
) -> BiLSTMForSequenceClassification:
    """A BiLSTM for the teacher's task: with its vocabulary and labels, in its dtype and on its device.

    Unlike the paper's, which reads whole words in two channels of word2vec embeddings, one of them frozen,
    it reads the teacher's WordPieces, with one embedding each. So teacher and student read the same batch.

    Args:
        teacher: a model with a classification or regression head; it is not changed.
        pairs: whether a text is two sentences, told apart by their token types.
        hidden_size: LSTM units in each direction; the paper searched 150 and 300.
        fc_size: width of the fully connected layer; the paper searched 200 and 400.
        embedding_size: of a WordPiece; default the teacher's.
        dropout: of the fully connected layer's output; the paper does not say where.
        init: "teacher" copies the teacher's word embeddings, "random" draws them, like all other weights,
            from torch's global random state.

    Raises:
        UserError: the teacher has another head or, for `pairs`, no token types; an `embedding_size` that is
            not the teacher's with `init="teacher"`.
    """
    old, words = teacher.config, teacher.get_input_embeddings().weight
    if not type(teacher).__name__.endswith("ForSequenceClassification"):
        raise UserError(
            f"a bilstm student is for tasks of classification and regression, {type(teacher).__name__} is not"
        )
    if pairs and getattr(old, "type_vocab_size", 1) < 2:
        raise UserError(
            f"a bilstm student tells the sentences of a pair apart by token types, which a teacher of model "
            f"type {old.model_type!r} does not have"
        )
    if init == "teacher" and embedding_size not in (None, words.shape[1]):
        raise UserError(
            f"a bilstm student's embedding_size is {embedding_size}, but the teacher's word embeddings are "
            f"{words.shape[1]} wide: leave it out or set init to 'random'"
        )
    config = BiLSTMConfig(
        vocab_size=old.vocab_size,
        embedding_size=embedding_size or words.shape[1],
        hidden_size=hidden_size,
        fc_size=fc_size,
        dropout=dropout,
        pairs=pairs,
        pad_token_id=old.pad_token_id,
        max_position_embeddings=old.max_position_embeddings,
        id2label=old.id2label,
        label2id=old.label2id,
        problem_type=old.problem_type,
    )
    student = BiLSTMForSequenceClassification._from_config(config, dtype=teacher.dtype).to(teacher.device)
    if init == "teacher":
        with torch.no_grad():
            student.bilstm.embeddings.weight.copy_(words)
    return student


AutoConfig.register(BiLSTMConfig.model_type, BiLSTMConfig)
AutoModel.register(BiLSTMConfig, BiLSTMModel)
AutoModelForSequenceClassification.register(BiLSTMConfig, BiLSTMForSequenceClassification)
