"""From the section `student` of a configuration to a model at its first weights."""

from typing import Any

from fastdistil.models.bilstm import make_bilstm
from fastdistil.models.mobilebert import make_mobilebert
from fastdistil.models.student import make_student, set_dropout
from fastdistil.train.sections import StudentConfig

_SIZES = ("num_layers", "teacher_layers", "hidden_size", "num_attention_heads", "intermediate_size")


def build_student(config: StudentConfig, source: Any, pairs: bool = False) -> Any:
    """A student with the head of `source`, from its weights or from torch's global random state.

    Of the teacher a student has half the layers, and may be of another family; a model of its own
    (`from_model`) keeps all of its layers and its family, where the configuration does not say otherwise. If
    the configuration changes nothing of it, or the dropout alone, the student is `source` itself, which may
    be a compressed model then.
    `pairs` says whether a text of the task is two sentences, which a BiLSTM reads apart.
    Raises `UserError` for sizes that do not fit the source or the architecture.
    """
    if takes_whole_model(config):
        if config.dropout is not None:
            set_dropout(source, config.dropout)
        return source
    match config.architecture:
        case "bilstm":
            return make_bilstm(
                source,
                pairs=pairs,
                **config.bilstm.model_dump(),
                dropout=0.1 if config.dropout is None else config.dropout,
                init=config.init,
            )
        case "mobilebert":
            heads = config.num_attention_heads or source.config.num_attention_heads
            sizes = config.mobilebert.model_dump()
            return make_mobilebert(source, num_layers=config.num_layers, num_attention_heads=heads, **sizes)
    sizes = {name: getattr(config, name) for name in _SIZES}
    architecture = config.architecture
    if config.from_model is not None:
        architecture = architecture or "same"
        if config.teacher_layers is None:
            sizes["num_layers"] = config.num_layers or source.config.num_hidden_layers
    return make_student(source, **sizes, init=config.init, dropout=config.dropout, architecture=architecture)


def takes_whole_model(config: StudentConfig) -> bool:
    """Whether the student is `from_model` as it is: its weights, without a layer cut or a width changed."""
    changed = any(getattr(config, name) is not None for name in (*_SIZES, "architecture"))
    return config.from_model is not None and config.init == "teacher" and not changed
