"""Golden values of recipes on a task: finetune, kd, recover, distilbert-task, pkd, tinybert-task, bilstm."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from fastdistil.data.task_batches import TaskBatch
from fastdistil.recipes import for_variant, load_recipe

LABELS = (2, 0, 1)
ENDS = ((1, 4), (0, 2), (2, 2))  # first and last token of each answer


def soft(teacher: np.ndarray, student: np.ndarray, temperature: float) -> float:
    """T^2 KL(teacher || student) of logits at T."""
    q, p = softmax(teacher / temperature), softmax(student / temperature)
    return float(temperature**2 * rel_entr(q, p).sum())


def hard(student: np.ndarray, label: int) -> float:
    return float(-np.log(softmax(student)[label]))


@pytest.fixture
def task(text):
    """The batch of a task with these labels."""

    def make(labels) -> TaskBatch:
        return TaskBatch(text.input_ids, text.attention_mask, text.input_ids, torch.tensor(labels))

    return make


@pytest.fixture
def logits(draw):
    """(student, teacher): of three classes."""
    return 2 * draw(700, 3, 3), 3 * draw(701, 3, 3)


def test_finetune(build, check, taps, task, logits):
    """Devlin et al. 2019, section 4.1: the log of the right class's softmax, for n examples their mean."""
    s, _ = logits
    ce = np.mean([hard(s[n], label) for n, label in enumerate(LABELS)])
    objectives = build(load_recipe("finetune")["objectives"])
    check(objectives, taps(logits=s), None, task(LABELS), {"task": (1, ce, 1.0007620079051305)})


def test_finetune_of_a_regression(build, check, taps, task, draw):
    """GLUE's STS-B, as the code of BERT's users has it (`run_glue.py`): the squared error of the score."""
    s, scores = draw(740, 3, 1), (0.5, 4.0, 2.25)
    mse = np.mean([(s[n, 0] - score) ** 2 for n, score in enumerate(scores)])
    objectives = build(load_recipe("finetune")["objectives"])
    check(objectives, taps(logits=s), None, task(scores), {"task": (1, mse, 4.745152313425041)})


@pytest.mark.parametrize(
    ("recipe", "temperature", "pinned"), [("kd", 5, 2.0728883325523286), ("recover", 2, 1.3221745076795293)]
)
def test_logits_and_labels(recipe, temperature, pinned, build, check, taps, task, logits):
    """Hinton et al. 2015, section 2: soft targets at T, times T^2, and the labels, half each."""
    s, t = logits
    kd = np.mean([soft(t[n], s[n], temperature) for n in range(3)])
    ce = np.mean([hard(s[n], label) for n, label in enumerate(LABELS)])
    check(
        build(load_recipe(recipe)["objectives"]),
        taps(logits=s),
        taps(logits=t),
        task(LABELS),
        {"kd": (0.5, kd, pinned), "task": (0.5, ce, 1.0007620079051305)},
    )


def test_distilbert_task(build, check, taps, task, draw, tokens):
    """Sanh et al. 2019, section 4.1 (SQuAD): 0.5 T^2 KL + 0.5 CE, each the mean of the start's and the end's.

    `run_squad_w_distillation.py` takes `KLDivLoss(reduction="batchmean")` of start and of end logits, T = 2,
    and halves their sum: the mean over the examples, as ours. There the softmax runs over padding too; here
    padding has no share in either model, since no answer lies in it.
    """
    s, t = 2 * draw(710, 3, 2, 5), 3 * draw(711, 3, 2, 5)
    kd = ce = 0.0
    for n, ends in enumerate(ENDS):
        length = sum(token[0] == n for token in tokens)
        s[n, :, length:], t[n, :, length:] = -np.inf, -np.inf
        for end, label in enumerate(ends):
            kd += soft(t[n, end, :length], s[n, end, :length], 2) / 2
            ce += hard(s[n, end, :length], label) / 2
    check(
        build(load_recipe("distilbert-task")["objectives"]),
        taps(logits=s),
        taps(logits=t),
        task(ENDS),
        {"kd": (0.5, kd / 3, 4.2249680563370795), "task": (0.5, ce / 3, 1.6116146008468928)},
    )


