"""What the section `student` makes of a teacher, and of a model of its own."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from fastdistil.errors import UserError
from fastdistil.train.config import first_difference, load_config, read_config
from fastdistil.train.sections import StudentConfig
from fastdistil.train.students import build_student, resolved, takes_whole_model, with_layers


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


def of_depth(folder: Path, depth: int) -> str:
    BertConfig(num_hidden_layers=depth).save_pretrained(str(folder / str(depth)))
    return str(folder / str(depth))


@pytest.mark.parametrize(
    ("word", "num_layers", "depth", "expected"),
    [
        ("first", None, 12, [0, 1, 2, 3, 4, 5]),
        ("first", None, 7, [0, 1, 2]),
        ("first", None, 1, [0]),
        ("first", 3, 12, [0, 1, 2]),
        ("first", 4, 4, [0, 1, 2, 3]),
        ("spread", None, 12, [0, 2, 4, 7, 9, 11]),
        ("spread", None, 6, [0, 3, 5]),
        ("spread", 3, 12, [0, 6, 11]),
    ],
)
def test_a_word_stands_for_layers_of_a_teacher_of_any_depth(word, num_layers, depth, expected):
    config = StudentConfig(teacher_layers=word, num_layers=num_layers)
    found = with_layers(config, depth, depth)
    assert (found.teacher_layers, found.num_layers) == (expected, len(expected))


def test_a_list_of_layers_or_none_is_what_it_was():
    for layers in ([0, 3], None):
        config = StudentConfig(teacher_layers=layers)
        assert with_layers(config, 4, 4) is config


@pytest.mark.parametrize(("depth", "expected"), [(12, 6), (24, 6), (6, 6), (4, 4)])
def test_of_another_model_half_as_many_layers_are_taken_as_the_teacher_has_or_all(tmp_path, depth, expected):
    keys = [f"student.from_model={of_depth(tmp_path / 'own', depth)}"]
    config = load_config("kd", keys, teacher=of_depth(tmp_path, 12), task="sst2")
    assert resolved(config).student.teacher_layers == list(range(expected))


def test_more_layers_than_there_are_is_named(tmp_path):
    teacher = of_depth(tmp_path, 4)
    with pytest.raises(
        UserError, match=r"student\.num_layers is 5, but the teacher has only 4 layers to copy"
    ):
        resolved(load_config("kd", ["student.num_layers=5"], teacher=teacher, task="sst2"))
    own = of_depth(tmp_path / "own", 2)
    keys = ["student.num_layers=3", f"student.from_model={own}"]
    with pytest.raises(UserError, match=f"student.num_layers is 3, but {own} has only 2 layers to copy"):
        resolved(load_config("kd", keys, teacher=teacher, task="sst2"))


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^\./nowhere: no such folder$"):
        resolved(load_config("kd", teacher="./nowhere", task="sst2"))


@pytest.mark.parametrize(
    ("recipe", "layers"),
    [("kd", [0, 1, 2, 3, 4, 5]), ("pkd", [0, 1, 2, 3, 4, 5]), ("pkd:3-layers-last", [0, 1, 2]),
     ("distilbert", [0, 2, 4, 7, 9, 11])],
)  # fmt: skip
def test_a_run_that_was_begun_with_numbers_in_its_recipe_is_the_same_run(recipe, layers, tmp_path):
    given = {"corpus": "c"} if recipe == "distilbert" else {"task": "sst2"}
    keys = [f"student.num_layers={len(layers)}", f"student.teacher_layers={layers}"]
    teacher = of_depth(tmp_path, 12)
    begun = load_config(recipe, keys, teacher=teacher, **given)
    (tmp_path / "config.yaml").write_text(begun.to_yaml())
    config = resolved(load_config(recipe, teacher=teacher, **given))
    assert first_difference(read_config(tmp_path / "config.yaml"), config) is None
    assert config.fingerprint() == begun.fingerprint()


def test_of_a_teacher_that_the_run_trains_itself_the_layers_are_known(tmp_path):
    keys = ["student.num_layers=null", "student.teacher_layers=spread"]
    assert resolved(load_config("quickstart", keys)).student.teacher_layers == [0, 3, 5]


def test_a_student_is_built_of_the_layers_that_a_word_stands_for(model):
    student = build_student(StudentConfig(teacher_layers="first", architecture="same"), model)
    assert student.config.num_hidden_layers == 2
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(student.state_dict()[name], model.state_dict()[name])
