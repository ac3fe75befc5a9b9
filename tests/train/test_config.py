from pathlib import Path

import pytest
import yaml

from fastdistil.errors import UserError
from fastdistil.train.config import first_difference, load_config, read_config


def load(*overrides: str):
    return load_config("distilbert", overrides, teacher="t", corpus="c")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.stps=3"], "unknown key run.stps: did you mean run.steps?"),
        (
            ["objectives.0.kd_wieght=3"],
            "unknown key objectives.0.kd_wieght: did you mean objectives.0.kd_weight?",
        ),
        (["studnet.num_layers=3"], "unknown key studnet: did you mean student?"),
        (["objectives.2.weight=3"], "objectives.2.weight: expected an index from 0 to 1, got '2'"),
        (["objectives.0.temperature=0"], "objectives.0.temperature: input should be greater than 0, got 0"),
        (["run.steps=many"], "run.steps: input should be a valid integer"),
        (["run.steps.x=1"], "run.steps"),
        (["run.steps"], "an override reads key=value, got 'run.steps'"),
        (["run.micro_batch_size=7"], "run: batch_size 2000 must be a multiple of micro_batch_size 7"),
        (["masking.mask=0.5"], "masking: mask + random + keep must be 1, got 0.7"),
        (["objectives.0.name=vocablary"], "objectives.0.name must be one of vocabulary, cosine, relations"),
        (["masking=null"], "objectives.0: without masking there are no masked tokens"),
        (["student.num_layers=4"], "student.teacher_layers names 6 layers, student.num_layers is 4"),
    ],
)
def test_a_wrong_key_or_value_is_named(overrides, message):
    with pytest.raises(UserError) as error:
        load(*overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objectives.0.num_head=3"], "key objectives.0.num_head: did you mean objectives.0.num_heads?"),
        (["objectives.0.num_heads=0"], "objectives.0.num_heads: input should be greater than or equal to 1"),
        (["objectives=[{name: relations}, {name: relations}]"], "objectives: relations is given twice"),
        (
            ["objectives=[{name: hidden, layers: top}]"],
            "objectives.0.layers: must be one of uniform, skip, last, first or a list of "
            "[student layer, teacher layer], got 'top'",
        ),
        (["objectives=[{name: hidden, layers: [[1, 2, 3]]}]"], "objectives.0.layers: must be one of uniform"),
        (["objectives=[{name: hidden, layers: [a, b]}]"], "objectives.0.layers: must be one of uniform"),
        (
            ["baseline=true"],
            "baseline: trains the student as a masked language model, which needs objective voc",
        ),
        (["student.from_model=x"], "student.from_model: a distilled student starts from its teacher"),
    ],
)
def test_what_is_wrong_with_objectives_of_layers_is_named(overrides, message):
    with pytest.raises(UserError) as error:
        load_config("minilm", overrides, teacher="t", corpus="c")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_masking_is_wanted_by_what_trains_a_masked_language_model():
    unmasked = ["masking=null", "objectives.0.ce_weight=0", "objectives.0.positions=all"]
    assert load(*unmasked).masking is None
    with pytest.raises(UserError, match="masking: baseline trains a masked language model and needs it"):
        load(*unmasked, "baseline=true")
    config = load_config("minilm", ["masking.probability=0.2"], teacher="t", corpus="c")
    assert config.masking.probability == 0.2


def test_a_configuration_with_layers_reads_back(tmp_path: Path):
    objectives = "objectives=[{name: hidden, layers: [[0, 3]]}, {name: attention_transfer, layers: last}]"
    config = load_config("minilm", [objectives], teacher="t", corpus="c")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert read_config(file) == config
    assert config.objectives[0].layers == [[0, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distilbert", [], None, "c"), "recipe distilbert needs a teacher: --teacher ID_OR_DIR"),
        (("distilbert", [], "t", None), "recipe distilbert needs a corpus: --corpus ID_OR_PATH"),
        (("mlm", [], None, "c"), "recipe mlm needs a model to train: --teacher ID_OR_DIR"),
        (("mlm", ["baseline=true"], "t", "c"), "baseline: a run without a teacher is its own baseline"),
        (("quickstart", [], "t", None), "recipe quickstart trains its own teacher"),
    ],
)
def test_what_a_recipe_lacks_is_named(arguments, message):
    recipe, overrides, teacher, corpus = arguments
    with pytest.raises(UserError) as error:
        load_config(recipe, overrides, teacher=teacher, corpus=corpus)
    assert message in str(error.value)


def test_overrides_are_yaml_and_numbers_may_lack_a_dot():
    config = load("optimizer.lr=1e-4", "objectives.0.positions=masked", "student.teacher_layers=[0, 3]",
                  "student.num_layers=2", "data.validation=null")  # fmt: skip
    assert config.optimizer.lr == 1e-4
    assert config.objectives[0].positions == "masked"
    assert config.student.teacher_layers == [0, 3]


def test_steps_replace_the_epochs_of_a_recipe():
    assert load().run.epochs == 3
    run = load("run.steps=7").run
    assert (run.steps, run.epochs) == (7, None)


def test_the_model_that_mlm_adapts_is_the_one_given_as_teacher():
    config = load_config("mlm", teacher="t", corpus="c")
    assert (config.teacher, config.student.from_model) == (None, "t")
    assert not config.uses_teacher


def test_a_resolved_configuration_reads_back_and_differences_are_named(tmp_path: Path):
    config = load()
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert read_config(file) == config
    moved = config.model_copy(update={"output": Path("elsewhere")})
    assert first_difference(config, moved) is None
    assert config.fingerprint() == moved.fingerprint()
    other = load("objectives.1.weight=2")
    assert first_difference(config, other) == "objectives.1.weight was 1.0, is 2.0"
    assert config.fingerprint() != other.fingerprint()


def test_a_recipe_may_be_a_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    plain = {"objectives": [{"name": "vocabulary", "kd_weight": 0, "ce_weight": 1}], "run": {"steps": 2}}
    file.write_text(yaml.safe_dump(plain))
    config = load_config(str(file), teacher="t", corpus="c")
    assert (config.recipe, config.run.steps, str(config.output)) == ("mine", 2, "runs/mine")
