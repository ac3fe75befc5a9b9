import re
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
        (
            ["student.num_layers=4", "student.teacher_layers=[0, 3]"],
            "student.teacher_layers names 2 layers, student.num_layers is 4",
        ),
        (
            ["student.teacher_layers=last"],
            "student.teacher_layers: must be first, spread or a list of layers",
        ),
        (["student.teacher_layers=[0, a]"], "student.teacher_layers: must be first, spread or a list"),
        (["objectives=[]"], "objectives: name at least one"),
        (["objectives=[{weight: 1}]"], "objectives.0.name is missing: one of vocabulary, cosine, relations"),
        (["objectives=[cosine]"], "objectives.0 is a section of keys, got 'cosine'"),
        (["objectives=cosine"], "objectives: input should be a valid list, got 'cosine'"),
        (["run=5"], "run is a section of keys, got 5"),
        (["student=null"], "student is a section of keys, got None"),
        (["student.bilstm=[3]"], "student.bilstm is a section of keys, got [3]"),
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
            ["objectives=[{name: hidden, layers: middle}]"],
            "objectives.0.layers: must be one of uniform, skip, last, first, top or a list of "
            "[student layer, teacher layer], got 'middle'",
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


def staged(*overrides: str, task: str = "sst2", **keywords):
    return load_config("tinybert-task", overrides, teacher="t", task=task, **keywords)


def test_a_stage_takes_over_what_it_does_not_say():
    """Sections are merged key by key; a list of objectives is a stage's own."""
    config = staged("optimizer.eps=1e-5", "run.log_every=3", "run.batch_size=9")
    first, second = config.stages
    assert (first.name, second.name) == ("intermediate", "prediction")
    assert (first.optimizer.lr, second.optimizer.lr) == (5e-5, 3e-5)
    assert (first.optimizer.eps, second.optimizer.eps) == (1e-5, 1e-5)
    assert (first.run.epochs, second.run.epochs) == (10, 3)
    assert (first.run.log_every, second.run.log_every, second.run.batch_size) == (3, 3, 9)
    assert first.augment == second.augment == config.augment
    assert (first.schedule.name, second.schedule.name) == ("constant", "linear")
    assert [o.name for o in second.objectives] == ["prediction"]


def test_an_override_reaches_into_a_stage():
    first, second = staged(
        "stages.0.run.steps=5", "stages.1.optimizer.lr=1e-5", "stages.0.objectives.1.weight=4"
    ).stages
    assert (first.run.steps, first.run.epochs) == (5, None)
    assert (second.run.steps, second.run.epochs) == (None, 3)
    assert (first.optimizer.lr, second.optimizer.lr) == (5e-5, 1e-5)
    assert [o.name for o in first.objectives] == ["attention_transfer", "hidden", "embeddings"]
    assert first.objectives[1].weight == 4


def test_steps_at_the_top_give_way_to_the_epochs_of_a_stage():
    first, second = staged("stages.0.run.steps=3", "stages.1.run.epochs=2", "run.steps=4").stages
    assert (first.run.steps, first.run.epochs) == (3, None)
    assert (second.run.steps, second.run.epochs) == (None, 2)


@pytest.mark.parametrize("task", ["mrpc", "imdb"])
@pytest.mark.parametrize(
    ("override", "key"), [("run.epochs=1", "epochs"), ("run.steps=1", "steps"), ("run={steps: 1}", "steps")]
)
def test_an_override_of_the_whole_recipe_is_one_of_each_stage(task, override, key):
    """Of tinybert-task the second stage has epochs of its own, and the first one on mrpc, but not on imdb."""
    for stage in staged(override, task=task).stages:
        assert (stage.run.steps, stage.run.epochs) == ((1, None) if key == "steps" else (None, 1))


@pytest.mark.parametrize("task", ["mrpc", "imdb"])
@pytest.mark.parametrize("first", [True, False])
def test_an_override_of_a_stage_wins_over_one_of_the_recipe_wherever_it_stands(task, first):
    own, whole = ["stages.1.run.epochs=2", "stages.1.optimizer.lr=9e-6"], ["run.steps=7", "optimizer.lr=1e-4"]
    one, other = staged(*(own + whole if first else whole + own), task=task).stages
    assert (one.run.steps, one.run.epochs, one.optimizer.lr) == (7, None, 1e-4)
    assert (other.run.steps, other.run.epochs, other.optimizer.lr) == (None, 2, 9e-6)


def test_an_override_of_one_key_leaves_the_rest_of_a_stages_section():
    first, second = staged("optimizer.lr=7e-4", "schedule.warmup=0.3").stages
    assert (first.optimizer.lr, second.optimizer.lr) == (7e-4, 7e-4)
    assert (first.schedule.name, first.schedule.warmup) == ("constant", 0.3)
    assert (second.schedule.name, second.schedule.warmup) == ("linear", 0.3)
    assert (first.optimizer.weight_decay, second.optimizer.weight_decay) == (0.01, 0.01)


