"""The Markdown page of one device's results: the goals, the times, the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from records import (
    FOUR_PRODUCTS,
    LIGER_JSD,
    ORIGINAL,
    OURS,
    OUTPUT_ATTENTIONS,
    QUARTER,
    THREE_PASSES,
    TWO_PASSES,
    VOCAB,
    Record,
    case_name,
    throughput,
)

LOSS = {"divergence": "forward_kl", "ce": True, "vocab": VOCAB}
LINEAR = {"dim": 768, "ce_and_bias": True, "vocab": VOCAB}
ATTENTION = {
    "batch": 8,
    "dtype": "float32",
    "masked": False,
    "growth": False,
    "heads": 12,
    "student_dim": 32,
    "teacher_dim": 64,
}
# The resident set is not known better than this.
MEMORY_FLOOR = 1 << 20
DISTILBERT_HOURS = "90 hours on 8 V100"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure that the project set itself: ``measure(record)`` of one case must reach ``limit``."""

    what: str
    benchmark: str
    case: dict[str, Any]
    limit: float
    measure: Callable[[Record], float]  # KeyError where the rival was not measured
    at_most: bool = False


def faster_than(variant: str) -> Callable[[Record], float]:
    return lambda record: record.variants[variant]["times_fastdistil"]


def slower_than(variant: str) -> Callable[[Record], float]:
    return lambda record: 1 / record.variants[variant]["times_fastdistil"]


def less_memory_than(variant: str) -> Callable[[Record], float]:
    return lambda record: record.variants[variant]["peak_bytes"] / record.variants[OURS]["peak_bytes"]


def less_memory_beyond_gradients_than(variant: str) -> Callable[[Record], float]:
    """Of what is held beside the gradients, which everyone must return."""

    def ratio(record: Record) -> float:
        theirs, ours = (
            record.variants[name]["peak_bytes"] - record.gradient_bytes for name in (variant, OURS)
        )
        return theirs / max(ours, MEMORY_FLOOR)

    return ratio


def share_of_copy_bandwidth(record: Record) -> float:
    return 1.5 * record.variants[TWO_PASSES]["times_fastdistil"]  # three passes where the copy makes two


def against_native_products(record: Record) -> float:
    """Against the bare products in the case's own dtype, which a CPU without the instructions cannot give."""
    if "bfloat16" in record.notes:
        raise KeyError("bfloat16")
    return products(record)


products = slower_than(FOUR_PRODUCTS)


def op_goals() -> Iterator[Goal]:
    for rows, dtype in ((768, "float32"), (1024, "float32"), (1024, "bfloat16")):
        case = LOSS | {"rows": rows, "dtype": dtype}
        what = f"kd_loss, {rows} rows, {dtype}"
        eager = 10 if dtype == "float32" else 8
        yield Goal(f"{what}: eager / fastdistil", "kd_loss", case, eager, faster_than("eager"))
        yield Goal(f"{what}: torch.compile / fastdistil", "kd_loss", case, 3, faster_than("torch.compile"))
        if dtype == "float32":
            bound = slower_than(THREE_PASSES)
            yield Goal(f"{what}: fastdistil / torch.add", "kd_loss", case, 1.5, bound, at_most=True)
    case = LINEAR | {"rows": 4096, "dtype": "float32"}
    what = "linear_kd_loss, 4096 rows, D 768, float32"
    memory = less_memory_than("eager")
    yield Goal(f"{what}: extra peak memory, eager / fastdistil", "linear_kd_loss", case, 8, memory)
    yield Goal(f"{what}: fastdistil / bare products", "linear_kd_loss", case, 1.15, products, at_most=True)
    for rows in (256, 4096):
        case = LINEAR | {"rows": rows, "dtype": "bfloat16"}
        what = f"linear_kd_loss, {rows} rows, D 768, bfloat16: fastdistil / bare bfloat16 products"
        yield Goal(what, "linear_kd_loss", case, 1.3, against_native_products, at_most=True)


