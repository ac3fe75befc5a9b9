"""The forms of the kernels that `compile_ahead.py` compiles: what a launcher passes for sizes that matter."""

from typing import Any

import triton
import triton.language as tl

from fastdistil.kernels import (
    attention_kl,
    attention_mse,
    cosine_loss,
    head_tiles,
    hidden_mse,
    kd_loss,
    online_softmax,
    pair_rows,
    scale_grad,
)

V = 30522
FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2
BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
TYPES = {"bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
GENERAL = {"power": -1, "smooth": True}


def kd_form(
    dtype: str,
    shifted: bool,
    *,
    divergence: int = FORWARD_KL,
    power: int = 1,
    smooth: bool = False,
    biased: bool = False,
    teacher: str | None = None,
    labelled: bool = True,
    with_grad: bool = True,
) -> dict[str, Any]:
    """What the launcher passes for logits of V words, by default with labels, a mask and a gradient."""
    pitch = "i32" if shifted else "i32:16"
    bias = f"*{dtype}" if biased else None
    return {
        "kernel": kd_loss.kd_loss_kernel,
        "arguments": {
            "student": f"*{dtype}",
            "teacher": f"*{teacher or dtype}",
            "student_bias": bias,
            "teacher_bias": bias,
            "labels": "*i64" if labelled else None,
            "kd_mask": "*u8" if labelled else None,
            "kd_scale": "*fp32",
            "ce_scale": "*fp32",
            "kd": "*fp32",
            "ce": "*fp32",
            "grad": f"*{dtype}",
            "temperature": "fp64",
            "jsd_beta": "fp64",
            "label_smoothing": "fp64",
            "ignore_index": "i32",
            "base_shift": "i32",
            "student_pitch": pitch,
            "teacher_pitch": pitch,
            "grad_pitch": pitch,
            "kd_scale_stride": "i32:16",
            "ce_scale_stride": "i32:16",
        },
        "constants": {
            "DIVERGENCE": divergence,
            "POWER": power,
            "HAS_LABELS": labelled,
            "HAS_MASK": labelled,
            "SMOOTH": smooth,
            "STUDENT_BIAS": biased,
            "TEACHER_BIAS": biased,
            "WITH_GRAD": with_grad,
            "TEACHER_ALIGNED": True,
            "GRAD_ALIGNED": with_grad,
            "ACC": tl.float32,
            **online_softmax.row_shape(V, BYTES[dtype], shifted),
        },
        "options": lambda hip: kd_loss.compile_options(V, divergence, biased, hip),
    }


def cosine_form(dtype: str, width: int) -> dict[str, Any]:
    return {
        "kernel": cosine_loss.cosine_loss_kernel,
        "arguments": {
            "student": f"*{dtype}",
            "teacher": f"*{dtype}",
            "mask": "*u8",
            "scale": "*fp32",
            "loss": "*fp32",
            "grad": f"*{dtype}",
            "student_pitch": "i32:16",
            "teacher_pitch": "i32:16",
            "grad_pitch": "i32:16",
            "scale_stride": "i32:16",
        },
        "constants": {
            "HAS_MASK": True,
            "WITH_GRAD": True,
            "STUDENT_ALIGNED": True,
            "TEACHER_ALIGNED": True,
            "GRAD_ALIGNED": True,
            "D": width,
            "BLOCK": triton.next_power_of_2(width),
            "ACC": tl.float32,
        },
        "options": lambda hip: pair_rows.compile_options(width, hip),
    }


def scale_form(dtype: str) -> dict[str, Any]:
    return {
        "kernel": scale_grad.scale_grad_kernel,
        "arguments": {
            "grad": f"*{dtype}",
            "scale": "*fp32",
            "base_shift": "i32",
            "rows": "i32",
            "width": "i64",
            "pitch": "i32",
            "scale_stride": "i32:16",
        },
        "constants": {"BLOCK": scale_grad.BLOCK, "ALIGNMENT": online_softmax.ALIGNMENT, "ACC": tl.float32},
        "options": scale_grad.compile_options,
    }


def hidden_form(dtype: str, width: int) -> dict[str, Any]:
    cosine = cosine_form(dtype, width)
    return cosine | {
        "kernel": hidden_mse.hidden_mse_kernel,
        "constants": cosine["constants"] | {"NORMALIZE": True},
        "options": lambda hip: pair_rows.compile_options(width, hip),
    }


def _strides(*tensors: str) -> dict[str, str]:
    # Not known to be divisible: that rows are aligned is stated by the constants.
    return {f"{tensor}_{stride}": "i32" for tensor in tensors for stride in ("batch", "head", "pitch")}


def _heads(student: int, teacher: int, *aligned: str) -> dict[str, Any]:
    return {
        "DS": student,
        "DT": teacher,
        "STUDENT_WIDTH": head_tiles.tile_width(student),
        "TEACHER_WIDTH": head_tiles.tile_width(teacher),
        **{f"{tensor.upper()}_ALIGNED": True for tensor in aligned},
    }


def _accumulator(dtype: str) -> str:
    return "fp64" if dtype == "fp64" else "fp32"


def _kl_tiles(
    dtype: str, student: int, teacher: int, keys: bool, hip: bool
) -> tuple[int, int, dict[str, Any]]:
    width = head_tiles.tile_width(max(student, teacher))
    return attention_kl.tile_shape(TYPES[dtype], TYPES[dtype], width, keys, hip)


def _two_tiles(constants: dict[str, Any], rows: str, width: str = "WIDTH") -> list[tuple[int, int]]:
    return [(constants[rows], constants[f"{model}_{width}"]) for model in ("STUDENT", "TEACHER")]


def kl_fwd_form(
    dtype: str, student: int, teacher: int, mask: int = head_tiles.TOKENS.value
) -> dict[str, Any]:
    tensors = ("student_q", "student_k", "teacher_q", "teacher_k")

    def constants(hip: bool) -> dict[str, Any]:
        queries, keys, _ = _kl_tiles(dtype, student, teacher, False, hip)
        return {
            "MASK": mask,
            **_heads(student, teacher, *tensors),
            "QUERIES": queries,
            "KEYS": keys,
            "STUDENT_DOT": TYPES[dtype],
            "TEACHER_DOT": TYPES[dtype],
            "ACC": TYPES[_accumulator(dtype)],
        }

    return {
        "kernel": attention_kl.attention_kl_fwd_kernel,
        "arguments": {
            **dict.fromkeys(tensors, f"*{dtype}"),
            **dict.fromkeys(("query_flags", "key_flags"), "*u8" if mask else None),
            "pair_flags": "*u8" if mask == head_tiles.PAIRS.value else None,
            **dict.fromkeys(("kl", "student_softmax", "teacher_softmax"), f"*{_accumulator(dtype)}"),
            "student_scale": "fp64",
            "teacher_scale": "fp64",
            "rows": "i32",
            "heads": "i32",
            "L": "i32:16",
            **_strides(*tensors),
        },
        "constants": constants,
        "tiles": lambda c, stages: _two_tiles(c, "QUERIES") + _two_tiles(c, "KEYS") * stages,
        "options": lambda hip: _kl_tiles(dtype, student, teacher, False, hip)[2],
    }


def kl_bwd_form(
    dtype: str, student: int, teacher: int, *, keys: bool, mask: int = head_tiles.TOKENS.value
) -> dict[str, Any]:
    tensors = ("student_own", "student_other", "teacher_own", "teacher_other")
    rows = ("student_softmax", "teacher_softmax", "student_factor", "teacher_factor")

    def constants(hip: bool) -> dict[str, Any]:
        own, other, _ = _kl_tiles(dtype, student, teacher, keys, hip)
        return {
            "OWN_ARE_KEYS": keys,
            "MASK": mask,
            **_heads(student, teacher, *tensors, "grad"),
            "OWN": own,
            "OTHER": other,
            "STUDENT_DOT": TYPES[dtype],
            "TEACHER_DOT": TYPES[dtype],
            "ACC": TYPES[_accumulator(dtype)],
        }

    return {
        "kernel": attention_kl.attention_kl_bwd_kernel,
        "arguments": {
            "weight": f"*{_accumulator(dtype)}",
            **dict.fromkeys(tensors, f"*{dtype}"),
            **dict.fromkeys(("own_flags", "other_flags"), "*u8" if mask else None),
            "pair_flags": "*u8" if mask == head_tiles.PAIRS.value else None,
            **dict.fromkeys(rows, f"*{_accumulator(dtype)}"),
            "grad": f"*{dtype}",
            "student_scale": "fp64",
            "teacher_scale": "fp64",
            "rows": "i32",
            "heads": "i32",
            "L": "i32:16",
            **_strides(*tensors, "grad"),
        },
        "constants": constants,
        # The student's, which two products take, is not read ahead everywhere.
        "tiles": lambda c, stages: (
            _two_tiles(c, "OWN") + _two_tiles(c, "OTHER") + _two_tiles(c, "OTHER")[1:] * (stages - 1)
        ),
        "options": lambda hip: _kl_tiles(dtype, student, teacher, keys, hip)[2],
    }


def gram_form(dtype: str, student: int, teacher: int, *, weighted: bool = False) -> dict[str, Any]:
    fast = dtype == "bf16" and not weighted
    gram = tl.float32 if fast else tl.float64

    def constants(hip: bool) -> dict[str, Any]:
        heads = _heads(student, teacher, "student", "teacher")
        widths = heads["STUDENT_WIDTH"], heads["TEACHER_WIDTH"]
        return {
            "MASK": head_tiles.TOKENS.value,
            "WEIGHTED": weighted,
            **heads,
            "STUDENT_COLUMNS": min(widths[0], attention_mse.GRAM_COLUMNS),
            "TEACHER_COLUMNS": min(widths[1], attention_mse.GRAM_COLUMNS),
            "GRAM_SIZE": attention_mse.product_sizes(*widths)["GRAM_SIZE"],
            "ROWS": attention_mse.gram_shape(gram, hip)[0],
            "DOT": tl.bfloat16 if fast else tl.float64,
            "GRAM": gram,
        }

    return {
        "kernel": attention_mse.attention_mse_gram_kernel,
        "arguments": {
            "student": f"*{dtype}",
            "teacher": f"*{dtype}",
            "flags": "*u8",
            "weight": f"*{_accumulator(dtype)}" if weighted else None,
            "parts": "*fp32" if fast else "*fp64",
            "heads": "i32",
            "L": "i32:16",
            "splits": "i32",
            "split_rows": "i32:16",
            "stride": "i32:16",
            **_strides("student", "teacher"),
        },
        "constants": constants,
        "tiles": lambda c, _: _two_tiles(c, "ROWS", "COLUMNS") * 2,
        "options": lambda hip: attention_mse.gram_shape(gram, hip)[1],
    }


def mse_value_form(student: int, teacher: int) -> dict[str, Any]:
    return {
        "kernel": attention_mse.attention_mse_value_kernel,
        "arguments": {
            "query_parts": "*fp64",
            "key_parts": "*fp64",
            "weight": "*fp32",
            "value": "*fp64",
            "query_factor": "*fp32",
            "key_factor": "*fp32",
            "student_scale": "fp64",
            "teacher_scale": "fp64",
            "splits": "i32",
            "stride": "i32:16",
        },
        "constants": {
            "WEIGHTED": False,
            "WITH_GRAD": True,
            **attention_mse.product_sizes(head_tiles.tile_width(student), head_tiles.tile_width(teacher)),
            "BLOCK": attention_mse.BLOCK,
        },
        "options": lambda hip: attention_mse.value_options(),
    }


def mse_grad_form(dtype: str, student: int, teacher: int) -> dict[str, Any]:
    split = dtype == "bf16"
    heads = _heads(student, teacher, "student", "teacher", "grad")
    return {
        "kernel": attention_mse.attention_mse_grad_kernel,
        "arguments": {
            "student": f"*{dtype}",
            "teacher": f"*{dtype}",
            "flags": "*u8",
            "weight": None,
            "factor": f"*{_accumulator(dtype)}",
            "grad": f"*{dtype}",
            "heads": "i32",
            "L": "i32:16",
            **_strides("student", "teacher", "grad"),
        },
        "constants": {
            "MASK": head_tiles.TOKENS.value,
            "WEIGHTED": False,
            **heads,
            "STUDENT_COLUMNS": min(heads["STUDENT_WIDTH"], attention_mse.GRAD_COLUMNS),
            "TEACHER_COLUMNS": min(heads["TEACHER_WIDTH"], attention_mse.GRAD_COLUMNS),
            "ROWS": attention_mse.grad_shape(split)[0],
            "STUDENT_DOT": TYPES[dtype],
            "TEACHER_DOT": TYPES[dtype],
            "SPLIT_FOR_STUDENT": split,
            "SPLIT_FOR_TEACHER": split,
            "ACC": TYPES[_accumulator(dtype)],
        },
        "tiles": lambda c, stages: _two_tiles(c, "ROWS", "COLUMNS") * stages,
        "options": lambda hip: attention_mse.grad_shape(split)[1],
    }


# For every GPU: the two layouts of the hot form, and one form of every other kernel and divergence.
FORMS = {
    "kd_loss bf16, padded pitch": kd_form("bf16", False),
    "kd_loss bf16, contiguous": kd_form("bf16", True),
    "kd_loss fp32, padded pitch": kd_form("fp32", False),
    "kd_loss fp32, contiguous": kd_form("fp32", True),
    "kd_loss bf16, biases": kd_form("bf16", False, biased=True),
    "kd_loss bf16, JSD": kd_form("bf16", True, divergence=JSD, **GENERAL),
    "cosine_loss bf16": cosine_form("bf16", 768),
    "cosine_loss fp32": cosine_form("fp32", 768),
    "scale_grad bf16": scale_form("bf16"),
    "scale_grad fp32": scale_form("fp32"),
    "hidden_mse bf16": hidden_form("bf16", 768),
    "hidden_mse fp32": hidden_form("fp32", 768),
    "attention_mse value": mse_value_form(32, 64),
}
for _dtype, _student, _teacher in (("bf16", 64, 64), ("bf16", 32, 64), ("fp32", 64, 64), ("fp32", 32, 64)):
    _sizes = f"{_dtype} {_student}/{_teacher}"
    FORMS |= {
        f"attention_kl {_sizes}": kl_fwd_form(_dtype, _student, _teacher),
        f"attention_kl queries' gradient {_sizes}": kl_bwd_form(_dtype, _student, _teacher, keys=False),
        f"attention_kl keys' gradient {_sizes}": kl_bwd_form(_dtype, _student, _teacher, keys=True),
        f"attention_mse products {_sizes}": gram_form(_dtype, _student, _teacher),
        f"attention_mse gradient {_sizes}": mse_grad_form(_dtype, _student, _teacher),
    }
# Of MiniLM's relation heads and TinyBERT's heads, whose rows are short or odd: spills alone are looked for.
for _dtype, _student, _teacher in (("bf16", 8, 8), ("fp32", 8, 8), ("bf16", 26, 64), ("fp32", 26, 64)):
    for _name, _form in (
        ("", kl_fwd_form(_dtype, _student, _teacher)),
        (" queries' gradient", kl_bwd_form(_dtype, _student, _teacher, keys=False)),
        (" keys' gradient", kl_bwd_form(_dtype, _student, _teacher, keys=True)),
    ):
        del _form["tiles"]
        FORMS[f"attention_kl{_name} {_dtype} {_student}/{_teacher}"] = _form
# For one GPU: what needs more registers (any temperature, label smoothing, biases, mixed dtypes) in
# each divergence, what leaves arguments out, and a smaller width.
MORE_FORMS = {
    "kd_loss bf16, any T, smoothing": kd_form("bf16", True, **GENERAL),
    "kd_loss fp32, any T, smoothing": kd_form("fp32", True, **GENERAL),
    "kd_loss bf16, reverse KL": kd_form("bf16", False, divergence=REVERSE_KL),
    "kd_loss fp32, reverse KL": kd_form("fp32", False, divergence=REVERSE_KL),
    "kd_loss bf16, reverse KL, any T": kd_form("bf16", True, divergence=REVERSE_KL, **GENERAL),
    "kd_loss fp32, JSD": kd_form("fp32", False, divergence=JSD),
    "kd_loss fp32, JSD, any T": kd_form("fp32", True, divergence=JSD, **GENERAL),
    "kd_loss bf16, biases, any T": kd_form("bf16", False, biased=True, **GENERAL),
    "kd_loss fp32, biases, any T": kd_form("fp32", False, biased=True, **GENERAL),
    "kd_loss bf16, biases, JSD": kd_form("bf16", False, biased=True, divergence=JSD, **GENERAL),
    "kd_loss bf16, fp32 teacher": kd_form("bf16", False, teacher="fp32"),
    "kd_loss bf16, no labels": kd_form("bf16", True, labelled=False),
    "kd_loss bf16, no gradient": kd_form("bf16", True, with_grad=False),
    "cosine_loss bf16, 384": cosine_form("bf16", 384),
    "hidden_mse bf16, 4096": hidden_form("bf16", 4096),
    "attention_kl bf16 64/64, no mask": kl_fwd_form("bf16", 64, 64, head_tiles.NO_MASK.value),
    "attention_kl bf16 64/64, pairs": kl_fwd_form("bf16", 64, 64, head_tiles.PAIRS.value),
    "attention_kl queries' gradient bf16 64/64, pairs": kl_bwd_form(
        "bf16", 64, 64, keys=False, mask=head_tiles.PAIRS.value
    ),
    "attention_kl keys' gradient bf16 64/64, pairs": kl_bwd_form(
        "bf16", 64, 64, keys=True, mask=head_tiles.PAIRS.value
    ),
    "attention_kl bf16 128/128": kl_fwd_form("bf16", 128, 128),
    "attention_kl keys' gradient bf16 128/128": kl_bwd_form("bf16", 128, 128, keys=True),
    "attention_kl fp64 64/64": kl_fwd_form("fp64", 64, 64),
    "attention_kl keys' gradient fp64 64/64": kl_bwd_form("fp64", 64, 64, keys=True),
    "attention_mse products bf16 128/128": gram_form("bf16", 128, 128),
    "attention_mse products bf16 64/64, weights of rows": gram_form("bf16", 64, 64, weighted=True),
    "attention_mse gradient bf16 128/128": mse_grad_form("bf16", 128, 128),
    "attention_mse gradient fp64 64/64": mse_grad_form("fp64", 64, 64),
}