def test_steps_reach_a_layerwise_stage_and_epochs_are_refused_there():
    first, second = load_config("mobilebert", ["run.steps=2"], teacher="t", corpus="c").stages
    assert (first.run.steps, second.run.steps) == (2, 2)
    with pytest.raises(UserError, match=r"stages\.0\.run\.steps: a layerwise stage needs it, for each layer"):
        load_config("mobilebert", ["run.epochs=2"], teacher="t", corpus="c")
    keys = ["stages.0.run.steps=5", "run.epochs=2"]
    first, second = load_config("mobilebert", keys, teacher="t", corpus="c").stages
    assert (first.run.steps, second.run.epochs) == (5, 2)


def test_a_teacher_of_the_run_is_not_one_of_a_stage():
    config = staged("stages.0.teacher=own", "teacher=t")
    assert (config.teacher, config.stages[0].teacher) == ("t", "own")


def test_the_task_may_be_named_by_an_override():
    """Its own epochs and copies are those of `--task`."""
    named = load_config("tinybert-task", ["task.name=mrpc"], teacher="t")
    asked = load_config("tinybert-task", teacher="t", task="mrpc")
    assert named.stages == asked.stages
    assert named.task == asked.task


@pytest.mark.parametrize(("recipe", "task", "length"), [("kd", "squad", 384), ("pkd", "sst2", 128)])
def test_the_length_of_an_example_is_that_of_its_task(recipe: str, task: str, length: int):
    assert load_config(recipe, teacher="t", task=task).task.max_length == length
    assert load_config(recipe, ["task.max_length=64"], teacher="t", task=task).task.max_length == 64


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "mobilebert",
            ["optimizer.betas=[1.5, 0.9]"],
            "optimizer.betas.0: input should be less than 1, got 1.5",
        ),
        ("mobilebert", ["data=texts"], "data is a section of keys, got 'texts'"),
        ("mobilebert", ["stages.1.teacher=t2"], "stages.1.teacher: a run on text alone has one teacher"),
        (
            "bilstm",
            ["augment.mask_probability=0.7", "augment.pos_probability=0.7"],
            "augment: mask_probability + pos_probability must be at most 1, got 1.4",
        ),
    ],
)
def test_keys_that_do_nothing_or_do_not_go_together(recipe: str, overrides: list[str], message: str):
    where = {"task": "sst2"} if recipe == "bilstm" else {"corpus": "c"}
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(recipe, overrides, teacher="t", **where)


def test_a_stage_may_leave_out_what_the_top_has():
    first, second = staged("stages.1.augment=null").stages
    assert first.augment.copies == 20
    assert second.augment is None


