"""Make a smaller student out of a teacher."""

import copy
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from fastdistil.errors import UserError
from fastdistil.models.stack import STACKS

# The families of students, and what their configs call the dropouts.
_DROPOUTS = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"),
    "electra": (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "summary_last_dropout",
    ),
    "modernbert": ("embedding_dropout", "mlp_dropout", "attention_dropout", "classifier_dropout"),
}
# BERT's names of a weight, and DistilBERT's for the same one.
_BERT_TO_DISTILBERT: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^bert\.encoder\.", "distilbert.transformer."),
    (r"^bert\.", "distilbert."),
    (r"\.attention\.self\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_lin."),
    (r"\.attention\.output\.dense\.", ".attention.out_lin."),
    (r"\.attention\.output\.LayerNorm\.", ".sa_layer_norm."),
    (r"\.intermediate\.dense\.", ".ffn.lin1."),
    (r"(\.layer\.\d+)\.output\.dense\.", r"\1.ffn.lin2."),
    (r"(\.layer\.\d+)\.output\.LayerNorm\.", r"\1.output_layer_norm."),
    (r"^cls\.predictions\.transform\.dense\.", "vocab_transform."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "vocab_layer_norm."),
    (r"^cls\.predictions\.decoder\.", "vocab_projector."),
]


def set_dropout(model: Any, probability: float) -> None:
    """Change the dropout of hidden states, attention and head of a model of any family, compressed or not, in
    place: of its modules and of its config."""
    for name, value in model.config.to_dict().items():
        if "dropout" in name and type(value) in (int, float):
            setattr(model.config, name, probability)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        elif isinstance(getattr(module, "attention_dropout", None), float):  # ModernBERT
            module.attention_dropout = probability


