import re
from pathlib import Path

import pytest

import fastdistil
from fastdistil.data.tasks import find_task
from fastdistil.errors import UserError
from fastdistil.models.layers import layer_pairs
from fastdistil.recipes import list_recipes, load_recipe
from fastdistil.train.config import first_difference, load_config
from fastdistil.train.students import with_layers

RECIPES = list_recipes()
ON_TASK = {"bilstm", "distilbert-task", "finetune", "kd", "pkd", "recover", "tinybert-task"}
TASKS = ("cola", "mnli", "mrpc", "sst2", "stsb", "qqp", "qnli", "rte")


def load(name: str, *overrides: str, task: str = "sst2"):
    """A recipe with all that it must be given."""
    teacher = None if name == "quickstart" else "t"
    if name.partition(":")[0] in ON_TASK:
        return load_config(name, overrides, teacher=teacher, task=task)
    return load_config(name, overrides, teacher=teacher, corpus="c")


def test_these_are_the_recipes():
    assert [r.name for r in RECIPES] == [
        "bert", "bilstm", "distilbert", "distilbert-task", "finetune", "kd", "minilm", "mlm", "mobilebert",
        "pkd", "quickstart", "recover", "tinybert-general", "tinybert-task",
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_recipe_names_itself_its_source_and_fits_the_schema(recipe):
    assert recipe.description
    assert recipe.paper
    assert recipe.checked_against
    # Of a distilled student the terms of the loss are those of an equation.
    assert recipe.equations or recipe.name in ("finetune", "mlm", "quickstart")
    config = load(recipe.name)
    assert config.recipe == recipe.name
    assert (config.task is not None) == (recipe.name in ON_TASK)
    # Room for comments: a recipe is read, and each of its keys is one of the schema.
    assert load_recipe(recipe.name).keys() <= {*type(config).model_fields, "tasks", "variants", "grid"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_recipe_was_measured(recipe):
    """There are results of our own, whose page names it."""
    page = Path(__file__).parents[2] / recipe.measured / "README.md"
    assert re.search(rf"(?<![\w-]){recipe.name}(?![\w-])", page.read_text(encoding="utf-8"))


VARIANTS = [(recipe.name, variant) for recipe in RECIPES for variant in recipe.variants]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_variant_is_another_run_in_another_folder(name, variant):
    config, plain = load(f"{name}:{variant}"), load(name)
    assert config.recipe == f"{name}:{variant}"
    where = "-sst2" if name in ON_TASK else ""
    assert str(config.output) == f"runs/{name}-{variant}{where}"
    assert first_difference(plain.model_copy(update={"recipe": config.recipe}), config) is not None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_the_grid_of_a_recipe_can_be_set_and_holds_what_it_is_set_to(recipe):
    for key, values in (load_recipe(recipe.name).get("grid") or {}).items():
        for value in values:
            plain = load(recipe.name, f"{key}={value}").model_dump()
            for part in key.split("."):
                plain = plain[int(part) if part.isdigit() else part]
            assert plain == value


@pytest.mark.parametrize("name", sorted(ON_TASK))
@pytest.mark.parametrize("task", [*TASKS, "wnli", "imdb", "snli", "squad", "race", "dream"])
def test_a_recipe_for_tasks_fits_each_of_them(name, task):
    assert load(name, task=task).task.name == task


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
    assert with_layers(config.student, 12, 12).teacher_layers == [0, 2, 4, 7, 9, 11]


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


def adamw(config) -> tuple[float, tuple[float, float], float]:
    assert config.optimizer.name == "adamw"
    return config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay


def test_pkd_is_the_published_recipe():
    """Sun et al. 2019, section 4.2, and their code."""
    config = load("pkd")
    prediction, patient = config.objectives
    assert prediction.kd_weight + prediction.task_weight == 1
    assert prediction.distance == "kl"
    # [CLS] alone, divided by its norm, without a projection; each layer but the last.
    assert (patient.tokens, patient.normalize, patient.projection) == ("first", True, False)
    assert (patient.layers, patient.layer_reduction) == ("skip", "mean")
    assert layer_pairs(patient.layers, 6, 12) == ((0, 1), (1, 3), (2, 5), (3, 7), (4, 9))
    assert (config.run.epochs, config.run.batch_size, config.task.max_length) == (4, 32, 128)
    assert with_layers(config.student, 12, 12).teacher_layers == [0, 1, 2, 3, 4, 5]
    assert config.baseline
    assert load_recipe("pkd")["grid"] == {
        "optimizer.lr": [5e-5, 2e-5, 1e-5],
        "objectives.0.temperature": [5, 10, 20],
        "objectives.0.kd_weight": [0.2, 0.5, 0.7],
        "objectives.1.weight": [10, 100, 500, 1000],
    }
    grid = load_recipe("pkd")["grid"]
    assert config.optimizer.lr in grid["optimizer.lr"]
    assert prediction.temperature in grid["objectives.0.temperature"]
    assert prediction.kd_weight in grid["objectives.0.kd_weight"]
    assert patient.weight in grid["objectives.1.weight"]


@pytest.mark.parametrize("recipe", ["kd", "pkd"])
def test_each_alpha_of_the_grid_weighs_labels_and_logits(recipe):
    default, *others = (
        load(name).objectives[0] for name in (recipe, f"{recipe}:alpha-0.2", f"{recipe}:alpha-0.7")
    )
    alphas = [prediction.kd_weight for prediction in (others[0], default, others[1])]
    assert alphas == load_recipe(recipe)["grid"]["objectives.0.kd_weight"]
    for prediction in (default, *others):
        assert prediction.task_weight == pytest.approx(1 - prediction.kd_weight)


def test_pkd_has_the_variants_of_the_paper():
    last = load("pkd:last").objectives[1]
    assert layer_pairs(last.layers, 6, 12) == ((0, 6), (1, 7), (2, 8), (3, 9), (4, 10))
    for name, mapping in (("pkd:3-layers", "skip"), ("pkd:3-layers-last", "last")):
        config = load(name)
        assert with_layers(config.student, 12, 12).teacher_layers == [0, 1, 2]
        assert config.objectives[1].layers == mapping


@pytest.mark.parametrize("depth", [4, 5, 6, 7, 12, 24])
@pytest.mark.parametrize("variant", ["", ":last"])
def test_the_layers_of_pkd_are_pairs_whatever_the_depth(variant, depth):
    """Each of the student's but the last has another of the teacher's, in their order."""
    config = load(f"pkd{variant}")
    layers = with_layers(config.student, depth, depth).teacher_layers
    assert layers == list(range(depth // 2))
    ours, theirs = zip(*layer_pairs(config.objectives[1].layers, len(layers), depth), strict=True)
    assert ours == tuple(range(len(layers) - 1))
    assert list(theirs) == sorted(set(theirs))
    assert theirs[-1] < depth - 1


def test_kd_is_the_baseline_of_the_same_paper():
    config, pkd = load("kd"), load("pkd")
    assert config.objectives == pkd.objectives[:1]
    assert (config.optimizer, config.schedule, config.run) == (pkd.optimizer, pkd.schedule, pkd.run)
    assert config.student == pkd.student
    assert load("kd:3-layers").student == load("pkd:3-layers").student
    grid = load_recipe("pkd")["grid"]
    del grid["objectives.1.weight"]
    assert load_recipe("kd")["grid"] == grid


def test_tinybert_general_is_the_published_recipe():
    """Jiao et al. 2020, section 4.1, and general_distill.py."""
    config = load("tinybert-general")
    attention, hidden, embeddings = config.objectives
    assert (attention.name, attention.distance, attention.layers, attention.weight) == (
        "attention_transfer", "mse", "uniform", 1
    )  # fmt: skip
    assert (hidden.layers, hidden.projection, hidden.weight, hidden.normalize) == ("uniform", True, 1, False)
    assert (embeddings.share_projection, embeddings.weight) == (True, 1)
    assert layer_pairs("uniform", 4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))
    student = config.student
    sizes = (student.num_layers, student.hidden_size, student.intermediate_size, student.num_attention_heads)
    assert sizes == (4, 312, 1200, 12)
    assert student.init == "random"
    assert config.masking is None
    assert adamw(config) == (5e-5, (0.9, 0.999), 0.01)
    assert (config.schedule.name, config.schedule.warmup) == ("linear", 0.1)
    assert (config.run.epochs, config.run.batch_size, config.data.max_length) == (3, 256, 128)
    student = load("tinybert-general:6-layers").student
    sizes = (student.num_layers, student.hidden_size, student.intermediate_size, student.num_attention_heads)
    assert sizes == (6, 768, 3072, 12)


EPOCHS = {"cola": 50, "mnli": 5, "mrpc": 20, "sst2": 10, "stsb": 20, "qqp": 5, "qnli": 10, "rte": 20}
COPIES = {"cola": 30, "mnli": 10, "mrpc": 30, "sst2": 20, "qqp": 10, "qnli": 20, "rte": 30}


@pytest.mark.parametrize("task", TASKS)
def test_tinybert_task_is_the_published_recipe(task):
    """Jiao et al. 2020, section 4.1 and appendix A, task_distill.py and data_augmentation.py."""
    config = load("tinybert-task", task=task)
    intermediate, prediction = config.stages
    assert intermediate.objectives == load("tinybert-general").objectives
    assert adamw(intermediate) == (5e-5, (0.9, 0.999), 0.01)
    assert (intermediate.schedule.name, intermediate.schedule.warmup) == ("constant", 0)
    assert (intermediate.run.epochs, intermediate.run.batch_size) == (EPOCHS[task], 32)
    (logits,) = prediction.objectives
    # The paper's cross entropy with the teacher's distribution is this less a constant; no hard labels.
    assert (logits.distance, logits.temperature) == ("kl", 1)
    assert (logits.kd_weight, logits.task_weight) == (1, 0)
    assert adamw(prediction) == (3e-5, (0.9, 0.999), 0.01)
    assert (prediction.schedule.name, prediction.schedule.warmup) == ("linear", 0.1)
    assert (prediction.run.epochs, prediction.run.batch_size) == (3, 32)
    for stage in config.stages:
        augment = stage.augment
        assert (augment.method, augment.probability, augment.num_candidates) == ("tinybert", 0.4, 15)
        # STS-B is not in the published list: as many as the other small tasks have.
        assert augment.copies == COPIES.get(task, 30)
    assert config.task.max_length == 128


def test_tinybert_task_has_the_ablations_of_the_paper():
    """Tables 3 and 4: without a part, and other layer mappings."""

    def names(variant: str) -> list[list[str]]:
        return [[o.name for o in stage.objectives] for stage in load(f"tinybert-task:{variant}").stages]

    attention, hidden, embeddings = "attention_transfer", "hidden", "embeddings"
    assert names("no-attention") == [[hidden, embeddings], ["prediction"]]
    assert names("no-hidden") == [[attention, embeddings], ["prediction"]]
    assert names("no-embeddings") == [[attention, hidden], ["prediction"]]
    (labels,) = load("tinybert-task:no-prediction").stages[1].objectives
    assert (labels.kd_weight, labels.task_weight) == (0, 1)
    assert [s.augment for s in load("tinybert-task:no-augmentation", task="mrpc").stages] == [None, None]
    expected = {"top": ((0, 8), (1, 9), (2, 10), (3, 11)), "bottom": ((0, 0), (1, 1), (2, 2), (3, 3))}
    for variant, pairs in expected.items():
        for objective in load(f"tinybert-task:{variant}").stages[0].objectives[:2]:
            assert layer_pairs(objective.layers, 4, 12) == pairs


@pytest.mark.parametrize(("task", "copies"), [*((t, 10) for t in TASKS), ("snli", 10), ("imdb", 20)])
def test_bilstm_is_the_published_recipe(task, copies):
    """Tang et al. 2019, sections 3 and 4.2."""
    config = load("bilstm", task=task)
    (logits,) = config.objectives
    assert (logits.distance, logits.kd_weight, logits.task_weight) == ("mse", 1, 0)
    student = config.student
    assert (student.architecture, student.bilstm.hidden_size, student.bilstm.fc_size) == ("bilstm", 150, 200)
    assert student.dropout == 0.1
    augment = config.augment
    assert (augment.mask_probability, augment.pos_probability, augment.ngram_probability) == (0.1, 0.1, 0.25)
    assert augment.method == "bilstm"
    single = len(find_task(task).columns) == 1
    assert augment.copies == (20 if single else copies)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.rho) == ("adadelta", 1, 0.95)
    assert config.run.batch_size == 50
    sizes = load("bilstm:large").student.bilstm
    assert (sizes.hidden_size, sizes.fc_size) == (300, 400)


def test_mobilebert_is_the_published_recipe():
    """Sun et al. 2020, sections 3 and 4; but 144 wide inside, for twelve heads."""
    config = load("mobilebert")
    transfer, distillation = config.stages
    assert transfer.layerwise
    assert not distillation.layerwise
    maps, attention = transfer.objectives
    assert (maps.feature_weight, maps.mean_weight, maps.variance_weight) == (100, 5000, 5)
    assert (attention.distance, attention.weight) == ("kl", 1)
    assert maps.layers == attention.layers == "uniform"
    assert 24 * transfer.run.steps == 240_000
    (vocabulary,) = distillation.objectives
    assert (vocabulary.kd_weight, vocabulary.ce_weight, vocabulary.temperature) == (0.5, 0.5, 1)
    assert vocabulary.positions == "masked"
    assert distillation.run.steps == 500_000
    assert distillation.run.batch_size == transfer.run.batch_size == 4096
    student = config.student
    assert (student.architecture, student.num_layers, student.hidden_size) == ("mobilebert", None, None)
    sizes = student.mobilebert
    assert (sizes.num_feedforward_networks, sizes.embedding_size) == (4, 128)
    assert sizes.bottleneck_size % 12 == 0
    for stage in config.stages:
        assert (stage.masking.probability, stage.masking.mask, stage.masking.random) == (0.15, 0.8, 0.1)
        assert (stage.schedule.name, stage.schedule.warmup) == ("linear", 0.04)


def test_distilbert_task_is_the_published_second_stage():
    """run_squad_w_distillation.py: 0.5 of each, T = 2, and three epochs of batches of 12 at 3e-5."""
    config = load("distilbert-task", task="squad")
    (prediction,) = config.objectives
    assert (prediction.kd_weight, prediction.task_weight, prediction.temperature) == (0.5, 0.5, 2)
    assert prediction.divergence == "forward_kl"
    assert (config.run.epochs, config.run.batch_size, config.optimizer.lr) == (3, 12, 3e-5)
    assert config.task.max_length == 384
    assert load("distilbert-task").task.max_length == 128


def test_finetune_is_in_the_grid_of_the_paper():
    """Devlin et al. 2019, appendix A.3."""
    config = load("finetune")
    (labels,) = config.objectives
    assert (labels.kd_weight, labels.task_weight) == (0, 1)
    assert config.optimizer.lr in (5e-5, 4e-5, 3e-5, 2e-5)
    assert config.run.epochs in (2, 3, 4)
    assert config.run.batch_size in (16, 32)
    assert adamw(config)[1:] == ((0.9, 0.999), 0.01)
    assert (config.schedule.name, config.schedule.warmup) == ("linear", 0.1)
    assert not config.uses_teacher
    assert config.student.from_model == "t"


def test_bert_is_the_published_pretraining():
    """Devlin et al. 2019, section 3.1 and appendix A.2."""
    config = load("bert")
    vocabulary, following = config.objectives
    assert (vocabulary.kd_weight, vocabulary.ce_weight, following.weight) == (0, 1, 1)
    masking = config.masking
    assert (masking.probability, masking.mask, masking.random, masking.keep) == (0.15, 0.8, 0.1, 0.1)
    assert not masking.whole_word
    assert masking.smoothing is None
    assert config.data.sentence_pairs
    assert config.data.short_probability == 0.1
    assert adamw(config) == (1e-4, (0.9, 0.999), 0.01)
    assert (config.run.steps, config.run.batch_size) == (1_000_000, 256)
    assert config.run.steps * config.schedule.warmup == 10_000
    assert config.schedule.name == "linear"
    assert load("bert:whole-word").masking.whole_word


@pytest.mark.parametrize("name", ["kd", "pkd", "bilstm", "tinybert-task", "distilbert-task"])
def test_a_task_is_also_learned_without_the_teacher(name):
    assert load(name).baseline


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_what_is_said_to_be_measured_is_there(recipe):
    if recipe.measured is not None:
        assert (Path(fastdistil.__file__).parents[1] / recipe.measured).exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("distillbert", "unknown recipe 'distillbert': did you mean distilbert?"),
        ("tinybert", "unknown recipe 'tinybert': did you mean tinybert-task?"),
        (
            "zzz",
            f"unknown recipe 'zzz': known: {', '.join(r.name for r in RECIPES)}, or a path to a .yaml file",
        ),
        ("no/such/file.yaml", "cannot read recipe no/such/file.yaml: there is no such file"),
    ],
)
def test_an_unknown_recipe_is_named(name, message):
    with pytest.raises(UserError) as error:
        load_recipe(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bilstm:larg", "recipe bilstm has the variants large, not 'larg'"),
        (
            "pkd:skip",
            "recipe pkd has the variants last, 3-layers, 3-layers-last, alpha-0.2, alpha-0.7, not 'skip'",
        ),
        ("minilm:large", "recipe minilm has no variants, not 'large'"),
    ],
)
def test_an_unknown_variant_is_named(name, message):
    with pytest.raises(UserError) as error:
        load(name)
    assert str(error.value) == message


@pytest.mark.parametrize(("text", "message"), [("- a\n", "must be a mapping"), ("a: [", "is not YAML")])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_recipe_file_is_said_in_plain_words(tmp_path):
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(UserError, match=r"a\.yaml: is a directory$"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"b\.yaml: it is not UTF-8 text$"):
        load_recipe(tmp_path / "b.yaml")


def test_a_recipe_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("run: {steps: 3}\n")
    assert load_recipe("~/mine.yaml") == {"run": {"steps": 3}}