def test_a_configuration_of_stages_reads_back(tmp_path: Path):
    config = staged("stages.0.run.steps=5", "stages.1.augment=null", "masking.probability=0.2",
                    "stages.0.masking=null", f"stages.0.data.cache_dir={tmp_path}")  # fmt: skip
    assert config.stages[0].masking is None
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert read_config(file) == config
    other = staged("stages.0.run.steps=6", "stages.1.augment=null", "masking.probability=0.2",
                   "stages.0.masking=null")  # fmt: skip
    assert first_difference(config, other) == "stages.0.run.steps was 5, is 6"
    # Neither the cache's place nor leave to learn from a weak teacher makes another run.
    same = staged("stages.0.run.steps=5", "stages.1.augment=null", "masking.probability=0.2",
                  "stages.0.masking=null", "allow_weak_teacher=true")  # fmt: skip
    assert first_difference(config, same) is None
    assert config.fingerprint() == same.fingerprint()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.0.run.stps=3"], "unknown key stages.0.run.stps: did you mean stages.0.run.steps?"),
        (
            ["stages.1.optimizer.learning_rate=3"],
            "unknown key stages.1.optimizer.learning_rate: known: name, lr, betas",
        ),
        (["stages.0.layer_wise=true"], "unknown key stages.0.layer_wise: did you mean stages.0.layerwise?"),
        (["stages.1.objectives.0.temp=3"], "did you mean stages.1.objectives.0.temperature?"),
        (
            ["stages.0.augment.copy=3"],
            "unknown key stages.0.augment.copy: did you mean stages.0.augment.copies?",
        ),
        (["task.max_len=3"], "unknown key task.max_len: did you mean task.max_length?"),
        (["stages.2.run.steps=3"], "stages.2.run.steps: expected an index from 0 to 1, got '2'"),
        (["stages.1.run.steps=0"], "stages.1.run.steps: input should be greater than or equal to 1, got 0"),
        (["stages.0.reads=texts"], "stages.0.reads: input should be 'text' or 'task', got 'texts'"),
        (["stages.0.name=A b"], "stages.0.name: string should match pattern"),
        (["stages.0.name=prediction"], "stages: prediction is given twice"),
        (["stages.0.name=baseline"], "stages.0.name: baseline is another folder of the run"),
        (["stages.0.name=student"], "stages.0.name: student is another folder of the run"),
        (["stages.0.objectives=[]"], "stages.0.objectives: name at least one"),
        (["stages.0.run=3"], "stages.0.run is a section of keys, got 3"),
        (
            ["objectives.0.weight=2"],
            "objectives.0.weight: each stage has objectives of its own; set stages.N.objectives.0.weight",
        ),
        (
            ["stages.0.objectives=[{name: vocabulary}]"],
            "stages.0.objectives.0: vocabulary reads masked text, but this stage reads a task",
        ),
        (
            ["stages.0.objectives.1.name=attention_transfer", "stages.0.objectives.1.projection=null"],
            "unknown key stages.0.objectives.1.projection",
        ),
        (["stages.1.run.precision=bf16"], "stages.1.run.precision: it is the same for all stages"),
        (["stages.1.layerwise=true"], "stages.1.layerwise: none of its objectives compares layers"),
        (["stages.0.layerwise=true"], "stages.0.run.steps: a layerwise stage needs it, for each layer"),
        (["student.teacher_layers=[0]", "student.num_layers=2"], "student.teacher_layers names 1 layers"),
        (["run.head_warmup_steps=1"], "run.head_warmup_steps is for a masked language model"),
    ],
)
def test_what_is_wrong_with_a_stage_is_named(overrides, message):
    with pytest.raises(UserError) as error:
        staged(*overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


TEXT = "stages.1={name: general, reads: text, data: {corpus: c}, objectives: [{name: hidden}]}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([TEXT, "augment=null"], "task: the last stage of the recipe reads text; leave the task out"),
        (
            [TEXT.replace("stages.1", "stages.0")],
            "stages.0.augment: makes examples of a task, but this stage reads text",
        ),
        (
            [TEXT.replace("stages.1", "stages.0").replace("hidden", "prediction"), "augment=null"],
            "stages.0.objectives.0: prediction compares a task's logits; text has none",
        ),
        (
            [TEXT.replace("stages.1", "stages.0").replace("data: {corpus: c}, ", ""), "augment=null"],
            "recipe tinybert-task needs a corpus: --corpus ID_OR_PATH",
        ),
    ],
)
def test_a_stage_on_text_of_a_run_on_a_task_is_checked(overrides, message):
    with pytest.raises(UserError) as error:
        staged(*overrides)
    assert message in str(error.value)


def test_text_without_a_teacher_has_one_stage():
    stage = "{name: %s, reads: text, objectives: [{name: vocabulary, kd_weight: 0, ce_weight: 1}]}"
    keys = [f"stages=[{stage % 'short'}, {stage % 'long'}]", "run.head_warmup_steps=0"]
    with pytest.raises(UserError, match="stages: without a teacher, text is read in one"):
        load_config("mlm", keys, teacher="t", corpus="c")