def attention_goals() -> Iterator[Goal]:
    for op, eager, compiled, memory in (("attention_kl", 5, 1.8, 20), ("attention_mse", 12, 5, 50)):
        case, what = ATTENTION | {"length": 512}, f"{op}, B 8, L 512"
        yield Goal(f"{what}: eager maps / fastdistil", op, case, eager, faster_than("eager"))
        yield Goal(f"{what}: compiled maps / fastdistil", op, case, compiled, faster_than("torch.compile"))
        beyond = f"{what}: extra peak memory without the gradients"
        for rival, maps in (("eager", "eager maps"), ("torch.compile", "compiled maps")):
            less = less_memory_beyond_gradients_than(rival)
            yield Goal(f"{beyond}, {maps} / fastdistil", op, case, memory, less)
        case, what = ATTENTION | {"length": 128}, f"{op}, B 8, L 128"
        yield Goal(f"{what}: compiled maps / fastdistil", op, case, 1, faster_than("torch.compile"))
    case = ATTENTION | {"batch": 2, "length": 2048, "growth": True}
    what = "attention_mse, B 2: time at L 2048 / time at L 512, linear within 20 %"
    yield Goal(what, "attention_mse", case, 4 * 1.2, slower_than(QUARTER), at_most=True)


def minilm_goals() -> Iterator[Goal]:
    for precision in ("float32", "bfloat16"):
        case = {"dim": 384, "batch": 16, "length": 128, "precision": precision, "relation_heads": 48}
        what = f"minilm training step, {precision}: tokens/s, fastdistil / output_attentions and maps"
        rival = faster_than(OUTPUT_ATTENTIONS)
        yield Goal(what, "train_minilm", case | {"vocab": VOCAB}, 1.5, rival)


def task_goals() -> Iterator[Goal]:
    for kind in ("kd", "pkd", "tinybert"):
        for precision in ("float32", "bfloat16"):
            case = {"kind": kind, "dim": 384, "precision": precision, "steps": 6, "batch": 32, "length": 128}
            what = f"{kind} on SST-2, {precision}: original steps, padded to 128 / fastdistil"
            yield Goal(what, "train_task", case | {"vocab": VOCAB}, 2, faster_than(ORIGINAL))


def training_goals() -> Iterator[Goal]:
    for precision, masked, everywhere in (("float32", 5, 2.3), ("bfloat16", 9, 5)):
        case = {"dim": 384, "batch": 16, "length": 128, "precision": precision, "vocab": VOCAB}
        what = f"training step, {precision}: tokens/s"
        masked_case, all_case = case | {"positions": "masked"}, case | {"positions": "all"}
        yield Goal(f"{what}, masked KD / original step", "train", masked_case, masked, faster_than(ORIGINAL))
        yield Goal(
            f"{what}, KD on all tokens / original step", "train", all_case, everywhere, faster_than(ORIGINAL)
        )


def gpu_goals() -> Iterator[Goal]:
    case = LOSS | {"rows": 4915, "dtype": "bfloat16"}
    what = "kd_loss, 4915 rows, bfloat16"
    share = f"{what}: share of the three-pass bound at copy bandwidth"
    yield Goal(share, "kd_loss", case, 0.85, share_of_copy_bandwidth)
    for rival in ("torch.compile", "Liger"):
        yield Goal(f"{what}: {rival} / fastdistil", "kd_loss", case, 1, faster_than(rival))
    case = LINEAR | {"rows": 4915, "dtype": "bfloat16"}
    what = "linear_kd_loss, 4915 rows, D 768, bfloat16"
    yield Goal(f"{what}: fastdistil / bare products", "linear_kd_loss", case, 1.15, products, at_most=True)
    for rival in (LIGER_JSD, "TRL"):
        kl_only = case | {"ce_and_bias": False}
        yield Goal(
            f"{what}, KL alone: {rival} / fastdistil", "linear_kd_loss", kl_only, 1, faster_than(rival)
        )


