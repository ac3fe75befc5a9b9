"""What `fastdistil evaluate` tells, against the same model run by `transformers`, one example at a time."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

from fastdistil.data.sentence_pairs import build_pair_store
from fastdistil.data.tasks import find_task
from fastdistil.errors import UserError
from fastdistil.evaluate import Latency, summary
from fastdistil.evaluate.summary import TaskQuality, summarize, summarize_task
from fastdistil.models.bilstm import make_bilstm

pytest.importorskip("torchmetrics")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *(f"w{i}" for i in range(40))]


@pytest.fixture(autouse=True)
def free_of_cost(monkeypatch):
    """Time and memory have their own tests."""
    latencies = [Latency(b, 16, 1, 1.0, 2.0, 30) for b in (1, 8)]
    monkeypatch.setattr(summary, "measure_latency", lambda models, length: dict.fromkeys(models, latencies))
    monkeypatch.setattr(summary, "measure_peak_memory", lambda folder, **shape: 5_000_000)


@pytest.fixture
def save(tmp_path):
    def write(model) -> str:
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture
def bert():
    def make(head: str, positions: int = 16, **more):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=positions,
            initializer_range=0.5,
            **more,
        )
        return getattr(transformers, f"BertFor{head}" if head else "BertModel")(config).eval()

    return make


def sentence(start: int, length: int) -> str:
    return " ".join(f"w{(start + 3 * i) % 40}" for i in range(length))


# Of 4 to 20 tokens with the special ones.
PAIRS = [(sentence(i, 1 + i % 9), sentence(7 * i, 2 + i % 8), int(i % 3 == 0)) for i in range(30)]


@pytest.fixture
def mrpc(tmp_path) -> str:
    folder = tmp_path / "data" / "glue" / "mrpc"
    folder.mkdir(parents=True)
    rows = [{"sentence1": a, "sentence2": b, "label": label} for a, b, label in PAIRS]
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data")


def test_a_task_is_scored_as_transformers_would(bert, save, mrpc):
    model = bert("SequenceClassification")
    folder = save(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers, cut = [], 0
    for a, b, _ in PAIRS:
        inputs = tokenizer(a, b, truncation="longest_first", max_length=16, return_tensors="pt")
        cut += len(tokenizer(a, b)["input_ids"]) > 16
        with torch.no_grad():
            answers.append(model(**inputs).logits.argmax().item())
    labels = [label for _, _, label in PAIRS]
    both = sum(given == right == 1 for given, right in zip(answers, labels, strict=True))
    accuracy = sum(given == right for given, right in zip(answers, labels, strict=True)) / 30
    f1 = 2 * both / (sum(answers) + sum(labels))

    found = summarize_task(folder, "mrpc", mrpc)
    assert found.quality == TaskQuality(
        task=find_task("mrpc"),
        split="validation",
        scores=pytest.approx({"accuracy": accuracy, "f1": f1}),
        mean=pytest.approx((accuracy + f1) / 2),
        # Always "not equivalent" is right two thirds of the time, always "equivalent" has an F1 of a half.
        chance=pytest.approx((2 / 3 + 1 / 2) / 2),
        examples=30,
        left_out=0,
        texts=30,
        truncated=cut,
        max_length=16,
    )
    assert 0 < cut < 30
    rows = dict(found.rows())
    assert rows["model"] == folder
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
    assert rows["task"] == "mrpc, 30 examples of split validation"
    assert rows["truncated"] == f"{cut} of 30 texts, to 16 tokens"
    assert (rows["accuracy"], rows["F1"]) == (f"{accuracy:.2%}", f"{f1:.2%}")
    assert (rows["mean"], rows["chance"]) == (f"{(accuracy + f1) / 2:.2%}", "58.33%")
    assert rows["latency, cpu"] == "p50 1.00 ms, p95 2.00 ms at 8 × 16 tokens, 1 threads"
    assert rows["peak memory, cpu"] == "5.0 MB at 8 × 16 tokens"


def test_a_bilstm_is_scored_like_any_other(bert, save, mrpc):
    student = make_bilstm(bert("SequenceClassification"), pairs=True, hidden_size=4, fc_size=4)
    quality = summarize_task(save(student), "mrpc", mrpc).quality
    assert quality.examples == 30
    assert 0 < quality.scores["accuracy"] < 1


@pytest.fixture
def squad(tmp_path) -> str:
    folder = tmp_path / "data" / "squad"
    folder.mkdir(parents=True)
    context = sentence(0, 50)
    rows = [
        {"question": sentence(i, 70), "context": context, "answer_text": "w3 w6", "answer_start": 3}
        for i in range(2)
    ]
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data")


@pytest.mark.parametrize(
    ("positions", "max_length", "used"),
    [(400, None, 384), (64, None, 64), (400, 100, 100)],
    ids=["as in BERT's code", "what the model can read", "what the user says"],
)
def test_the_windows_of_a_span_task_are_longer(bert, save, squad, positions, max_length, used):
    folder = save(bert("QuestionAnswering", positions))
    quality = summarize_task(folder, "squad", squad, max_length=max_length).quality
    assert quality.max_length == used
    assert list(quality.scores) == ["exact_match", "f1"]
    # Questions have 64 tokens, or half of the room that the special ones leave.
    rows = dict(quality.rows())
    assert rows["truncated"] == f"2 of 2 questions; contexts are read in windows of {used} tokens"
    assert rows["chance"] == "0.00%"


def test_a_mean_is_told_only_of_several_metrics():
    counts = {"examples": 1500, "left_out": 3, "texts": 1500, "truncated": 0}
    shared = {"split": "dev", "chance": 0.0, "max_length": 128, **counts}
    stsb = TaskQuality(find_task("stsb"), scores={"pearson": 0.5, "spearman": 0.25}, mean=0.375, **shared)
    rows = dict(stsb.rows())
    assert rows["task"] == "stsb, 1,500 examples of split dev, 3 incomplete ones left out"
    assert (rows["pearson"], rows["spearman"], rows["mean"]) == ("50.00%", "25.00%", "37.50%")
    cola = TaskQuality(find_task("cola"), scores={"matthews": 0.5}, mean=0.5, **shared)
    assert "mean" not in dict(cola.rows())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "mrcp"}, "unknown task 'mrcp'; did you mean 'mrpc'"),
        ({"split": "test"}, "no file of split 'test'; those there are validation"),
        ({"task": "sst2"}, "no column 'sentence'"),
        ({"data": "nowhere"}, "nowhere: there is no such folder"),
        ({"max_length": 17}, "max_length is 17, but .* has only 16 positions"),
    ],
)
def test_what_does_not_fit_is_one_line(bert, save, mrpc, arguments, message):
    data = str(Path(mrpc) / "glue" / "mrpc")
    folder = save(bert("SequenceClassification"))
    with pytest.raises(UserError, match=message) as caught:
        summarize_task(folder, **{"task": "mrpc", "data": data, **arguments})
    assert "\n" not in str(caught.value)


def test_a_model_without_the_tasks_head_is_told_the_command_that_trains_it(bert, save, mrpc):
    folder = save(bert("MaskedLM"))
    with pytest.raises(UserError, match=f"fastdistil train finetune --teacher {folder} --task mrpc"):
        summarize_task(folder, "mrpc", mrpc)


def test_a_store_of_pairs_also_scores_the_next_sentence(bert, save, tmp_path):
    model = bert("PreTraining")
    folder = save(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    documents = ["\n".join(sentence(i + 5 * j, 3) for j in range(5)) for i in range(20)]
    store = build_pair_store(documents, tokenizer, tmp_path / "pairs", 16, seed=0)
    found = summarize(folder, str(tmp_path / "pairs"), max_length=16)
    accuracy = found.quality.score.next_sentence_accuracy
    assert 0 < accuracy < 1
    assert found.quality.sequences == len(store)
    rows = dict(found.rows())
    assert rows["next-sentence accuracy"] == f"{accuracy:.2%}"
    assert rows["perplexity"] == f"{math.exp(found.quality.score.loss):.2f}"


@pytest.mark.parametrize("kind", ["MaskedLM", "SequenceClassification", ""])
def test_without_text_and_task_only_cost_is_told(bert, save, kind):
    rows = summarize(save(bert(kind)), None).rows()
    assert ("quality", "not measured: give --corpus or --task") in rows
    labels = [label for label, _ in rows]
    assert ("latency, cpu", "peak memory, cpu") in list(pairwise(labels))