@pytest.mark.parametrize(
    ("recipe", "keywords", "message"),
    [
        ("kd", {"teacher": "t"}, "recipe kd needs a task: --task NAME (sst2, mrpc, ...)"),
        ("kd", {"task": "sst2"}, "recipe kd needs a teacher: --teacher ID_OR_DIR"),
        ("finetune", {"task": "sst2"}, "recipe finetune needs a model to train: --teacher ID_OR_DIR"),
        ("kd", {"teacher": "t", "task": "sst3"}, "unknown task 'sst3'; did you mean 'sst2'?"),
        ("distilbert", {"teacher": "t", "corpus": "c", "task": "sst2"}, "recipe distilbert reads text"),
        ("tinybert-task:topp", {"teacher": "t", "task": "sst2"}, "has the variants no-augmentation, no-att"),
        ("finetune:large", {"teacher": "t", "task": "sst2"}, "recipe finetune has no variants, not 'large'"),
        ("kd", {"teacher": "t", "data": "d"}, "task.name is missing: --task NAME (sst2, mrpc, ...)"),
        (
            "kd",
            {"teacher": "t", "task": "sst2", "corpus": "c"},
            "--corpus: recipe kd reads the task's examples alone; leave it out",
        ),
        (
            "tinybert-task",
            {"teacher": "t", "task": "sst2", "corpus": "c"},
            "--corpus: recipe tinybert-task reads the task's examples alone",
        ),
    ],
)
def test_what_a_recipe_for_a_task_lacks_is_named(recipe, keywords, message):
    with pytest.raises(UserError) as error:
        load_config(recipe, **keywords)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_recipe_says_of_a_task_goes_before_the_variant_and_that_before_the_overrides(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    plain = {
        "objectives": [{"name": "prediction", "kd_weight": 0, "task_weight": 1}],
        "run": {"steps": 1},
        "tasks": {"mrpc": {"run.epochs": 2, "optimizer.lr": 2e-3, "optimizer.eps": 2e-3}},
        "variants": {"other": {"optimizer.lr": 3e-3, "optimizer.eps": 3e-3}},
    }
    file.write_text(yaml.safe_dump(plain))

    def load(which: str, *overrides: str, task: str):
        return load_config(f"{file}{which}", overrides, teacher="t", task=task)

    assert load("", task="sst2").run.steps == 1
    assert load("", task="mrpc").run.epochs == 2
    assert load("", task="mrpc").run.steps is None
    config = load(":other", "optimizer.eps=4e-3", task="mrpc")
    assert (config.optimizer.lr, config.optimizer.eps) == (3e-3, 4e-3)
    assert (config.recipe, str(config.output)) == ("mine:other", "runs/mine-other-mrpc")


@pytest.mark.parametrize("spelling", ["stsb", "STS-B", "sts-b"])
def test_a_task_has_its_settings_however_it_is_spelt(spelling):
    config = staged(task=spelling)
    assert (config.task.name, config.stages[0].run.epochs) == ("stsb", 20)
    assert str(config.output) == "runs/tinybert-task-stsb"


def test_task_and_data_are_the_names_of_a_task_and_its_folder():
    config = load_config("kd", ["task.max_length=64"], teacher="t", task="rte", data="d")
    assert (config.task.name, config.task.data, config.task.max_length) == ("rte", "d", 64)
    assert (config.teacher, config.student.from_model) == ("t", None)
    assert config.uses_teacher
    assert not config.uses_vocabulary


def test_a_task_student_may_start_from_another_model_than_its_teacher():
    config = load_config("kd", ["student.from_model=e"], teacher="t", task="rte")
    assert (config.teacher, config.student.from_model) == ("t", "e")


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("kd", ["task.name=mrpc"], "--task sst2 and task.name=mrpc contradict each other: give one of them"),
        ("kd", ["task.data=other"], "--data d and task.data=other contradict each other"),
        ("kd", ["teacher=u"], "--teacher t and teacher=u contradict each other"),
        ("finetune", ["student.from_model=u"], "--teacher t and student.from_model=u contradict each other"),
    ],
)
def test_an_option_and_an_override_that_contradict_each_other_are_refused(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(recipe, overrides, teacher="t", task="sst2", data="d")


def test_an_option_and_an_override_may_say_the_same():
    config = load_config(
        "kd", ["task.name=SST-2", "task.data=d", 'teacher="t"'], teacher="t", task="sst2", data="d"
    )
    assert (config.task.name, config.task.data, config.teacher) == ("sst2", "d", "t")
    config = load_config("distilbert", ["data.corpus=c"], teacher="t", corpus="c")
    assert config.data.corpus == "c"
    with pytest.raises(UserError, match=r"--corpus c and data\.corpus=d contradict each other"):
        load_config("distilbert", ["data.corpus=d"], teacher="t", corpus="c")


def test_the_same_paths_spelt_otherwise_are_the_same_run(tmp_path, monkeypatch):
    """Those of the top, of stages and of their sections; names on the hub and addresses are left alone."""
    for folder in ("m/own", "m/mlm", "m/e", "data", "x"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    keys = ["stages.0.teacher={0}m/own{1}", "augment.masked_lm={0}m/mlm{1}", "student.from_model={0}m/e{1}"]

    def spelt(before: str, after: str):
        own = [key.format(before, after) for key in keys]
        return staged(*own, data=f"{before}data{after}")

    plain = spelt("", "")
    for before, after in (("./", ""), ("", "/"), ("x/../", "//"), (".//", "/.")):
        other = spelt(before, after)
        assert first_difference(plain, other) is None
        assert plain.fingerprint() == other.fingerprint()
    assert first_difference(plain, spelt("other/", "")) is not None
    urls = [load("data.validation=hf://a/b"), load("data.validation=hf:/a/b")]
    assert first_difference(*urls) == "data.validation was 'hf://a/b', is 'hf:/a/b'"


def test_the_identity_of_normal_paths_is_the_configuration_itself():
    """Digests of earlier runs depend on it."""
    config = staged("augment.masked_lm=m/mlm", "student.from_model=org/name", data="../shared/data")
    left_out = {
        "output",
        "allow_weak_teacher",
        "description",
        "paper",
        "equations",
        "checked_against",
        "measured",
    }
    plain = config.model_dump(mode="json", exclude=left_out)
    for section in (plain, *plain["stages"]):
        del section["data"]["cache_dir"]
    assert config.identity() == plain
