"""Golden values of the recipes that compare layers on text: TinyBERT's and MobileBERT's transfer."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from fastdistil.recipes import load_recipe

TINYBERT = {
    "general": load_recipe("tinybert-general")["objectives"],
    "task": load_recipe("tinybert-task")["stages"][0]["objectives"],
}


def scores(states: list[np.ndarray], n: int, head: int) -> np.ndarray:
    """(L, L) raw attention scores of one sequence and head."""
    query, key = states[0][n, head], states[1][n, head]
    return query @ key.T / np.sqrt(query.shape[-1])


def lengths(tokens) -> list[int]:
    return [sum(n == sequence for n, _ in tokens) for sequence in range(3)]


@pytest.fixture
def tinybert(draw, taps, model):
    """A student of 4 layers of 2 heads of 3 and a teacher of 12 layers of 2 heads of 4, and a projection."""
    ours = {layer: [draw(100 + 3 * layer + i, 3, 2, 5, 3) for i in range(3)] for layer in range(4)}
    theirs = {layer: [draw(200 + 3 * layer + i, 3, 2, 5, 4) for i in range(3)] for layer in range(12)}
    hs = {layer: draw(300 + layer, 3, 5, 6) for layer in range(-1, 4)}  # -1: the embeddings
    ht = {layer: draw(400 + layer, 3, 5, 8) for layer in range(-1, 12)}
    student = taps(attention=ours, hidden=hs, embeddings=hs[-1])
    teacher = taps(attention=theirs, hidden=ht, embeddings=ht[-1])
    return (student, teacher), (model(4, 6, 2), model(12, 8, 2)), (ours, theirs), (hs, ht)


def with_projection(objectives, weight: np.ndarray, bias: np.ndarray):
    _, hidden, embeddings = objectives
    assert embeddings.projection is hidden.projection
    with torch.no_grad():
        hidden.projection.weight.copy_(torch.from_numpy(weight))
        hidden.projection.bias.copy_(torch.from_numpy(bias))
    return objectives


@pytest.mark.parametrize("sections", TINYBERT.values(), ids=TINYBERT)
def test_tinybert(sections, build, check, draw, tinybert, text, tokens):
    """Jiao et al. 2020, equations 7 to 9 (section 3.1): MSE of attention scores, hidden states, embeddings.

    Student layer m learns from teacher layer 3 m of 12 (section 4.1). MSE is a mean over the elements, the
    loss a sum over the layers. The scores are those before the softmax. The states go through one map with a
    bias, `fit_dense`, in the code also the embeddings, for which equation 9 has a map of its own: we follow
    the code, as it is what the published models were trained with.

    The code's means are over padding too: scores that the mask has set to -10,000 become 0 in both models, so
    they add nothing to the sum but count in what it is divided by, while the queries, states and embeddings
    of padding are compared like any others. So the loss of a text depends on what it is padded to. In the
    paper l is the length of the text; we follow the paper, and the mean is over the real tokens.
    """
    (student, teacher), models, (ours, theirs), (hs, ht) = tinybert
    weight, bias = draw(500, 8, 6), draw(501, 8)
    partner = {0: 2, 1: 5, 2: 8, 3: 11}
    attention = hidden = 0.0
    for m, g in partner.items():
        errors = []
        for n, length in enumerate(lengths(tokens)):
            for head in range(2):
                difference = scores(ours[m], n, head) - scores(theirs[g], n, head)
                errors.extend((difference[:length, :length] ** 2).ravel())
        attention += np.mean(errors)
        hidden += np.mean([(weight @ hs[m][token] + bias - ht[g][token]) ** 2 for token in tokens])
    embeddings = np.mean([(weight @ hs[-1][token] + bias - ht[-1][token]) ** 2 for token in tokens])
    check(
        with_projection(build(sections, *models), weight, bias),
        student,
        teacher,
        text,
        {
            "attention": (1, attention, 7.225798762486103),
            "hidden": (1, hidden, 32.41687012253519),
            "embeddings": (1, embeddings, 7.475025784147907),
        },
    )


def test_tinyberts_attention_is_that_of_its_code_where_nothing_is_padded(build, tinybert, text):
    """`general_distill.py`: masked scores, at most -100, are set to 0, then `MSELoss` of the whole maps."""
    (student, teacher), models, (ours, theirs), _ = tinybert
    full = type(text)(**{**vars(text), "attention_mask": torch.ones_like(text.attention_mask)})
    objective = build(TINYBERT["general"][:1], *models)[0]
    code = 0.0
    for m, g in {0: 2, 1: 5, 2: 8, 3: 11}.items():
        maps = [
            np.array([[scores(states, n, head) for head in range(2)] for n in range(3)])
            for states in (ours[m], theirs[g])
        ]
        s, t = (np.where(x <= -1e2, 0, x) for x in maps)
        code += np.mean((s - t) ** 2)
    result = objective.loss(student, teacher, full, objective.counts(full))
    assert result.loss.item() == pytest.approx(code, rel=1e-6)


def test_mobilebert_transfer(build, check, draw, taps, model, text, tokens):
    """Sun et al. 2020, section 3: feature map transfer and attention transfer.

    The paper's feature map transfer is one MSE, which it says is split in practice into that of normalised
    maps and that of statistics; how, only the code says (`run_pretraining.py`), and we follow it: MSE after a
    layer norm without parameters, times 100; the squared difference of the means over the width, times 5,000;
    the absolute difference of the variances, times 5. The code's statistics compare each layer of the student
    with all layers of the teacher, by a slip of name (`teacher_hiddens` for `teacher_hidden`); ours are of
    the paired layer, as in equation 2. The code divides the sum over layers by their number, padding is
    compared too, and its attention transfer is the cross-entropy, which is the KL and a constant of the
    teacher; ours are sums over layers of means over the real tokens, as in the paper, and the KL.
    """
    hs = {layer: draw(600 + 2 * layer, 3, 5, 8) for layer in range(2)}
    ht = {layer: 2 * draw(601 + 2 * layer, 3, 5, 8) + 1 for layer in range(2)}
    ours, theirs = (
        {layer: [draw(seed + 20 * layer + i, 3, 2, 5, 4) for i in range(3)] for layer in range(2)}
        for seed in (610, 620)
    )

    def normalised(h: np.ndarray) -> np.ndarray:
        return (h - h.mean()) / np.sqrt(h.var() + 1e-12)

    maps = mean = variance = attention = 0.0
    for layer in range(2):
        pairs = [(hs[layer][token], ht[layer][token]) for token in tokens]
        maps += np.mean([(normalised(s) - normalised(t)) ** 2 for s, t in pairs])
        mean += np.mean([(s.mean() - t.mean()) ** 2 for s, t in pairs])
        variance += np.mean([abs(s.var() - t.var()) for s, t in pairs])
        rows = []
        for n, length in enumerate(lengths(tokens)):
            for head in range(2):
                for i in range(length):
                    s, t = (softmax(scores(states[layer], n, head)[i, :length]) for states in (ours, theirs))
                    rows.append(rel_entr(t, s).sum())
        attention += np.mean(rows)
    check(
        build(load_recipe("mobilebert")["stages"][0]["objectives"], model(2, 8, 2), model(2, 8, 2)),
        taps(hidden=hs, attention=ours),
        taps(hidden=ht, attention=theirs),
        text,
        {
            "feature_maps": (100, maps, 3.585590049635299),
            "feature_mean": (5000, mean, 2.680111810067693),
            "feature_variance": (5, variance, 4.513522070844028),
            "attention": (1, attention, 1.495420453760147),
        },
    )
