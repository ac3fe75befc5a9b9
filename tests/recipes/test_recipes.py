from pathlib import Path

import pytest

from fastdistil.errors import UserError
from fastdistil.recipes import list_recipes, load_recipe
from fastdistil.train.config import load_config


def test_every_recipe_names_itself_its_source_and_fits_the_schema():
    recipes = list_recipes()
    assert [r.name for r in recipes] == ["distilbert", "minilm", "mlm", "quickstart"]
    for recipe in recipes:
        assert recipe.description
        assert recipe.paper
        assert recipe.checked_against
        teacher = None if recipe.name == "quickstart" else "t"
        assert load_config(recipe.name, teacher=teacher, corpus="c").recipe == recipe.name


def test_distilbert_is_the_published_recipe():
    config = load_config("distilbert", teacher="t", corpus="c")
    vocabulary, cosine = config.objectives
    weights = vocabulary.kd_weight, vocabulary.ce_weight, cosine.weight
    assert weights == (5, 2, 1)
    assert (vocabulary.temperature, vocabulary.divergence, vocabulary.positions) == (2, "forward_kl", "all")
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (5e-4, (0.9, 0.98), 1e-6)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0, 5)
    assert (config.schedule.name, config.schedule.warmup) == ("linear", 0.05)
    assert (config.run.epochs, config.run.batch_size, config.data.max_length) == (3, 2000, 512)
    masking = config.masking
    assert (masking.probability, masking.mask, masking.random, masking.keep) == (0.15, 0.8, 0.1, 0.1)
    assert masking.smoothing == 0.7
    assert config.student.teacher_layers == [0, 2, 4, 7, 9, 11]


def test_minilm_is_the_published_recipe():
    config = load_config("minilm", teacher="t", corpus="c")
    (relations,) = config.objectives
    assert (relations.query_weight, relations.key_weight, relations.value_weight) == (1, 1, 1)
    assert relations.num_heads == 48
    assert (relations.teacher_layer, relations.student_layer) == (None, None)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (6e-4, (0.9, 0.999), 1e-6)
    assert optimizer.weight_decay == 0.01
    assert config.run.steps * config.schedule.warmup == 4000
    assert (config.schedule.name, config.run.steps, config.run.batch_size) == ("linear", 400_000, 256)
    assert config.masking is None
    assert not config.uses_vocabulary


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("distillbert", "unknown recipe 'distillbert': did you mean distilbert?"),
        (
            "zzz",
            "unknown recipe 'zzz': known: distilbert, minilm, mlm, quickstart, or a path to a .yaml file",
        ),
        ("no/such/file.yaml", "cannot read recipe no/such/file.yaml"),
    ],
)
def test_an_unknown_recipe_is_named(name, message):
    with pytest.raises(UserError) as error:
        load_recipe(name)
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("- a\n", "must be a mapping"), ("a: [", "is not YAML")])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