@pytest.mark.parametrize(
    ("mapping", "partner", "pinned"),
    [("skip", (2, 4, 6, 8, 10), 0.5290778794176951), ("last", (7, 8, 9, 10, 11), 0.5204114254395459)],
    ids=["skip", "last"],
)
def test_pkd(mapping, partner, pinned, build, check, taps, task, logits, draw, model):
    """Sun et al. 2019, sections 3.1 and 3.2: (1 - alpha) L_CE + alpha L_DS + beta L_PT.

    L_PT (equation 7) is a sum over examples and layers of the squared distance of the normalised [CLS]
    states; the code (`KD_loss.py`) takes its mean over examples, layers and the width, and the published grid
    of beta, 10 to 1,000, is the code's: we follow it. Layer j of the student, all but the last, learns from
    the teacher's 2 j (PKD-Skip) or j + 6 (PKD-Last).

    L_DS is a sum over the classes. The code's `KLDivLoss(reduction="mean")` divides it by their number as
    well, which makes alpha mean another thing with each task: there we follow the paper. The factor T^2, in
    the code alone, is Hinton's.
    """
    alpha, beta, temperature = 0.5, 100, 5
    s, t = logits
    hs = {layer: draw(720 + layer, 3, 5, 4) for layer in range(6)}
    ht = {layer: draw(730 + layer, 3, 5, 4) for layer in range(12)}
    kd = np.mean([soft(t[n], s[n], temperature) for n in range(3)])
    ce = np.mean([hard(s[n], label) for n, label in enumerate(LABELS)])
    total = 0.0
    for n in range(3):
        for j, g in enumerate(partner):
            ours, theirs = hs[j][n, 0], ht[g - 1][n, 0]
            total += ((ours / np.linalg.norm(ours) - theirs / np.linalg.norm(theirs)) ** 2).sum()
    recipe = load_recipe("pkd")
    sections = recipe["objectives"]
    if mapping == "last":
        ((key, layers),) = for_variant(recipe, mapping).items()
        assert key == "objectives.1.layers"
        sections[1]["layers"] = layers
    check(
        build(sections, model(6), model(12)),
        taps(logits=s, hidden=hs),
        taps(logits=t, hidden=ht),
        task(LABELS),
        {
            "kd": (alpha, kd, 2.0728883325523286),
            "task": (1 - alpha, ce, 1.0007620079051305),
            "hidden": (beta, total / (3 * 5 * 4), pinned),
        },
    )


def test_tinybert_prediction(build, check, taps, task, logits):
    """Jiao et al. 2020, equation 10: the soft cross-entropy of the logits over t = 1, and no labels.

    It is the KL plus the teacher's entropy, a constant, which ours leaves out. The code's mean is over the
    classes too (`task_distill.py`), which scales the whole loss of this stage; we follow the equation.
    """
    s, t = logits
    cross_entropy = np.mean([-(softmax(t[n]) * np.log(softmax(s[n]))).sum() for n in range(3)])
    entropy = np.mean([-(softmax(t[n]) * np.log(softmax(t[n]))).sum() for n in range(3)])
    check(
        build(load_recipe("tinybert-task")["stages"][1]["objectives"]),
        taps(logits=s),
        taps(logits=t),
        task(LABELS),
        {"kd": (1, cross_entropy - entropy, 0.6834443174195376)},
    )


def test_tinybert_prediction_of_a_regression(build, check, taps, task, draw):
    """The paper does not say what takes the place of equation 10 in STS-B: here the MSE of the two scores.

    The code takes the labels and leaves the teacher out, which is no distillation.
    """
    s, t = draw(740, 3, 1), draw(741, 3, 1)
    mse = np.mean([(s[n, 0] - t[n, 0]) ** 2 for n in range(3)])
    check(
        build(load_recipe("tinybert-task")["stages"][1]["objectives"]),
        taps(logits=s),
        taps(logits=t),
        task((0.5, 4.0, float("nan"))),
        {"kd": (1, mse, 4.697081044397938)},
    )


def test_bilstm(build, check, taps, task, logits):
    """Tang et al. 2019, section 3.2: the squared distance of the logits, and no labels.

    Equation 2 is the squared norm, a sum over the classes; the text calls it the mean squared error, and the
    code takes `MSELoss`, a mean over examples and classes: we follow text and code.
    """
    s, t = logits
    mse = np.mean([(s[n, c] - t[n, c]) ** 2 for n in range(3) for c in range(3)])
    check(
        build(load_recipe("bilstm")["objectives"]),
        taps(logits=s),
        taps(logits=t),
        task(LABELS),
        {"kd": (1, mse, 14.66978849098418)},
    )
