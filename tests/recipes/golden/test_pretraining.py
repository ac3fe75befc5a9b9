"""Golden values of the recipes on text that predict tokens or relate states: bert, distilbert, minilm."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from fastdistil.recipes import load_recipe

# (sequence, position) -> label of the masked tokens of `text`.
MASKED = {(0, 1): 4, (0, 3): 0, (1, 0): 6, (1, 2): 2, (2, 1): 5}


@pytest.fixture
def language_models(draw, taps):
    """(student, teacher): last hidden states of width 4 and vocabularies of 7, with biases."""
    student = draw(1, 3, 5, 4), draw(2, 7, 4), draw(3, 7)
    teacher = draw(4, 3, 5, 4), draw(5, 7, 4), draw(6, 7)
    logits = [hidden @ weight.T + bias for hidden, weight, bias in (student, teacher)]
    made = [
        taps(last_hidden=hidden, vocabulary=(weight, bias)) for hidden, weight, bias in (student, teacher)
    ]
    return made, logits, (student[0], teacher[0])


def test_distilbert(build, check, language_models, text, tokens):
    """Sanh et al. 2019, section 3: 5 L_ce + 2 L_mlm + 1 L_cos.

    L_ce is written as a cross-entropy with the teacher's distribution. The code (`distiller.py`) has T^2 KL,
    by `KLDivLoss(reduction="batchmean")` over all tokens but padding, which differs by the factor and by a
    constant of the teacher: we follow the code, whose weights these are. L_mlm is a mean over the masked
    tokens, L_cos one over all tokens but padding, as in the code.
    """
    (student, teacher), (s, t), (hs, ht) = language_models
    temperature = 2.0
    ce = temperature**2 * np.mean(
        [rel_entr(softmax(t[token] / temperature), softmax(s[token] / temperature)).sum() for token in tokens]
    )
    mlm = np.mean([-np.log(softmax(s[token])[label]) for token, label in MASKED.items()])
    norm = np.linalg.norm
    cos = np.mean([1 - hs[token] @ ht[token] / (norm(hs[token]) * norm(ht[token])) for token in tokens])
    check(
        build(load_recipe("distilbert")["objectives"]),
        student,
        teacher,
        text,
        {
            "kd": (5, ce, 3.2527707893849924),
            "ce": (2, mlm, 6.023826387810499),
            "cosine": (1, cos, 0.8956854512011817),
        },
    )


def test_bert(build, check, language_models, text, draw, taps):
    """Devlin et al. 2019, section 3.1: the masked language model and the next sentence, the sum of both.

    The code adds 1e-5 to the number of masked tokens that the first is divided by (`run_pretraining.py`); the
    mean of the paper, and ours, does not.
    """
    _, (s, _), _ = language_models
    mlm = np.mean([-np.log(softmax(s[token])[label]) for token, label in MASKED.items()])
    pooled, weight, bias = draw(7, 3, 4), draw(8, 2, 4), draw(9, 2)
    logits = pooled @ weight.T + bias
    nsp = np.mean([-np.log(softmax(logits[n])[label]) for n, label in enumerate((0, 1, 1))])
    student = taps(last_hidden=draw(1, 3, 5, 4), vocabulary=(draw(2, 7, 4), draw(3, 7)), pooled=pooled)
    head = SimpleNamespace(weight=torch.from_numpy(weight), bias=torch.from_numpy(bias))
    student.model.cls = SimpleNamespace(seq_relationship=head)
    check(
        build(load_recipe("bert")["objectives"]),
        student,
        None,
        text,
        {"ce": (1, mlm, 6.023826387810499), "next_sentence": (1, nsp, 3.2008891288631958)},
    )


def test_mobilebert_distillation(build, check, language_models, text):
    """Sun et al. 2020, section 3, pretraining distillation: half L_MLM and half L_KD, of the masked tokens.

    The next-sentence term of the equation is that of `test_bert`. The code's labels are the mean of the true
    distribution and the teacher's at T = 1; the cross-entropy with it is this and a constant of the teacher.
    """
    (student, teacher), (s, t), _ = language_models
    kd = np.mean([rel_entr(softmax(t[token]), softmax(s[token])).sum() for token in MASKED])
    mlm = np.mean([-np.log(softmax(s[token])[label]) for token, label in MASKED.items()])
    check(
        build(load_recipe("mobilebert")["stages"][1]["objectives"]),
        student,
        teacher,
        text,
        {"kd": (0.5, kd, 2.3142652922114615), "ce": (0.5, mlm, 6.023826387810499)},
    )


def test_minilm(build, check, taps, draw, text, tokens, model):
    """Wang et al. 2021, section 3.1: the KL of Q-Q, K-K and V-V relations, each a mean over heads and tokens.

    The states of all attention heads side by side are split anew into 48 relation heads, so that a student of
    4 heads learns from a teacher of 12. A relation is softmax(A A^T / sqrt(d)), d the width of a relation
    head. The authors have published no training code; the mean is over all tokens but padding, as |x| in the
    paper is the length of the text.
    """
    kinds = "query", "key", "value"
    ours = {kind: draw(10 + i, 3, 5, 48) for i, kind in enumerate(kinds)}  # 4 heads of 12
    theirs = {kind: draw(20 + i, 3, 5, 96) for i, kind in enumerate(kinds)}  # 12 heads of 8

    def relation(states: np.ndarray, head: int, n: int, i: int) -> np.ndarray:
        width = states.shape[-1] // 48
        own = states[n, : len([t for t in tokens if t[0] == n]), head * width : (head + 1) * width]
        return softmax(own[i] @ own.T / np.sqrt(width))

    expected = {}
    pins = {"query": 0.47664247602730625, "key": 0.4597181962257303, "value": 0.5133392243625864}
    for kind, pinned in pins.items():
        rows = [
            rel_entr(relation(theirs[kind], head, n, i), relation(ours[kind], head, n, i)).sum()
            for head in range(48)
            for n, i in tokens
        ]
        expected[f"{kind}_relation"] = (1, np.mean(rows), pinned)

    def split(states: dict[str, np.ndarray], heads: int) -> list[np.ndarray]:
        return [states[kind].reshape(3, 5, heads, -1).transpose(0, 2, 1, 3) for kind in kinds]

    check(
        build(load_recipe("minilm")["objectives"], model(2, 48, 4), model(3, 96, 12)),
        taps(attention={1: split(ours, 4)}),
        taps(attention={2: split(theirs, 12)}),
        text,
        expected,
    )
