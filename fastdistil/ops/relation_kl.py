"""KL divergence of self-attention relations, MiniLM's loss: `attention_kl` of states with themselves."""

from __future__ import annotations

import math

from torch import Tensor

from fastdistil.ops import checks
from fastdistil.ops.attention_kl import attention_kl


def relation_kl(
    student_states: Tensor,
    teacher_states: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """KL divergence of the student's self-attention relations from the teacher's (MiniLMv2, Wang et al.,
    2021, section 3.1; with values and the attention's own heads, MiniLM, Wang et al., 2020, section 3.2). ::

        R = softmax(X_a @ X_a.mT / sqrt(d))      # X_a: states (B, L, D) split into num_heads heads of size d
        attention_kl of R_teacher and R_student

    The states are the queries, the keys or the values of one layer, all heads side by side. They are split
    anew into relation heads, so teacher and student need neither the same width nor the same attention heads.
    No `(L, L)` relation is formed.

    Args:
        student_states: `(B, L, Ds)`; float32, bfloat16, float16 or float64. The only input with a gradient.
        teacher_states: `(B, L, Dt)`.
        num_heads: relation heads A_r; divides Ds and Dt.
        mask: as in `attention_kl`.
        reduction: as in `attention_kl`; `"none"` has the shape `(B, num_heads, L)`.

    Returns:
        The loss in float32 (float64 for float64 students).

    Memory: as `attention_kl`.

    Raises:
        ValueError: num_heads does not divide a width (the message lists what would), and as `attention_kl`.
        RuntimeError: backward with `create_graph=True`; forward-mode differentiation.
    """
    states = {"student_states": student_states, "teacher_states": teacher_states}
    checks.check_tensors(states, {"mask": mask})
    checks.check_integer("num_heads", num_heads)
    for name, tensor in states.items():
        checks.check_floating(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape (B, L, D), got {tuple(tensor.shape)}")
    checks.check_shape(
        "teacher_states",
        teacher_states,
        (*student_states.shape[:2], teacher_states.shape[2]),
        "B and L of student_states",
    )
    widths = student_states.shape[2], teacher_states.shape[2]
    if num_heads < 1 or any(width % num_heads for width in widths):
        common = math.gcd(*widths)
        fit = [heads for heads in range(1, common + 1) if common % heads == 0]
        raise ValueError(
            f"num_heads must divide the widths of the states, {widths[0]} (student) and {widths[1]} "
            f"(teacher), got {num_heads}; these would: {', '.join(map(str, fit))}"
        )
    student, teacher = (tensor.unflatten(2, (num_heads, -1)).transpose(1, 2) for tensor in states.values())
    return attention_kl(student, student, teacher, teacher, mask, reduction=reduction)
