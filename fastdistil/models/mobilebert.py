"""The student of MobileBERT (Sun et al. 2020, "MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited
Devices"): as deep as its teacher, with narrow blocks."""

from typing import Any, Literal

import torch
from torch import Tensor

from fastdistil.errors import UserError


def make_mobilebert(
    teacher: Any,
    *,
    num_layers: int | None = None,
    bottleneck_size: int = 128,
    num_attention_heads: int = 4,
    num_feedforward_networks: int = 4,
    embedding_size: int = 128,
    trigram_input: bool = True,
    normalization_type: Literal["no_norm", "layer_norm"] = "no_norm",
    hidden_act: str = "relu",
) -> Any:
    """A MobileBERT of `transformers` with the teacher's head, whose blocks are joined at the teacher's width.

    So feature maps compare without a projection. The paper gets there by a teacher with 512-wide blocks
    (IB-BERT); here the student takes the width of the BERT that there is. Defaults are the paper's (table 1),
    dropout included: none, but 0.1 in attention. A feed-forward layer is 4 * `bottleneck_size` wide.

    As in the paper, embeddings and head are copied from the teacher and the blocks start fresh,
    from torch's global random state. The copies are exact where the student has the room:

    - Word embeddings (V, D) become `words @ basis` (V, `embedding_size`) and the linear layer over the
      trigrams starts as the least-squares way back, from the word in the middle. The basis is that of the
      principal components (of the words, uncentred), so that no other (V, `embedding_size`) loses less; but
      with a masked-language-model head it is the first `embedding_size` axes, for then the vocabulary matrix,
      which is tied to the words, is the teacher's.
    - "no_norm" scales and shifts as the teacher's LayerNorm does on the average over the vocabulary.
    - The transform of a masked-language-model head keeps its weights, but not its activation, which is
      `hidden_act`. With trigrams, the row of [PAD] is zero, so that padding does not change the last word.

    Args:
        teacher: a BERT with any head of `transformers` or none; it is not changed.
        num_layers: default the teacher's.
        bottleneck_size: width inside a block.
        num_attention_heads: attention transfer needs the teacher's.
        num_feedforward_networks: stacked in a block.
        embedding_size: of a word.
        trigram_input: whether a position sees the words before and after it, too.
        normalization_type: of all norms but the head's.
        hidden_act: of the blocks and the head.

    Raises:
        UserError: the teacher is not a BERT; `bottleneck_size` is not a multiple of `num_attention_heads`;
            `embedding_size` is above the teacher's width.
    """
    import transformers

    old = teacher.config
    if old.model_type != "bert":
        raise UserError(
            f"a mobilebert student needs a BERT teacher, but {type(teacher).__name__} is {old.model_type!r}"
        )
    if bottleneck_size % num_attention_heads:
        raise UserError(
            f"a mobilebert student's bottleneck_size {bottleneck_size} is not a multiple of its "
            f"num_attention_heads {num_attention_heads}"
        )
    if embedding_size > old.hidden_size:
        raise UserError(
            f"a mobilebert student's embedding_size is {embedding_size}, above the teacher's hidden_size "
            f"{old.hidden_size}"
        )
    config = transformers.MobileBertConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        num_hidden_layers=num_layers or old.num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=4 * bottleneck_size,
        hidden_act=hidden_act,
        max_position_embeddings=old.max_position_embeddings,
        type_vocab_size=old.type_vocab_size,
        initializer_range=old.initializer_range,
        layer_norm_eps=old.layer_norm_eps,
        pad_token_id=old.pad_token_id,
        embedding_size=embedding_size,
        trigram_input=trigram_input,
        intra_bottleneck_size=bottleneck_size,
        num_feedforward_networks=num_feedforward_networks,
        normalization_type=normalization_type,
        tie_word_embeddings=old.tie_word_embeddings,
        id2label=old.id2label,
        label2id=old.label2id,
        problem_type=old.problem_type,
    )
    student_class = getattr(transformers, type(teacher).__name__.replace("Bert", "MobileBert", 1))
    student = student_class._from_config(config, dtype=teacher.dtype).to(teacher.device)
    if student.base_model is student:
        student.pooler = None  # nothing would train it
    with torch.no_grad():
        _copy_embeddings(teacher, student)
        _copy_head(teacher, student)
    return student


def _copy_embeddings(teacher: Any, student: Any) -> None:
    theirs, ours = teacher.base_model.embeddings, student.base_model.embeddings
    size = ours.embedding_size
    words = theirs.word_embeddings.weight.double()  # (V, D)
    products, width = words.mT @ words, words.shape[1]
    if student.get_output_embeddings() is not None or size == width:
        basis = torch.eye(width, size, dtype=words.dtype, device=words.device)
    else:
        basis = torch.linalg.eigh(products).eigenvectors[:, -size:]  # they come in ascending order
    codes = words @ basis
    back = torch.linalg.solve(basis.mT @ products @ basis, basis.mT @ products)  # (E, D)
    ours.word_embeddings.weight.copy_(codes)
    if ours.trigram_input and ours.word_embeddings.padding_idx is not None:
        ours.word_embeddings.weight[ours.word_embeddings.padding_idx] = 0
    middle = slice(size, 2 * size) if ours.trigram_input else slice(None)
    transformation = ours.embedding_transformation
    transformation.weight.zero_()[:, middle].copy_(back.mT)
    transformation.bias.zero_()
    ours.position_embeddings.load_state_dict(theirs.position_embeddings.state_dict())
    ours.token_type_embeddings.load_state_dict(theirs.token_type_embeddings.state_dict())
    scale, shift = theirs.LayerNorm.weight, theirs.LayerNorm.bias
    if student.config.normalization_type == "no_norm":
        typical = theirs.position_embeddings.weight.mean(0) + theirs.token_type_embeddings.weight[0]
        mean, deviation = _statistics(codes @ back + typical)
        scale, shift = scale / deviation, shift - scale * mean / deviation
    ours.LayerNorm.weight.copy_(scale)
    ours.LayerNorm.bias.copy_(shift)


def _statistics(states: Tensor) -> tuple[Tensor, Tensor]:
    """What LayerNorm subtracts from a row and divides it by, on the average over the rows."""
    return states.mean(1).mean(), states.std(1, correction=0).mean()


def _copy_head(teacher: Any, student: Any) -> None:
    """Pooler and head, whose names and sizes are the teacher's, but for the vocabulary matrix."""
    weights = {name.replace("bert.", "mobilebert.", 1): w for name, w in teacher.state_dict().items()}
    for name, weight in student.state_dict().items():
        if name in weights and not {"embeddings", "encoder", "decoder"}.intersection(name.split(".")):
            weight.copy_(weights[name])
    decoder = student.get_output_embeddings()
    if decoder is not None:
        matrix, size = teacher.get_output_embeddings().weight, student.config.embedding_size
        if not student.config.tie_word_embeddings:
            decoder.weight.copy_(matrix[:, :size])
        student.cls.predictions.dense.weight.copy_(matrix[:, size:].mT)
        decoder.bias.copy_(teacher.get_output_embeddings().bias)
