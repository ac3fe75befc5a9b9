"""Students made from teachers: exact copies where all layers are kept, the right layers where not."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DistilBertForMaskedLM,
    RobertaModel,
)

from fastdistil.errors import UserError
from fastdistil.models.student import make_student, set_dropout, spread_layers


def logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def test_a_student_with_all_layers_computes_what_the_teacher_does(tiny_model, tiny_batch):
    ids, mask = tiny_batch(tiny_model)
    student = make_student(tiny_model, num_layers=4).eval()
    torch.testing.assert_close(logits(student, ids, mask), logits(tiny_model, ids, mask), rtol=0, atol=1e-6)


def test_a_student_with_two_layers_equals_the_teacher_cut_to_them(tiny_model, tiny_batch):
    ids, mask = tiny_batch(tiny_model)
    student = make_student(tiny_model, teacher_layers=[0, 2]).eval()
    stack = next(
        m for m in tiny_model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4
    )
    del stack[3], stack[1]
    if tiny_model.config.model_type == "modernbert":
        # Layers 0 and 2 of the pattern full, sliding, sliding, full.
        assert student.config.layer_types == ["full_attention", "sliding_attention"]
    torch.testing.assert_close(logits(student, ids, mask), logits(tiny_model, ids, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [0, 2]])
def test_an_encoder_gives_the_encoder_of_the_student_with_a_head(tiny_model, tiny_batch, layers):
    ids, mask = tiny_batch(tiny_model)
    inputs = {"input_ids": ids, "attention_mask": mask}
    student = make_student(tiny_model.base_model, teacher_layers=layers).eval()
    expected = make_student(tiny_model, teacher_layers=layers).eval().base_model
    assert type(student) is type(expected)
    with torch.no_grad():
        assert torch.equal(student(**inputs).last_hidden_state, expected(**inputs).last_hidden_state)


def test_a_pooler_is_left_out(build):
    teacher = BertModel(build("bert").config)
    student = make_student(teacher)
    assert type(student).__name__ == "DistilBertModel"
    roberta = make_student(RobertaModel(build("roberta").config))
    assert not [name for name, _ in roberta.named_parameters() if "pooler" in name]


def test_the_vocabulary_matrix_of_the_student_stays_tied_and_is_its_own(tiny_model):
    student = make_student(tiny_model)
    weight = student.get_output_embeddings().weight
    assert weight is student.get_input_embeddings().weight
    assert weight.data_ptr() != tiny_model.get_input_embeddings().weight.data_ptr()


def test_a_saved_student_loads_back_to_the_same_logits(tiny_model, tiny_batch, tmp_path):
    ids, mask = tiny_batch(tiny_model)
    student = make_student(tiny_model).eval()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids, mask), logits(student, ids, mask))


def test_a_bert_teacher_gives_a_distilbert_with_its_dropout(build):
    student = make_student(build("bert", hidden_dropout_prob=0.3))
    assert isinstance(student, DistilBertForMaskedLM)
    assert student.config.dropout == 0.3
    assert make_student(build("bert"), dropout=0.0).config.attention_dropout == 0.0


def test_untied_teachers_give_untied_students(build, tiny_batch):
    teacher = build("bert", tie_word_embeddings=False)
    ids, mask = tiny_batch(teacher)
    student = make_student(teacher, num_layers=4).eval()
    torch.testing.assert_close(logits(student, ids, mask), logits(teacher, ids, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("depth", "layers", "expected"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),
        (24, 6, [0, 5, 9, 14, 18, 23]),
        (12, 1, [0]),
        (4, 2, [0, 3]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_layers_spread_evenly_and_are_distilberts_for_six_of_twelve(depth, layers, expected):
    assert spread_layers(depth, layers) == expected


def test_a_random_student_takes_its_own_widths_and_is_reproducible(tiny_model, tiny_batch):
    students = []
    for _ in range(2):
        torch.manual_seed(3)
        students.append(make_student(tiny_model, num_layers=3, hidden_size=8, init="random").eval())
    config = students[0].config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 8, 1)
    first, second = (logits(student, *tiny_batch(tiny_model)) for student in students)
    assert torch.equal(first, second)
    assert first.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_layers": [0, 4]}, r"teacher_layers has 4, but the teacher's layers are 0 to 3"),
        ({"teacher_layers": [2, 1]}, r"must be ascending.*\[2, 1\]"),
        ({"teacher_layers": []}, r"must be ascending"),
        ({"teacher_layers": [0, 1], "num_layers": 3}, r"num_layers is 3, but student.teacher_layers lists 2"),
        ({"num_layers": 5}, r"num_layers is 5, but the teacher has only 4"),
        ({"hidden_size": 8}, r"student.hidden_size changes the width"),
        ({"init": "random", "teacher_layers": [0]}, r"student.init is 'random'"),
        ({"init": "random", "hidden_size": 9, "num_attention_heads": 2}, r"9 is not a multiple of .* 2"),
    ],
)
def test_impossible_students_are_refused_naming_the_key(build, arguments, message):
    with pytest.raises(UserError, match=message):
        make_student(build("bert"), **arguments)


HEADS = ["SequenceClassification", "QuestionAnswering", "MultipleChoice"]


def task_outputs(model, batch):
    """All logits, of the `inputs` that the model takes; a choice between two options."""
    if "MultipleChoice" in type(model).__name__:
        # As numbers: ModernBERT looks for the greatest of a mask here.
        batch = {name: value[None].long() for name, value in batch.items()}
    if model.config.model_type in ("distilbert", "modernbert", "roberta"):
        batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
    with torch.no_grad():
        return torch.stack(list(model.eval()(**batch).values()))


@pytest.fixture(params=["bert", "roberta", "distilbert", "electra", "modernbert"])
def family(request):
    return request.param


@pytest.mark.parametrize("head", HEADS)
def test_a_task_students_head_and_layers_are_the_teachers(build, tiny_pair, family, head):
    teacher = build(family, head)
    teacher.config.label2id = {"no": 0, "yes": 1}
    student = make_student(teacher, num_layers=4)
    assert type(student) is type(teacher)
    assert student.config.label2id == {"no": 0, "yes": 1}
    assert torch.equal(task_outputs(student, tiny_pair), task_outputs(teacher, tiny_pair))
    student = make_student(teacher, teacher_layers=[0, 2])
    stack = next(
        m for m in teacher.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4
    )
    del stack[3], stack[1]
    torch.testing.assert_close(
        task_outputs(student, tiny_pair), task_outputs(teacher, tiny_pair), rtol=0, atol=1e-6
    )


def test_a_bert_that_stays_a_bert_keeps_its_token_types(build, tiny_pair):
    teacher = build("bert")
    student = make_student(teacher, num_layers=4, architecture="same")
    assert isinstance(student, BertForMaskedLM)
    assert torch.equal(task_outputs(student, tiny_pair), task_outputs(teacher, tiny_pair))
    encoder = make_student(teacher.bert, num_layers=4, architecture="same").eval()
    assert isinstance(encoder, BertModel)
    assert torch.equal(encoder(**tiny_pair).last_hidden_state, teacher.bert(**tiny_pair).last_hidden_state)


def test_a_bert_with_next_sentence_prediction_keeps_both_heads(build, tiny_pair):
    teacher = BertForPreTraining(build("bert").config).eval()
    student = make_student(teacher, num_layers=4).eval()
    ours, theirs = student(**tiny_pair), teacher(**tiny_pair)
    assert torch.equal(ours.prediction_logits, theirs.prediction_logits)
    assert torch.equal(ours.seq_relationship_logits, theirs.seq_relationship_logits)


@pytest.mark.parametrize("head", HEADS)
def test_a_distilbert_of_a_bert_with_a_task_has_its_encoder_and_its_labels(build, tiny_batch, head):
    teacher = build("bert", head)
    teacher.config.label2id = {"no": 0, "yes": 1}
    student = make_student(teacher, num_layers=4, architecture="distilbert").eval()
    assert type(student).__name__ == f"DistilBertFor{head}"
    assert student.config.label2id == {"no": 0, "yes": 1}
    ids, mask = tiny_batch(teacher)
    valid = mask.bool()
    ours, theirs = (model.base_model(ids, mask).last_hidden_state[valid] for model in (student, teacher))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    if head == "QuestionAnswering":
        starts, expected = (model(ids, mask).start_logits[valid] for model in (student, teacher))
        torch.testing.assert_close(starts, expected, rtol=0, atol=1e-6)


def test_a_distilberts_classifier_starts_fresh_from_the_random_state(build):
    teacher = build("bert", "SequenceClassification")

    def classifier():
        torch.manual_seed(3)
        student = make_student(teacher, architecture="distilbert")
        return torch.cat([student.pre_classifier.weight, student.classifier.weight])

    assert torch.equal(classifier(), classifier())
    assert 0.01 < classifier().std() < 0.04
    assert not torch.equal(classifier()[-2:], teacher.classifier.weight)


def test_a_bert_of_the_sizes_of_tinybert(build, tiny_pair):
    teacher = build("bert", "SequenceClassification", num_labels=3)
    student = make_student(
        teacher,
        num_layers=2,
        hidden_size=12,
        num_attention_heads=4,
        intermediate_size=20,
        init="random",
        dropout=0.0,
    )
    assert type(student) is type(teacher)
    layers, embeddings = 2 * (4 * (12 * 12 + 12) + 2 * 12 * 20 + 20 + 12 + 4 * 12), (61 + 40 + 2 + 2) * 12
    pooler, classifier = 12 * 12 + 12, 3 * 12 + 3
    assert sum(p.numel() for p in student.parameters()) == layers + embeddings + pooler + classifier
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert task_outputs(student, tiny_pair).shape == (1, 2, 3)


@pytest.mark.parametrize("head", HEADS)
def test_dropout_reaches_every_layer_and_the_head(build, family, head):
    student = make_student(build(family, head), dropout=0.0)
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_a_distilbert_is_made_of_a_bert_alone(build):
    with pytest.raises(UserError, match=r"student.architecture: no 'distilbert'.*of RobertaForMaskedLM"):
        make_student(build("roberta"), architecture="distilbert")
    teacher = BertForPreTraining(build("bert").config)
    with pytest.raises(UserError, match="of BertForPreTraining; leave it out"):
        make_student(teacher, architecture="distilbert")
    assert isinstance(make_student(build("distilbert"), architecture="distilbert"), DistilBertForMaskedLM)


def test_modernbert_must_keep_its_first_layer(build):
    with pytest.raises(UserError, match="must start with 0 for ModernBERT"):
        make_student(build("modernbert"), teacher_layers=[1, 2])


def test_no_student_is_made_of_a_compressed_model(tiny_model):
    tiny_model.config.fastdistil = {"format": 1, "replacements": []}
    with pytest.raises(UserError, match="distil first, then compress"):
        make_student(tiny_model)


@pytest.mark.parametrize(
    "family", ["bert", "distilbert", "roberta", "electra", "mobilebert", "albert", "modernbert"]
)
def test_dropout_is_set_in_modules_and_config(family, build):
    model = build(family).train()
    ids = torch.arange(5, 15)[None]
    set_dropout(model, 0.5)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    set_dropout(model, 0)
    assert torch.equal(model(ids).logits, model(ids).logits)
    again = type(model)(copy.deepcopy(model.config)).train()
    assert torch.equal(again(ids).logits, again(ids).logits)
