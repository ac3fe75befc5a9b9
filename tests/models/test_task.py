"""Models with the heads of tasks: what a folder has is kept, what it lacks is fresh or named in one line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from fastdistil.errors import UserError
from fastdistil.models.bilstm import make_bilstm
from fastdistil.models.student import make_student
from fastdistil.models.task import load_task_model

REAL_ENCODER = Path(__file__).parents[3] / "shared" / "models" / "encoder-12x384"
FAMILIES = ["bert", "roberta", "distilbert", "electra", "modernbert", "mobilebert"]


def task(kind, *labels, columns=("sentence",), name="sst2"):
    return SimpleNamespace(
        name=name, argument=name, kind=kind, labels=labels, num_labels=len(labels), columns=columns
    )


NLI = task("classification", "entailment", "neutral", "contradiction", columns=("a", "b"), name="mnli")
SST2 = task("classification", "negative", "positive")
STSB = task("regression", columns=("a", "b"), name="stsb")
SQUAD = task("span", columns=("question", "context"), name="squad")
RACE = task("choice", *"ABCD", columns=("context", "question", *"ABCD"), name="race")
HEADS = {
    "mnli": (NLI, "SequenceClassification"),
    "stsb": (STSB, "SequenceClassification"),
    "squad": (SQUAD, "QuestionAnswering"),
    "race": (RACE, "MultipleChoice"),
}


def outputs(model, batch):
    """All logits, of the `inputs` that the model takes; a choice between two options."""
    if "MultipleChoice" in type(model).__name__:
        # As numbers: ModernBERT looks for the greatest of a mask here.
        batch = {name: value[None].long() for name, value in batch.items()}
    if model.config.model_type in ("distilbert", "modernbert", "roberta"):
        batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
    with torch.no_grad():
        return torch.stack(list(model.eval()(**batch).values()))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_is_put_on_the_encoder_of_a_masked_language_model(build, save, tiny_pair, family, name):
    original = build(family)
    which, head = HEADS[name]
    folder = save(original)
    model, tokenizer = load_task_model(folder, which, new_head=True)
    assert type(model) is type(build(family, head))
    assert not model.training
    assert tokenizer.sep_token_id == 3
    expected = original.base_model(tiny_pair["input_ids"], tiny_pair["attention_mask"]).last_hidden_state
    ours = model.base_model(tiny_pair["input_ids"], tiny_pair["attention_mask"]).last_hidden_state
    assert torch.equal(ours, expected)
    assert outputs(model, tiny_pair).isfinite().all()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_head_is_named_with_the_command_that_trains_one(build, save, family, name):
    folder = save(build(family))
    with pytest.raises(UserError) as caught:
        load_task_model(folder, HEADS[name][0], new_head=False)
    message = str(caught.value)
    assert message.startswith(f"{folder}: no trained head for {name} ('")
    head = "qa_outputs" if name == "squad" and family != "modernbert" else "classifier"
    assert head in message
    assert message.endswith(
        f"fine-tune one first: fastdistil train finetune --teacher {folder} --task {name}"
    )
    assert "\n" not in message


@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_head_is_kept(build, save, tiny_pair, family, name, new_head):
    which, head = HEADS[name]
    labels = {"mnli": 3, "squad": 2}.get(name, 1)
    trained = build(family, head, num_labels=labels)
    model, _ = load_task_model(save(trained), which, new_head=new_head)
    torch.testing.assert_close(outputs(model, tiny_pair), outputs(trained, tiny_pair), rtol=0, atol=1e-6)


def test_the_config_has_the_labels_of_the_task(build, save):
    folder = save(build("bert"))
    config = load_task_model(folder, NLI, new_head=True)[0].config
    assert config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}
    assert config.problem_type == "single_label_classification"
    config = load_task_model(folder, STSB, new_head=True)[0].config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert load_task_model(folder, SQUAD, new_head=True)[0].config.id2label == {0: "start", 1: "end"}


def test_an_encoder_without_pooler_gets_one(build, save):
    folder = save(build("bert").bert)  # of a masked language model, so without
    model, _ = load_task_model(folder, SST2, new_head=True)
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, build("bert").get_input_embeddings().weight
    )
    assert 0.01 < model.bert.pooler.dense.weight.std() < 0.04


def test_a_pooler_that_is_there_is_kept_and_one_alone_missing_is_named(build, save):
    trained = build("bert", "SequenceClassification")
    model, _ = load_task_model(save(trained.bert, "pooler"), SST2, new_head=True)
    assert torch.equal(model.bert.pooler.dense.weight, trained.bert.pooler.dense.weight)
    trained.bert.pooler = None
    with pytest.raises(UserError, match=r"no trained head for sst2 \('bert.pooler.dense' of Bert"):
        load_task_model(save(trained, "without"), SST2, new_head=False)


def test_a_head_of_another_size_is_named_or_fresh(build, save):
    trained = build("bert", "SequenceClassification", num_labels=3)
    folder = save(trained)
    with pytest.raises(UserError, match="its head 'classifier' is of size 3, but sst2 needs 2; fine-tune"):
        load_task_model(folder, SST2, new_head=False)
    model, _ = load_task_model(folder, SST2, new_head=True)
    assert model.classifier.weight.shape == (2, 16)
    assert 0.01 < model.classifier.weight.std() < 0.04
    assert model.classifier.bias.eq(0).all()
    assert torch.equal(model.bert.pooler.dense.weight, trained.bert.pooler.dense.weight)
    assert model.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.parametrize(("first", "other"), [("sst2", "stsb"), ("mnli", "stsb"), ("stsb", "sst2")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_a_classification_is_none_of_a_regression_nor_the_other_way_round(
    build, save, family, first, other
):
    """Both are a sequence classification to `transformers`, whose config says of which kind."""
    kinds = {"sst2": SST2, "mnli": NLI, "stsb": STSB}
    trained, _ = load_task_model(save(build(family)), kinds[first], new_head=True)
    folder = save(trained, "trained")
    assert "problem_type" in (folder / "config.json").read_text()
    sizes = {"sst2": 2, "mnli": 3, "stsb": 1}
    size = f"is of size {sizes[first]}, but {other} needs {sizes[other]}; fine-tune one first"
    with pytest.raises(UserError, match=size):
        load_task_model(folder, kinds[other], new_head=False)
    model, _ = load_task_model(folder, kinds[other], new_head=True)
    assert model.config.num_labels == sizes[other]
    assert model.config.problem_type == ("regression" if other == "stsb" else "single_label_classification")
    again, _ = load_task_model(save(model, "again"), kinds[other], new_head=False)
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("labels", [None, 3])
def test_a_fresh_head_is_drawn_from_the_global_random_state(build, save, labels):
    """Both one that is missing and one that is of another size."""
    folder = save(build("bert", "SequenceClassification", num_labels=labels) if labels else build("bert"))

    def classifier(seed):
        torch.manual_seed(seed)
        return load_task_model(folder, SST2, new_head=True)[0].classifier.weight

    assert torch.equal(classifier(3), classifier(3))
    assert not torch.equal(classifier(3), classifier(4))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_outputs_are_put_into_the_order_of_the_task(build, save, tiny_pair, family):
    names = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    trained = build(family, "SequenceClassification", num_labels=3)
    trained.config.id2label = dict(enumerate(names))
    trained.config.label2id = {name: i for i, name in enumerate(names)}
    folder = save(trained)
    model, _ = load_task_model(folder, NLI, new_head=False)
    torch.testing.assert_close(outputs(model, tiny_pair), outputs(trained, tiny_pair).flip(-1))
    # Once saved, they are in order.
    again, _ = load_task_model(save(model, "sorted"), NLI, new_head=False)
    assert torch.equal(outputs(again, tiny_pair), outputs(model, tiny_pair))


def test_weights_are_float32_whatever_the_file_has(build, save):
    folder = save(build("bert", "SequenceClassification").half())
    assert load_task_model(folder, SST2, new_head=False)[0].dtype == torch.float32
    assert load_task_model(folder, SST2, new_head=False, dtype=torch.float64)[0].dtype == torch.float64


def test_a_tokenizer_needs_no_mask_token_but_must_fit(build, save):
    model = build("bert")
    _, tokenizer = load_task_model(save(model, mask_token=None), SST2, new_head=True)
    assert tokenizer.mask_token_id is None
    with pytest.raises(UserError, match="62 tokens but the model's vocabulary only 61"):
        load_task_model(save(model, size=62), SST2, new_head=True)


def change(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"num_hidden_layers": 5}, r"encoder weights are missing, the first is 'bert.encoder.layer.4"),
        ({"intermediate_size": 32}, r"'bert.encoder.layer.0.* is \(24,\) in the file.* makes it \(32,\)"),
        ({"model_type": "t5gemma"}, "cannot be loaded as a model for choice"),
    ],
)
def test_a_spoiled_folder_gives_one_line_that_names_it(build, save, spoil, message):
    folder = save(build("bert"))
    change(folder, **spoil)
    with pytest.raises(UserError, match=message) as caught:
        load_task_model(folder, RACE, new_head=True)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_a_bilstm_loads_for_its_kind_of_texts(build, save, tiny_pair):
    student = make_bilstm(build("bert", "SequenceClassification", num_labels=3), pairs=True, hidden_size=5)
    folder = save(student)
    model, _ = load_task_model(folder, NLI, new_head=False)
    assert torch.equal(outputs(model, tiny_pair), outputs(student, tiny_pair))
    with pytest.raises(UserError, match="is for pairs of sentences, but sst2 has single sentences"):
        load_task_model(folder, SST2, new_head=True)
    regression, _ = load_task_model(folder, STSB, new_head=True)
    assert torch.equal(regression.fc.weight, student.fc.weight)
    assert regression.output.weight.shape == (1, 200)


@pytest.mark.skipif(not REAL_ENCODER.is_dir(), reason="the shared encoder folder is not on this machine")
def test_the_real_encoder_gets_a_head_whose_student_computes_the_same():
    with pytest.raises(UserError, match=r"no trained head for sst2 \('classifier' of BertForSequence"):
        load_task_model(REAL_ENCODER, SST2, new_head=False)
    teacher, tokenizer = load_task_model(REAL_ENCODER, SST2, new_head=True)
    assert isinstance(teacher, transformers.BertForSequenceClassification)
    batch = tokenizer(["a charming film", "no"], padding=True, return_tensors="pt")
    student = make_student(teacher, num_layers=12).eval()
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, teacher(**batch).logits)
