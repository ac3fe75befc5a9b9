"""Scores of models whose answers are known, against the metrics' formulas written out."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastdistil.data.task_encoding import EncodedTask, encode
from fastdistil.data.tasks import Examples, find_task
from fastdistil.errors import UserError
from fastdistil.evaluate.task import (
    _scores,
    best_spans,
    chance_score,
    check_teacher,
    evaluate_task,
    mean_score,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = 40


@pytest.fixture(scope="module")
def tokenizer():
    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, SPECIAL, strict=True)))


def texts(columns: int, n: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Texts of 1 to 20 words; the first word of the first one is the example's number."""
    random = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(f"w{i}" for i in random.integers(0, WORDS, random.integers(1, 21)))

    return [(f"w{i} {text()}", *(text() for _ in range(columns - 1))) for i in range(n)]


class Fixed(nn.Module):
    """Gives example i, which begins with word i, the i-th logits."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.from_numpy(logits).float())
        self.modes: list[tuple[bool, bool, bool]] = []

    device = torch.device("cpu")

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, attention_mask):
        state = (self.training, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        self.modes.append(state)
        return SimpleNamespace(logits=self.table[input_ids[:, 1] - len(SPECIAL)])


def scored(task_name: str, tokenizer, logits: np.ndarray, labels: np.ndarray, **more) -> dict[str, float]:
    task = find_task(task_name)
    examples = Examples(texts(len(task.columns), len(labels)), labels)
    return evaluate_task(Fixed(logits), task, encode(task, examples, tokenizer, 64), max_tokens=200, **more)


LABELS = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1])
ANSWERS = np.array([1, 1, 0, 1, 0, 1, 1, 0, 1, 0])
# Counted by hand: 4 true and 2 false positives, 2 false and 2 true negatives.
TP, FP, FN, TN = 4, 2, 2, 2


def test_accuracy_and_f1_of_the_positive_class(tokenizer):
    scores = scored("mrpc", tokenizer, np.eye(2)[ANSWERS], LABELS)
    assert set(scores) == {"accuracy", "f1"}
    assert scores["accuracy"] == pytest.approx((TP + TN) / 10)
    assert scores["f1"] == pytest.approx(2 * TP / (2 * TP + FP + FN))
    assert mean_score(find_task("mrpc"), scores) == pytest.approx((scores["accuracy"] + scores["f1"]) / 2)


def test_matthews_correlation(tokenizer):
    scores = scored("cola", tokenizer, np.eye(2)[ANSWERS], LABELS)
    expected = (TP * TN - FP * FN) / math.sqrt((TP + FP) * (TP + FN) * (TN + FP) * (TN + FN))
    assert scores == {"matthews": pytest.approx(expected)}


def test_accuracy_over_three_classes(tokenizer):
    labels, answers = np.array([0, 1, 2, 2, 1]), np.array([0, 2, 2, 1, 1])
    assert scored("mnli", tokenizer, np.eye(3)[answers], labels) == {"accuracy": pytest.approx(3 / 5)}


def average_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


def test_correlations_with_ties(tokenizer):
    random = np.random.default_rng(0)
    labels = random.integers(0, 6, 30).astype(np.float32)
    answers = np.round(labels.astype(np.float64) + random.normal(0, 2, 30), 1)
    scores = scored("stsb", tokenizer, answers[:, None], labels)
    answers = answers.astype(np.float32).astype(np.float64)
    assert scores["pearson"] == pytest.approx(pearson(answers, labels.astype(np.float64)), abs=1e-6)
    expected = pearson(average_ranks(answers), average_ranks(labels))
    assert scores["spearman"] == pytest.approx(expected, abs=1e-6)
    assert 0.3 < scores["spearman"] < 0.95


@pytest.mark.filterwarnings("error")
def test_answers_that_are_all_the_same_correlate_with_nothing(tokenizer):
    labels = np.linspace(0, 5, 10, dtype=np.float32)
    assert scored("stsb", tokenizer, np.full((10, 1), 2.5), labels) == {"pearson": 0.0, "spearman": 0.0}
    assert scored("cola", tokenizer, np.eye(2)[np.ones(10, int)], LABELS) == {"matthews": 0.0}


def test_chance_is_the_score_of_the_most_frequent_class():
    labels = np.array([1, 1, 1, 0])
    assert chance_score(find_task("sst2"), labels) == pytest.approx(3 / 4)
    assert chance_score(find_task("mrpc"), labels) == pytest.approx((3 / 4 + 6 / 7) / 2)
    assert chance_score(find_task("qqp"), 1 - labels) == pytest.approx((3 / 4 + 2 / 5) / 2)
    assert chance_score(find_task("cola"), labels) == 0
    assert chance_score(find_task("stsb"), np.array([1.0, 2.0])) == 0
    assert chance_score(find_task("squad"), np.array([[1, 2]])) == 0
    assert chance_score(find_task("dream"), np.array([0, 0])) == pytest.approx(1 / 3)


def config(kind: type = BertConfig, **more):
    if kind is DistilBertConfig:
        return kind(
            vocab_size=WORDS + 5, dim=16, n_layers=1, n_heads=2, hidden_dim=16, initializer_range=0.5, **more
        )
    return kind(
        vocab_size=WORDS + 5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        **more,
    )


def alone(model, data: EncodedTask, sequence: int) -> dict[str, torch.Tensor]:
    """One sequence without padding."""
    part = slice(*data.offsets[sequence : sequence + 2])
    inputs = {"input_ids": torch.from_numpy(data.input_ids[part].astype(np.int64))[None]}
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = torch.from_numpy(data.token_type_ids[part].astype(np.int64))[None]
    return inputs


@pytest.mark.parametrize("head", [BertForSequenceClassification, DistilBertForSequenceClassification])
def test_a_models_score_is_that_of_its_answers_one_by_one(tokenizer, head):
    torch.manual_seed(0)
    model = head(config(head.config_class)).eval()
    task = find_task("mrpc")
    data = encode(task, Examples(texts(2, 30), np.arange(30) % 2), tokenizer, 64)
    with torch.no_grad():
        logits = torch.cat([model(**alone(model, data, i)).logits for i in range(30)])
        # Half of the answers are to be 1.
        shift = (logits[:, 0] - logits[:, 1]).sort().values[14:16].mean()
        model.classifier.bias[1] += shift
    answers = (logits[:, 1] + shift > logits[:, 0]).long().tolist()
    assert sum(answers) == 15
    scores = evaluate_task(model, task, data, max_tokens=150)
    assert scores["accuracy"] == pytest.approx(np.mean(np.array(answers) == data.labels))


def test_the_budget_does_not_change_the_score(tokenizer):
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(num_labels=1)).eval()
    task, labels = find_task("stsb"), np.linspace(0, 5, 30, dtype=np.float32)
    data = encode(task, Examples(texts(2, 30), labels), tokenizer, 64)
    one, other = (evaluate_task(model, task, data, max_tokens=m) for m in (1, 10_000))
    assert one == pytest.approx(other, abs=1e-5)


def test_choices_are_scored_by_their_most_probable_option(tokenizer):
    torch.manual_seed(0)
    model = BertForMultipleChoice(config()).eval()
    data = encode(find_task("dream"), Examples(texts(5, 20), np.arange(20) % 3), tokenizer, 96)
    with torch.no_grad():
        scores = [
            model(**{name: value[None] for name, value in alone(model, data, i).items()}).logits.item()
            for i in range(60)
        ]
    answers = np.array(scores).reshape(20, 3).argmax(axis=1)
    assert len(set(answers)) == 3
    expected = pytest.approx(np.mean(answers == data.labels))
    assert evaluate_task(model, find_task("dream"), data, max_tokens=500) == {"accuracy": expected}


def test_the_model_reads_in_eval_and_inference_mode_and_is_put_back(tokenizer):
    task = find_task("sst2")
    data = encode(task, Examples(texts(1, 4), np.array([0, 1, 0, 1])), tokenizer, 64)
    model = Fixed(np.eye(2)[[0, 1, 1, 1]]).train()
    evaluate_task(model, task, data)
    evaluate_task(model, task, data, dtype=torch.bfloat16)
    assert model.modes == [(False, True, False), (False, True, True)]
    assert model.training
    assert model.table.grad is None
    assert not torch.is_inference_mode_enabled()

    model.table.data = torch.empty(0, 2)  # no logits for any example
    with pytest.raises(IndexError):
        evaluate_task(model, task, data)
    assert model.training


def test_best_spans_are_those_of_all_pairs():
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(6, 2, 50)))
    inside = torch.zeros(6, 50, dtype=torch.bool)
    for row, (begin, end) in enumerate([(0, 50), (10, 45), (3, 4), (5, 5), (1, 40), (20, 50)]):
        inside[row, begin:end] = True
    scores, first, last = best_spans(logits, inside)
    for row in range(6):
        places = inside[row].nonzero().flatten().tolist()
        pairs = {
            (i, j): (logits[row, 0, i] + logits[row, 1, j]).item()
            for i in places
            for j in places
            if i <= j < i + 30
        }
        if not pairs:
            assert scores[row] == -torch.inf
            continue
        best = max(pairs, key=pairs.__getitem__)
        assert (first[row].item(), last[row].item()) == best
        assert scores[row].item() == pairs[best]


def test_a_span_is_at_most_thirty_tokens_long():
    logits = torch.zeros(1, 2, 64)
    logits[0, 0, 5], logits[0, 1, 34], logits[0, 1, 35] = 9.0, 4.0, 9.0
    _, first, last = best_spans(logits, torch.ones(1, 64, dtype=torch.bool))
    assert (first.item(), last.item()) == (5, 34)


class Reader(nn.Module):
    """Takes "w0 w1" for the answer wherever it stands and, less surely, "w2"."""

    device = torch.device("cpu")

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, attention_mask):
        first, last, less_sure = (input_ids == len(SPECIAL) + word for word in range(3))
        return SimpleNamespace(start_logits=first + 0.5 * less_sure, end_logits=last + 0.5 * less_sure)


def test_span_scores_are_those_of_the_best_window(tokenizer):
    filler = " ".join(f"w{i}" for i in np.random.default_rng(0).integers(5, WORDS, 90))
    rows = [
        (f"w2 {filler} w0 w1", ("w0 w1",)),  # "w2" is in another window
        (f"w0 w1 {filler}", ("W0, the w1!", "w9")),  # equal once normalised
        (f"{filler} w0 w1 w3", ("w1 w3", "w7")),  # one word of two
        (f"w2 {filler}", ("w8",)),  # wrong
        (f"{filler} w0 w1", ("w8", "w0 w1 w0 w1")),  # the better of the two answers
    ]
    examples = Examples(
        [("w30 w31", context) for context, _ in rows], np.zeros((5, 2), int), [answers for _, answers in rows]
    )
    task = find_task("squad")
    data = encode(task, examples, tokenizer, 40)
    assert len(data) > 15
    scores = evaluate_task(Reader(), task, data, max_tokens=100)
    assert scores["exact_match"] == pytest.approx(2 / 5)
    # F1 of the words: 1, 1, 1/2, 0, and precision 1 with recall 1/2.
    assert scores["f1"] == pytest.approx((1 + 1 + 1 / 2 + 0 + 2 / 3) / 5)
    assert mean_score(task, scores) == pytest.approx((scores["exact_match"] + scores["f1"]) / 2)


def test_a_question_answering_model_is_read_through_its_heads(tokenizer):
    torch.manual_seed(0)
    model = BertForQuestionAnswering(config()).eval()
    examples = Examples(texts(2, 12), np.zeros((12, 2), int), [(f"w{i}",) for i in range(12)])
    task = find_task("squad")
    data = encode(task, examples, tokenizer, 64)
    answers = []
    for i, (_, context) in enumerate(examples.texts):
        with torch.no_grad():
            output = model(**alone(model, data, i))
        characters = torch.from_numpy(data.windows.characters[slice(*data.offsets[i : i + 2])])
        logits = torch.stack([output.start_logits, output.end_logits], dim=1)
        _, (start,), (end,) = best_spans(logits, characters[None, :, 0] >= 0)
        answers.append((context[characters[start, 0] : characters[end, 1]],))
    data = encode(task, Examples(examples.texts, examples.labels, answers), tokenizer, 64)
    assert evaluate_task(model, task, data, max_tokens=100) == {"exact_match": 1.0, "f1": 1.0}


def test_macro_f1_is_the_mean_over_the_classes_that_are_there():
    task = replace(find_task("mnli"), metrics=("macro_f1",))
    labels, answers = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    first, second = 2 * 1 / (2 * 1 + 1 + 1), 2 * 2 / (2 * 2 + 1 + 1)
    assert _scores(task, answers, labels)["macro_f1"] == pytest.approx((first + second) / 2)
    # Of the third class there is an answer, and it is wrong.
    answers = np.array([0, 2, 1, 1, 1])
    assert _scores(task, answers, labels)["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert chance_score(task, labels) == pytest.approx((0 + 2 * 3 / (2 * 3 + 2)) / 2)


def test_matthews_of_three_classes_is_gorodkins_r_k():
    task = replace(find_task("mnli"), metrics=("matthews",))
    random = np.random.default_rng(0)
    labels, answers = random.integers(0, 3, 200), random.integers(0, 3, 200)
    x, y = (np.eye(3)[numbers] - np.eye(3)[numbers].mean(0) for numbers in (answers, labels))
    r_k = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert _scores(task, answers, labels)["matthews"] == pytest.approx(r_k, abs=1e-6)


def ignore(text: str) -> None: ...


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("sst2", [0, 1, 0, 1]),  # 1/2 + 4^-1/2
        ("sst2", [0] * 9 + [1]),  # 0.9 + 10^-1/2
        ("sst2", [1] * 100),  # of one class
        ("stsb", [2.0]),
    ],
)
def test_where_even_a_perfect_score_could_not_pass_the_examples_are_too_few(task, labels):
    found = find_task(task)
    perfect = dict.fromkeys(found.metrics, 1.0)
    few = (
        f"^{len(labels)} validation examples of {task} are too few to tell whether teacher t is above chance"
    )
    with pytest.raises(UserError, match=few):
        check_teacher("t", found, perfect, np.array(labels), ignore, allow_weak=False)
    check_teacher("t", found, perfect, np.array(labels), ignore, allow_weak=True)


def test_a_teacher_must_be_above_chance_by_what_the_examples_can_tell():
    task, labels = find_task("sst2"), np.array([0, 1] * 8)
    for weak in (0.75, math.nan):
        with pytest.raises(UserError, match=r"and chance is 0\.5000: there is nothing to learn from it"):
            check_teacher("t", task, {"accuracy": weak}, labels, ignore, allow_weak=False)
    check_teacher("t", task, {"accuracy": 0.7501}, labels, ignore, allow_weak=False)
