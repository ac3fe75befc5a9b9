"""From sections of a configuration to objectives, and the trial pass of both models."""

import pytest
import torch
import transformers
from pydantic import TypeAdapter

from fastdistil.errors import UserError
from fastdistil.objectives import FeatureMapsObjective, HiddenObjective, PredictionObjective
from fastdistil.train.build import make_objectives, try_objectives
from fastdistil.train.objective_config import ObjectiveConfig, describe

CONFIGS = TypeAdapter(list[ObjectiveConfig])
HEADS = {
    "classification": "SequenceClassification",
    "regression": "SequenceClassification",
    "span": "QuestionAnswering",
    "choice": "MultipleChoice",
}


def sections(*plain: dict):
    return CONFIGS.validate_python(plain)


def tiny(head: str, num_layers: int = 2, hidden_size: int = 16, **changes):
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        **changes,
    )
    return getattr(transformers, f"BertFor{head}")(config)


def task_model(kind: str, **changes):
    labels = {"regression": 1, "span": 2}.get(kind, 3)
    return tiny(HEADS[kind], **{"num_labels": labels, **changes})


def test_the_keys_of_a_section_reach_its_objective():
    student, teacher = tiny("MaskedLM", 2), tiny("MaskedLM", 4)
    prediction, hidden, features = make_objectives(
        sections(
            {"name": "prediction", "kd_weight": 0.3, "task_weight": 0.7, "temperature": 5, "distance": "mse"},
            {
                "name": "hidden",
                "weight": 100,
                "layers": "skip",
                "normalize": True,
                "tokens": "first",
                "layer_reduction": "mean",
            },
            {"name": "feature_maps", "feature_weight": 1, "mean_weight": 2, "variance_weight": 3},
        ),
        student,
        teacher,
    )
    assert prediction == PredictionObjective(0.3, 0.7, 5, "mse")
    assert isinstance(hidden, HiddenObjective)
    assert (hidden.pairs, hidden.width, hidden.projection) == (((0, 1),), 16, None)
    assert (hidden.normalize, hidden.weight) == (True, 100)
    assert (hidden.tokens, hidden.layer_reduction) == ("first", "mean")
    assert features == FeatureMapsObjective(((0, 1), (1, 3)), 16, 1, 2, 3)


@pytest.mark.parametrize("kind", HEADS)
def test_a_task_is_tried_on_two_tokens(kind):
    student, teacher = task_model(kind).train(), task_model(kind, num_layers=4).eval()
    plain = (
        {"name": "prediction", "kd_weight": 0.5, "task_weight": 0.5},
        {"name": "hidden", "layers": "skip", "normalize": True, "tokens": "first"},
        {"name": "attention_transfer"},
    )
    objectives = make_objectives(sections(*plain), student, teacher)
    try_objectives(objectives, student, teacher, kind)
    assert student.training
    logits_alone = make_objectives(sections({"name": "prediction", "distance": "mse"}), student, teacher)
    try_objectives(logits_alone, student, teacher, kind)
    without_teacher = make_objectives(
        sections({"name": "prediction", "kd_weight": 0, "task_weight": 1}), student
    )
    try_objectives(without_teacher, student, None, kind)


def test_heads_for_other_numbers_of_classes_are_told_at_once():
    student, teacher = task_model("classification", num_labels=2), task_model("classification")
    objectives = make_objectives(sections({"name": "prediction"}), student, teacher)
    with pytest.raises(UserError, match="student's head has 2 classes and the teacher's 3"):
        try_objectives(objectives, student, teacher, "classification")


def test_next_sentences_need_their_head():
    plain = {"name": "vocabulary", "kd_weight": 0, "ce_weight": 1}, {"name": "next_sentence"}
    model = tiny("PreTraining")
    try_objectives(make_objectives(sections(*plain), model), model)
    model = tiny("MaskedLM")
    with pytest.raises(UserError, match="head for it, which BertForMaskedLM does not have"):
        try_objectives(make_objectives(sections(*plain), model), model)


def test_feature_maps_of_other_widths_are_refused():
    student, teacher = tiny("MaskedLM", hidden_size=12), tiny("MaskedLM")
    with pytest.raises(UserError, match=r"objectives\.0: .* student is 12 wide and the teacher 16"):
        make_objectives(sections({"name": "feature_maps"}), student, teacher)


@pytest.mark.parametrize(
    ("kind", "plain", "formula"),
    [
        (
            "classification",
            {"name": "prediction", "kd_weight": 0.5, "task_weight": 0.5, "temperature": 10},
            "0.5 · T²·KL(teacher‖student) at T=10 [mean over examples] + "
            "0.5 · CE at T=1 of the labels [mean over labelled examples]",
        ),
        (
            "span",
            {"name": "prediction", "kd_weight": 1, "task_weight": 0.5},
            "1 · T²·KL(teacher‖student) at T=2 [mean over examples and both ends] + "
            "0.5 · CE at T=1 of the labels [mean over labelled examples and both ends]",
        ),
        (
            "regression",
            {"name": "prediction", "kd_weight": 1, "task_weight": 0.5, "temperature": 10},
            "1 · MSE of the teacher's scores [mean over examples] + "
            "0.5 · MSE of the labels [mean over labelled examples]",
        ),
        (
            "classification",
            {"name": "prediction", "distance": "mse"},
            "1 · MSE of the logits [mean over examples and the classes]",
        ),
        (
            "classification",
            {
                "name": "hidden",
                "weight": 100,
                "layers": "skip",
                "normalize": True,
                "tokens": "first",
                "layer_reduction": "mean",
            },
            "100 · MSE of normalised hidden states [mean over the first tokens and the width, "
            "mean over layers: skip]",
        ),
        (
            None,
            {"name": "feature_maps", "layers": [[0, 1]]},
            "100 · MSE of normalised feature maps [mean over all tokens but padding and the width] + "
            "5000 · (difference of their means)² [mean over all tokens but padding] + "
            "5 · |difference of their variances| [mean over all tokens but padding] [sum over layers: 0←1]",
        ),
        (None, {"name": "next_sentence"}, "1 · CE of next-sentence prediction [mean over sequences]"),
    ],
)
def test_the_log_says_what_is_minimised(kind, plain, formula):
    expected = f"loss = {formula}; each mean is over the whole batch of an optimiser step"
    assert describe(sections(plain), kind) == expected


def test_trying_leaves_no_gradient():
    student, teacher = task_model("classification"), task_model("classification").eval()
    plain = {"name": "prediction", "task_weight": 1}, {"name": "hidden", "projection": True}
    objectives = make_objectives(sections(*plain), student, teacher)
    before = torch.get_rng_state()
    try_objectives(objectives, student, teacher, "classification")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in student.parameters())
