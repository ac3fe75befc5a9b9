"""What the section `student` makes of a teacher, and of a model of its own."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from fastdistil.train.sections import StudentConfig
from fastdistil.train.students import build_student, takes_whole_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForMaskedLM(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes)).eval()


def test_of_a_teacher_a_student_has_half_the_layers_and_is_a_distilbert_on_text(model):
    student = build_student(StudentConfig(), model)
    assert type(student).__name__ == "DistilBertForMaskedLM"
    assert student.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"init": "random"}, 4),
        ({"init": "random", "hidden_size": 4}, 4),
        ({"num_layers": 3}, 3),
        ({"teacher_layers": [0, 2]}, 2),
        ({"architecture": "same"}, 4),
    ],
    ids=str,
)
def test_a_model_of_its_own_keeps_its_layers_and_its_family(model, keys, layers):
    config = StudentConfig(from_model="a", **keys)
    assert not takes_whole_model(config)
    student = build_student(config, model)
    assert type(student) is BertForMaskedLM
    assert student.config.num_hidden_layers == layers
    assert student.config.hidden_size == keys.get("hidden_size", 8)
    assert student.config.hidden_dropout_prob == 0.1
    name = "bert.encoder.layer.0.output.dense.weight"
    same = student.config.hidden_size == 8 and torch.equal(
        student.state_dict()[name], model.state_dict()[name]
    )
    assert same == (keys.get("init") != "random")


def test_of_a_model_of_its_own_the_dropout_alone_is_changed_in_place(model):
    """And so of a compressed model, of which no other student can be made."""
    assert build_student(StudentConfig(from_model="a", dropout=0.3), model) is model
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


def test_a_model_of_its_own_is_taken_whole_where_nothing_is_said(model):
    assert takes_whole_model(StudentConfig(from_model="a"))
    assert not takes_whole_model(StudentConfig())
    assert build_student(StudentConfig(from_model="a"), model) is model