def make_student(
    teacher: Any,
    *,
    num_layers: int | None = None,
    teacher_layers: Sequence[int] | None = None,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
    init: str = "teacher",
    dropout: float | None = None,
    architecture: Literal["distilbert", "same"] | None = None,
) -> Any:
    """A model with fewer layers than `teacher`, or a narrower one with fresh weights.

    It has the head that the teacher has: of a masked language model, of a task, or none.

    - "same" keeps the teacher's class. Embeddings, head, and the pooler that a head reads, are copied and
      tied as in the teacher, so that the student with all of the teacher's layers computes exactly what the
      teacher does. An encoder alone loses its pooler: nothing would train it.
    - "distilbert" makes a DistilBERT of a BERT (Sanh et al. 2019): no pooler, no token types; the teacher's
      token-type-0 embedding is added into the position embeddings, so that on single sentences, too, the
      student with all layers is exact (at the LayerNorm epsilon 1e-12 that DistilBERT has fixed and every
      published BERT uses), with one exception: the head of a classification, regression or choice task
      starts fresh, from torch's global random state, because DistilBERT's has a ReLU where BERT's pooler has
      a tanh.

    Args:
        teacher: a model of one of the families of `mlm_head`, with any head of `transformers` or none; it is
            not changed.
        num_layers: depth of the student; default half of the teacher's.
        teacher_layers: which layers to copy, 0-based and ascending; default `spread_layers`. Only for
            `init="teacher"`.
        hidden_size, num_attention_heads, intermediate_size: widths of a student with `init="random"`; default
            the teacher's, scaled with `hidden_size`.
        init: "teacher" copies weights, "random" draws them from torch's global random state.
        dropout: of hidden states, attention and a task's head; default the teacher's.
        architecture: "distilbert", "same", or None: "distilbert" for a BERT that has no head of a task, else
            "same".

    Raises:
        UserError: a layer that the teacher does not have, a depth above the teacher's, widths that cannot be
            copied or do not divide, a layer list that does not fit `num_layers`, an architecture that cannot
            be made of the teacher, a compressed teacher.
    """
    if getattr(teacher.config, "fastdistil", None) is not None:
        raise UserError(
            f"no student can be made of a compressed {type(teacher).__name__}: distil first, then compress"
        )
    family, depth = teacher.config.model_type, teacher.config.num_hidden_layers
    widths = {
        name: value
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_attention_heads", num_attention_heads),
            ("intermediate_size", intermediate_size),
        )
        if value is not None
    }
    if family not in _DROPOUTS:
        raise UserError(
            f"no student can be made of model type {family!r}; supported: {', '.join(sorted(_DROPOUTS))}"
        )
    student_class = _student_class(teacher, architecture)
    if init == "random":
        if teacher_layers is not None:
            raise UserError("student.teacher_layers names layers to copy, but student.init is 'random'")
        return _build(student_class, teacher, num_layers or max(1, depth // 2), None, widths, dropout)
    if widths:
        raise UserError(
            f"student.{next(iter(widths))} changes the width, so the teacher's weights cannot be copied: "
            "set student.init to 'random' or leave it out"
        )
    layers = _check_layers(depth, num_layers, teacher_layers)
    if family == "modernbert" and layers[0] != 0:
        raise UserError(
            f"student.teacher_layers must start with 0 for ModernBERT, whose first layer alone has no "
            f"attention norm, got {layers}"
        )
    student = _build(student_class, teacher, len(layers), layers, {}, dropout)
    weights = teacher.state_dict()
    if _is_encoder(teacher):
        prefix = f"{teacher.base_model_prefix}."
        weights = {
            prefix + name: weight for name, weight in weights.items() if not name.startswith("pooler.")
        }
    weights = _pick_layers(weights, f"{teacher.base_model_prefix}.{STACKS[family]}.", layers)
    if student.config.model_type != family:
        weights = _as_distilbert(weights)
        fresh = ("pre_classifier.", "classifier.")
        weights |= {name: w for name, w in student.state_dict().items() if name.startswith(fresh)}
    if _is_encoder(student):
        prefix = f"{student.base_model_prefix}."
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    student.load_state_dict(weights)
    return student


def spread_layers(depth: int, num_layers: int) -> list[int]:
    """`num_layers` of `depth` layers, evenly from first to last: 0, 2, 4, 7, 9, 11 for 6 of 12."""
    gaps = max(num_layers - 1, 1)
    return [(2 * i * (depth - 1) + gaps) // (2 * gaps) for i in range(num_layers)]


def _check_layers(depth: int, num_layers: int | None, teacher_layers: Sequence[int] | None) -> list[int]:
    if teacher_layers is None:
        wanted = num_layers or max(1, depth // 2)
        if wanted > depth:
            raise UserError(
                f"student.num_layers is {wanted}, but the teacher has only {depth} layers to copy"
            )
        return spread_layers(depth, wanted)
    layers = list(teacher_layers)
    for layer in layers:
        if not 0 <= layer < depth:
            raise UserError(
                f"student.teacher_layers has {layer}, but the teacher's layers are 0 to {depth - 1}"
            )
    if not layers or any(a >= b for a, b in pairwise(layers)):
        raise UserError(
            f"student.teacher_layers must be ascending layers of the teacher, each once, got {layers}"
        )
    if num_layers is not None and num_layers != len(layers):
        raise UserError(
            f"student.num_layers is {num_layers}, but student.teacher_layers lists {len(layers)} layers"
        )
    return layers


def _student_class(teacher: Any, architecture: str | None) -> Any:
    import transformers

    family, name = teacher.config.model_type, type(teacher).__name__
    if architecture is None:
        without_task = _is_encoder(teacher) or name.endswith("ForMaskedLM")
        architecture = "distilbert" if family == "bert" and without_task else "same"
    if architecture == "same" or family == "distilbert":
        return type(teacher)
    found = getattr(transformers, name.replace("Bert", "DistilBert", 1), None) if family == "bert" else None
    if found is None:
        raise UserError(f"student.architecture: no 'distilbert' can be made of {name}; leave it out")
    return found


def _build(
    student_class: Any,
    teacher: Any,
    num_layers: int,
    layers: list[int] | None,
    widths: dict[str, int],
    dropout: float | None,
) -> Any:
    """The student's architecture with fresh weights, in the teacher's dtype and on its device."""
    from transformers import DistilBertConfig

    old = teacher.config
    sizes = _widths(old, widths)
    config: Any
    if student_class is not type(teacher):
        config = DistilBertConfig(
            vocab_size=old.vocab_size,
            max_position_embeddings=old.max_position_embeddings,
            n_layers=num_layers,
            dim=sizes["hidden_size"],
            n_heads=sizes["num_attention_heads"],
            hidden_dim=sizes["intermediate_size"],
            activation=old.hidden_act,
            dropout=old.hidden_dropout_prob,
            attention_dropout=old.attention_probs_dropout_prob,
            seq_classif_dropout=old.hidden_dropout_prob,
            qa_dropout=old.hidden_dropout_prob,
            id2label=old.id2label,
            label2id=old.label2id,
            problem_type=old.problem_type,
            initializer_range=old.initializer_range,
            pad_token_id=old.pad_token_id,
            tie_word_embeddings=old.tie_word_embeddings,
        )
    else:
        config = copy.deepcopy(old)
        config.num_hidden_layers = num_layers
        config.hidden_size = sizes["hidden_size"]
        config.num_attention_heads = sizes["num_attention_heads"]
        setattr(config, _ffn_name(old), sizes["intermediate_size"])
        if old.model_type == "modernbert":
            picked = layers or spread_layers(old.num_hidden_layers, min(num_layers, old.num_hidden_layers))
            kinds = [old.layer_types[layer] for layer in picked]
            config.layer_types = [kinds[i % len(kinds)] for i in range(num_layers)]
    if dropout is not None:
        for name in _DROPOUTS[config.model_type]:
            setattr(config, name, dropout)
    student = student_class._from_config(config, dtype=teacher.dtype).to(teacher.device)
    if getattr(student, "pooler", None) is not None:
        student.pooler = None  # nothing would train it
    return student


def _is_encoder(model: Any) -> bool:
    return model.base_model is model


def _ffn_name(config: Any) -> str:
    return "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"


def _widths(old: Any, wanted: dict[str, int]) -> dict[str, int]:
    hidden = wanted.get("hidden_size", old.hidden_size)
    head_size = old.hidden_size // old.num_attention_heads
    heads = wanted.get("num_attention_heads", max(1, hidden // head_size))
    if hidden % heads:
        raise UserError(
            f"student.hidden_size {hidden} is not a multiple of student.num_attention_heads {heads}"
        )
    ffn = wanted.get("intermediate_size", getattr(old, _ffn_name(old)) * hidden // old.hidden_size)
    return {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": ffn}


def _pick_layers(weights: dict[str, torch.Tensor], stack: str, layers: list[int]) -> dict[str, torch.Tensor]:
    picked = {name: weight for name, weight in weights.items() if not name.startswith(stack)}
    for new, old in enumerate(layers):
        prefix = f"{stack}{old}."
        for name, weight in weights.items():
            if name.startswith(prefix):
                picked[f"{stack}{new}.{name.removeprefix(prefix)}"] = weight
    return picked


def _as_distilbert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = dict(weights)
    token_type = weights.pop("bert.embeddings.token_type_embeddings.weight")
    position = "bert.embeddings.position_embeddings.weight"
    weights[position] = weights[position] + token_type[0]
    # A BERT head names its one bias twice, as its own and as the decoder's; the decoder's is the one in use.
    weights.pop("cls.predictions.bias", None)
    weights = {name: w for name, w in weights.items() if not name.startswith(("bert.pooler.", "classifier."))}
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in _BERT_TO_DISTILBERT:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    return renamed


_PROBE = "Élan vital: HTTP/2's naïve 3.5% re-run [sic], ﬁve — 東京 😀 unbelievably\tgood?!"


def check_same_tokenizer(teacher: Any, student: Any, names: tuple[str, str] = ("teacher", "student")) -> None:
    """Raise `UserError`, naming the first difference, unless both tokenizers turn text into the same ids.

    Compared are the vocabularies, the special tokens, and the ids of a sentence that casing, accents,
    punctuation and non-Latin text would split differently. `names` are whose they are, for the message.
    """
    if difference := _tokenizer_difference(teacher, student):
        raise UserError(
            f"{names[0]} and {names[1]} have different tokenizers: {difference[0]} in the first but "
            f"{difference[1]} in the second; both are given the same token ids"
        )


def _tokenizer_difference(first: Any, second: Any) -> tuple[str, str] | None:
    vocabularies = first.get_vocab(), second.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        a, b = ({index: token for token, index in vocabulary.items()} for vocabulary in vocabularies)
        index = min(i for i in a.keys() | b.keys() if a.get(i) != b.get(i))
        return f"token {index} is {a.get(index)!r}", repr(b.get(index))
    for name in ("pad_token", "mask_token", "cls_token", "sep_token", "unk_token"):
        if getattr(first, name) != getattr(second, name):
            return f"the {name} is {getattr(first, name)!r}", repr(getattr(second, name))
    ids = first(_PROBE)["input_ids"], second(_PROBE)["input_ids"]
    if ids[0] == ids[1]:
        return None
    tokens = first.convert_ids_to_tokens(ids[0]), second.convert_ids_to_tokens(ids[1])
    i = next((i for i, (x, y) in enumerate(zip(*ids, strict=False)) if x != y), min(map(len, ids)))
    return f"the same text becomes {tokens[0][i : i + 3]}", str(tokens[1][i : i + 3])
