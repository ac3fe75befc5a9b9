"""From the section `student` of a configuration to a model at its first weights."""

from typing import Any

from fastdistil.errors import UserError
from fastdistil.models.bilstm import make_bilstm
from fastdistil.models.load import read_depth
from fastdistil.models.mobilebert import make_mobilebert
from fastdistil.models.student import make_student, set_dropout, spread_layers
from fastdistil.train.config import RunConfig
from fastdistil.train.sections import StudentConfig

_SIZES = ("num_layers", "teacher_layers", "hidden_size", "num_attention_heads", "intermediate_size")


def resolved(config: RunConfig) -> RunConfig:
    """`config` with the numbers of the layers that its student starts from, where it has a word for them.

    A recipe says which layers for teachers of any depth; a run is kept, and known again, by the numbers.
    Raises `UserError` for a model that is not there, and for more layers than it has.
    """
    if not isinstance(config.student.teacher_layers, str):
        return config
    if config.new_teacher is not None:
        depth = teacher_depth = config.new_teacher.num_layers
    else:
        teacher = config.student_stages[0].teacher or config.teacher
        source = config.student.from_model or teacher
        assert source is not None
        depth = read_depth(source)
        teacher_depth = depth if teacher is None else read_depth(teacher)
    return config.model_copy(update={"student": with_layers(config.student, depth, teacher_depth)})


def with_layers(config: StudentConfig, depth: int, teacher_depth: int) -> StudentConfig:
    """`config` with numbers in place of a word in `teacher_layers`.

    There are num_layers of them, by default half of the teacher's; of a model with fewer layers than that, as
    `depth` says of the one that they are taken from, all. Raises `UserError` for more than it has.
    """
    if not isinstance(config.teacher_layers, str):
        return config
    count = config.num_layers or min(max(1, teacher_depth // 2), depth)
    if count > depth:
        whose = "the teacher" if config.from_model is None else config.from_model
        raise UserError(f"student.num_layers is {count}, but {whose} has only {depth} layers to copy")
    layers = list(range(count)) if config.teacher_layers == "first" else spread_layers(depth, count)
    return config.model_copy(update={"num_layers": count, "teacher_layers": layers})


def build_student(config: StudentConfig, source: Any, pairs: bool = False) -> Any:
    """A student with the head of `source`, from its weights or from torch's global random state.

    Of the teacher a student has half the layers, and may be of another family; a model of its own
    (`from_model`) keeps all of its layers and its family, where the configuration does not say otherwise. If
    the configuration changes nothing of it, or the dropout alone, the student is `source` itself, which may
    be a compressed model then.
    `pairs` says whether a text of the task is two sentences, which a BiLSTM reads apart.
    Raises `UserError` for sizes that do not fit the source or the architecture.
    """
    depth = getattr(source.config, "num_hidden_layers", 0)
    config = with_layers(config, depth, depth)
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
