"""A comparison with every class of method, a failure, and gaps. Its numbers are invented."""

import pytest

from fastdistil.compare.results import Comparison, Row, Timing

# method, class, million parameters, MB, ms at batch 1 on one thread, a score a seed, peak MB, mJ
MEASURED = [
    ("teacher", "teacher", 109.5, 438, 48.2, [0.9243], 702, 1310),
    ("distilbert", "distillation", 67.0, 268, 24.3, [0.9013, 0.9048, 0.9002], 431, 660),
    ("pkd", "distillation", 45.1, 181, 12.4, [0.8956, 0.8899, 0.8945], 300, 350),
    ("tinybert-task", "distillation", 14.4, 57, 5.31, [0.8761, 0.8830, 0.8807], 120, 140),
    ("bilstm", "distillation", 10.4, 42, 4.12, [0.8417, 0.8475, 0.8394], 96, 110),
    ("prune-magnitude:0.6", "pruning", 109.5, 201, 47.9, [0.9197, 0.9185, 0.9220], 702, 1300),
    ("prune-movement:0.8", "pruning", 109.5, 122, 48.6, [0.9071, 0.9094, 0.9060], 702, 1320),
    ("prune-2of4", "pruning", 109.5, 249, 48.0, [0.9128, 0.9140, 0.9094], 702, 1310),
    ("prune-layers:6", "pruning", 67.0, 268, 24.5, [0.8922, 0.8956, 0.8899], 431, 670),
    ("int8", "quantisation", 109.5, 111, 13.1, [0.9209], 260, 370),
    ("int8-static", "quantisation", 109.5, 111, 11.9, [0.5092], 255, 340),
    ("bf16", "quantisation", 109.5, 219, 18.3, [0.9243], 380, 500),
    ("low-rank:0.5", "low rank", 71.4, 286, 31.0, [0.9025, 0.9002, 0.9060], 470, 850),
    ("share-layers:3", "sharing", 45.7, 183, 48.1, [0.8693, 0.8750, 0.8704], 290, 1310),
    ("cluster:4", "clustering", 109.5, 61, 48.3, [0.9140], 705, 1300),
    ("onnx", "runtime", 109.5, 438, 30.4, [0.9243], 690, 800),
    ("prune-heads:0.5+prune-ffn:0.5", "chain", 66.9, 267, 25.9, [0.9048, 0.9083, 0.9037], 430, 700),
    ("pkd+int8", "chain", 45.1, 46, 3.42, [0.8922, 0.8888, 0.8945], 130, 95),
    (
        "distilbert+prune-heads:0.5+prune-ffn:0.5+int8",
        "chain",
        43.7,
        44,
        5.02,
        [0.8991, 0.8979, 0.9002],
        128,
        0,
    ),
    ("tinybert-task+factorize-embeddings:64+int8", "chain", 6.9, 8, 1.71, [0.8670, 0.8704, 0.8658], 61, 50),
]
FAILED = "prune-width: 0.99 of a width of 768 leaves 8, fewer than its 12 heads need | choose at most 0.96"
DESCRIPTIONS = {
    "teacher": "The fine-tuned model itself, float32 in eager PyTorch.",
    "distilbert": "Half the layers, trained on the teacher's logits and the direction of its hidden states.",
    "int8": "Dynamic int8 by the fastest backend of this machine, onnxruntime.",
    "distilbert+prune-heads:0.5+prune-ffn:0.5+int8": "Half the layers, then half the heads and FFN of what "
    "is left, then int8; each step but the last recovers by distillation from the teacher.",
}


def row(method, kind, parameters, size, latency, scores, peak, energy) -> Row:
    """The latencies of the other batch size and of two threads follow from the first; 0 mJ is unknown."""
    cases = [(1, 1, 1), (8, 1, 7.6), (1, 2, 0.58), (8, 2, 4.1)]
    return Row(
        method=method,
        kind=kind,
        command=command(method),
        folder=f"models/{method}",
        description=DESCRIPTIONS.get(method, ""),
        parameters=round(1e6 * parameters),
        disk_bytes=1_000_000 * size,
        scores=[{"accuracy": score} for score in scores],
        timings=[
            Timing(batch_size, 128, threads, round(f * latency, 3), round(1.06 * f * latency, 3))
            for batch_size, threads, f in cases
        ],
        sequences_per_second=round(8000 / (4.1 * latency), 1),
        peak_bytes=1_000_000 * peak,
        joules=energy / 1000 or None,
        seconds=None if kind == "teacher" else 412.0,
    )


def command(method: str) -> str:
    return f"fastdistil compress models/bert-base-sst2 --method {method} --task sst2 --output models/{method}"


@pytest.fixture(scope="session")
def comparison() -> Comparison:
    failed = Row("prune-width:0.99", "pruning", command("prune-width:0.99"), error=FAILED)
    return Comparison(
        task="sst2",
        teacher="models/bert-base-sst2",
        metrics=["accuracy"],
        held_out="Accuracy on the 872 sentences of SST-2's validation set.",
        machine={
            "processor": "Example 8480 @ 2.0 GHz",
            "cores": "2",
            "torch": "2.13.0",
            "onnxruntime": "1.32.0",
            "date": "2026-11-25",
        },
        seeds=[1, 2, 3],
        rows=[*(row(*numbers) for numbers in MEASURED), failed],
        notes=["share-layers shares weights: the file is smaller, the time is the teacher's."],
    )


@pytest.fixture(scope="session")
def bare() -> Comparison:
    """The teacher, measured a little, and one method, which failed."""
    return Comparison(
        task="mrpc",
        teacher="t",
        metrics=["accuracy", "f1"],
        held_out="MRPC's validation set.",
        machine={},
        seeds=[1],
        rows=[
            Row("teacher", "teacher", "fastdistil evaluate t", scores=[{"accuracy": 0.8, "f1": 0.9}]),
            Row("int8", "quantisation", "fastdistil compress t --method int8", error="no backend"),
        ],
    )
