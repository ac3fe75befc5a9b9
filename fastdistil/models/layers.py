"""Which layer of the teacher each layer of the student is compared with."""

from collections.abc import Sequence

from fastdistil.errors import UserError

MAPPINGS = ("uniform", "skip", "last", "first", "top")

LayerPairs = tuple[tuple[int, int], ...]  # (student's layer, teacher's layer), both 0-based


def layer_pairs(
    mapping: str | Sequence[Sequence[int]], student_depth: int, teacher_depth: int, key: str = "layers"
) -> LayerPairs:
    """The pairs of a mapping, for models of M and N layers.

    Counting layers from 1, layer m of the student is paired with the teacher's layer

    - "uniform": m * N / M, rounded down (TinyBERT, Jiao et al. 2020, section 4.1).
    - "skip": the same without the student's last layer, whose output other terms teach (PKD-Skip of BERT-PKD,
      Sun et al. 2019).
    - "last": N - M + m, without the student's last layer (PKD-Last).
    - "first": m (the bottom strategy of TinyBERT's ablation).
    - "top": N - M + m (the top strategy of TinyBERT's ablation).
    - a list: pairs of layers `[student, teacher]`, counted from 0.

    Raises:
        UserError: naming `key`, for a layer that is not there, a student deeper than its teacher, an unknown
            or an empty mapping.
    """
    if not isinstance(mapping, str):
        return _checked(mapping, student_depth, teacher_depth, key)
    if mapping not in MAPPINGS:
        raise UserError(f"{key} must be one of {', '.join(MAPPINGS)} or a list of pairs, got {mapping!r}")
    if student_depth > teacher_depth:
        raise UserError(
            f"{key}: {mapping!r} pairs each of the student's {student_depth} layers with another of the "
            f"teacher, which has only {teacher_depth}: give a list of [student, teacher] layers"
        )
    matched = student_depth - 1 if mapping in ("skip", "last") else student_depth
    if matched == 0:
        raise UserError(
            f"{key}: {mapping!r} leaves the student's last layer out, and it has no other: "
            f"give [[0, {teacher_depth - 1}]]"
        )

    def partner(m: int) -> int:
        match mapping:
            case "first":
                return m
            case "last" | "top":
                return teacher_depth - student_depth + m
        return m * teacher_depth // student_depth

    return tuple((m - 1, partner(m) - 1) for m in range(1, matched + 1))


def _checked(pairs: Sequence[Sequence[int]], student_depth: int, teacher_depth: int, key: str) -> LayerPairs:
    if not pairs:
        raise UserError(f"{key} names no layers: give pairs of [student, teacher] layers")
    for student, teacher in pairs:
        check_layer(student, student_depth, "student", key)
        check_layer(teacher, teacher_depth, "teacher", key)
    return tuple((student, teacher) for student, teacher in pairs)


def check_layer(layer: int, depth: int, whose: str, key: str) -> None:
    if not 0 <= layer < depth:
        raise UserError(f"{key}: the {whose} has no layer {layer}, its layers are 0 to {depth - 1}")