def cpu_goals() -> Iterator[Goal]:
    yield from op_goals()
    yield from attention_goals()
    yield from training_goals()
    yield from minilm_goals()
    yield from task_goals()


def goals_table(records: Sequence[Record]) -> list[str]:
    lines = ["| what | goal | measured | |", "|---|---|---|---|"]
    on_gpu = records[0].environment["kind"] == "cuda"
    for goal in gpu_goals() if on_gpu else cpu_goals():
        sign = "at most" if goal.at_most else "at least"
        measured, verdict = "not measured here", ""
        for record in records:
            if record.benchmark == goal.benchmark and record.case == goal.case:
                try:
                    value = goal.measure(record)
                except (KeyError, TypeError):
                    break
                met = value <= goal.limit if goal.at_most else value >= goal.limit
                measured, verdict = f"{value:.2f}x", "met" if met else "**missed**"
        lines.append(f"| {goal.what} | {sign} {goal.limit:g}x | {measured} | {verdict} |")
    return lines


def milliseconds(seconds: float) -> str:
    """Three digits, or all before the point."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def times_table(records: Sequence[Record]) -> list[str]:
    """fastdistil's median (20 % to 80 % quantile) and throughput; the others' median, and as multiples."""
    names = list(dict.fromkeys(name for record in records for name in record.variants if name != OURS))
    lines = [f"| case | {OURS} | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for record in records:
        cells = []
        for name in [OURS, *names]:
            one = record.variants.get(name)
            if one is None:
                cells.append("")
                continue
            p20, p50, p80 = (milliseconds(one[key]) for key in ("p20", "p50", "p80"))
            extra = throughput(record, one["p50"]) if name == OURS else f"{one['times_fastdistil']:.2f}x"
            cells.append(f"**{p50} ms** ({p20} to {p80}), {extra}" if name == OURS else f"{p50} ms, {extra}")
        lines.append(f"| {case_name(record)} | " + " | ".join(cells) + " |")
    return lines


def memory_table(records: Sequence[Record]) -> list[str]:
    """Extra peak memory in MiB, beyond the inputs, gradients included; and the gradients' own."""
    measured = [record for record in records if record.variants[OURS]["peak_bytes"] is not None]
    if not measured:
        return []
    names = [name for name in dict.fromkeys(n for r in measured for n in r.variants) if name != OURS]
    names = [n for n in names if any(r.variants.get(n, {}).get("peak_bytes") is not None for r in measured)]
    titles = [OURS, *names]
    if any(record.gradient_bytes for record in measured):
        titles.append("the gradients alone")
    lines = ["", "Extra peak memory, MiB (gradients included):", ""]
    lines += ["| case | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for record in measured:
        peaks = [record.variants.get(name, {}).get("peak_bytes") for name in [OURS, *names]]
        if len(titles) > len(peaks):
            peaks.append(record.gradient_bytes)
        cells = ["" if peak is None else f"{peak / 2**20:,.0f}" for peak in peaks]
        lines.append(f"| {case_name(record)} | " + " | ".join(cells) + " |")
    return lines


def gradient_gaps(records: Sequence[Record]) -> list[str]:
    """How far the rivals' gradients are from fastdistil's, the worst case of each rival and dtype."""
    worst: dict[tuple[str, str], float] = {}
    for record in records:
        for name, one in record.variants.items():
            if one["gradient_difference"] is not None:
                key = name, record.case["dtype"]
                worst[key] = max(worst.get(key, 0.0), one["gradient_difference"])
    if not worst:
        return []
    parts = ", ".join(f"{name} in {dtype} {gap:.1e}" for (name, dtype), gap in worst.items())
    return [f"Largest relative L2 distance of a gradient from fastdistil's: {parts}."]


def matrix_share(records: Sequence[Record]) -> list[str]:
    """What share of the GPU's matrix rate the ops reach."""
    lines = []
    for record in records:
        if "matrix_flops_per_second" in record.notes and record.flops and not record.tokens:
            rate = record.flops / record.variants[OURS]["p50"]
            share = rate / record.notes["matrix_flops_per_second"]
            lines.append(
                f"- {case_name(record)}: {rate / 1e12:,.1f} TFLOP/s of the products that cannot be avoided, "
                f"{share:.0%} of the rate of a large bfloat16 product."
            )
    return lines


def padding(records: Sequence[Record]) -> list[str]:
    """How many tokens a step of a task has with each way to batch its examples."""
    lines = []
    for record in records:
        for name, mean in record.notes.get("tokens_a_step_of_the_epoch", {}).items():
            tokens = record.notes["tokens_a_step"][name]
            lines.append(
                f"- {name}: {tokens:,} tokens a step of {record.case['batch']} examples, padding included "
                f"({mean:,} over the whole epoch); {record.notes['text']}."
            )
    return list(dict.fromkeys(lines))  # the same for all kinds of distillation


def paper_run(records: Sequence[Record]) -> list[str]:
    """What the GPU steps mean: share of the matrix rate, and hours of DistilBERT's pretraining."""
    lines = []
    for record in records:
        if "paper_tokens" in record.notes and record.flops and record.tokens:
            seconds = record.variants[OURS]["p50"]
            share = record.flops / seconds / record.notes["matrix_flops_per_second"]
            hours = record.notes["paper_tokens"] / (record.tokens / seconds) / 3600
            lines.append(
                f"- {case_name(record)}: {record.tokens / seconds:,.0f} tokens/s, {share:.0%} of the rate of "
                f"a large bfloat16 product; DistilBERT's three epochs would take {hours:.1f} hours "
                f"(the paper: about {DISTILBERT_HOURS})."
            )
    if lines:
        lines.append(
            "\nThe hours assume 3 x 3.3 billion words (English Wikipedia and Toronto Book Corpus) of 1.3 "
            "WordPieces, every sequence full, and input that keeps up."
        )
    return lines


def page(records: Sequence[Record]) -> str:
    last = max(records, key=lambda record: record.environment["date"]).environment
    commits = ", ".join(dict.fromkeys(record.environment["commit"] for record in records))
    implementations = ", ".join(dict.fromkeys(record.environment["implementation"] for record in records))
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    threads = f"{last['threads']} threads, " if last["kind"] == "cpu" else ""
    attention = any(record.benchmark.startswith("attention") for record in records)
    attention_picture = ["![attention losses](attention.png)", ""] if attention else []
    lines = [
        f"# {last['device']}",
        "",
        "Made by `plot.py` from `results.jsonl`; the newest measurement of each case.",
        "",
        f"{threads}{implementations}; {versions}. Measured until {last['date']} at commit {commits} "
        "(+: with changes beside it).",
        "",
        "![picture](speed.png)",
        "",
        *attention_picture,
        "## Against the goals",
        "",
        *goals_table(records),
    ]
    for benchmark in dict.fromkeys(record.benchmark for record in records):
        chosen = [record for record in records if record.benchmark == benchmark]
        lines += ["", f"## {benchmark}", ""]
        work = "One optimiser step" if benchmark.startswith("train") else "Forward and backward"
        if benchmark == "train_task":
            work = "A case's optimiser steps, which stand for an epoch on SST-2"
        lines += [f"{work}, median (20 % to 80 %); the others: median, and times fastdistil's."]
        lines += ["", *times_table(chosen), *memory_table(chosen)]
        if extra := [*matrix_share(chosen), *paper_run(chosen), *padding(chosen)]:
            lines += ["", *extra]
        if gaps := gradient_gaps(chosen):
            lines += ["", *gaps]
        skipped = {f"{name}: {why}" for record in chosen for name, why in record.skipped.items()}
        notes = {
            f"{key}: {value}" for record in chosen for key, value in record.notes.items() if key == "bfloat16"
        }
        if skipped or notes:
            lines += ["", *(f"- not measured: {line}" for line in sorted(skipped))]
            lines += [f"- {line}" for line in sorted(notes)]
    return "\n".join(lines) + "\n"
