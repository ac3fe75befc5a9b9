"""The BiLSTM against torch's own bidirectional LSTM, run on each sentence by itself."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from fastdistil.errors import UserError
from fastdistil.evaluate.cost import count_parameters, measure_latency
from fastdistil.models.bilstm import make_bilstm


@pytest.fixture
def teacher(build):
    return build("bert", "SequenceClassification", num_labels=3)


def make(teacher, **changes):
    """In float64, so that a comparison shows the formula and not the rounding."""
    torch.manual_seed(0)
    return make_bilstm(teacher, **{"pairs": True, "hidden_size": 5, "fc_size": 7, **changes}).double().eval()


def reference(student, sentences):
    """Logits of one text, from the word ids of its sentences."""
    lstm = nn.LSTM(16, 5, bidirectional=True, batch_first=True).double()
    encoder = student.bilstm
    weights = dict(encoder.forward_lstm.named_parameters())
    weights |= {f"{name}_reverse": weight for name, weight in encoder.backward_lstm.named_parameters()}
    states = []
    for words in sentences:
        _, (last, _) = torch.func.functional_call(lstm, weights, encoder.embeddings(words)[None])
        states.append(torch.cat([last[0], last[1]], dim=-1)[0])
    features = states[0]
    if len(states) == 2:
        a, b = states
        features = torch.cat([a, b, a * b, (a - b).abs()])
    hidden = torch.clamp(student.fc.weight @ features + student.fc.bias, min=0)
    return student.output.weight @ hidden + student.output.bias


def test_a_pair_is_compared_as_in_the_paper(teacher, tiny_pair):
    student = make(teacher)
    ids = tiny_pair["input_ids"]
    expected = [
        reference(student, [ids[0, 1:5], ids[0, 6:11]]),  # [CLS] four words [SEP] five words [SEP]
        reference(student, [ids[1, 1:3], ids[1, 4:8]]),
    ]
    torch.testing.assert_close(student(**tiny_pair).logits, torch.stack(expected))


def test_a_single_sentence_gives_its_last_states(teacher, tiny_pair):
    student = make(teacher, pairs=False)
    ids, mask = tiny_pair["input_ids"], tiny_pair["attention_mask"]
    expected = torch.stack([reference(student, [ids[0, 1:11]]), reference(student, [ids[1, 1:8]])])
    torch.testing.assert_close(student(ids, mask).logits, expected)
    # Token types are of no account here.
    torch.testing.assert_close(student(**tiny_pair).logits, expected)
    torch.testing.assert_close(student(ids[:1]).logits, expected[:1])


def test_gradients_are_those_of_the_reference(teacher, tiny_pair):
    student = make(teacher)
    ids = tiny_pair["input_ids"]
    upstream = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(logits):
        student.zero_grad()
        (upstream * logits).sum().backward()
        return {name: parameter.grad for name, parameter in student.named_parameters()}

    ours = gradients(student(**tiny_pair).logits)
    rows = [[ids[0, 1:5], ids[0, 6:11]], [ids[1, 1:3], ids[1, 4:8]]]
    expected = gradients(torch.stack([reference(student, row) for row in rows]))
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


@pytest.mark.parametrize("pairs", [False, True])
def test_padding_changes_nothing(teacher, tiny_pair, pairs):
    student = make(teacher, pairs=pairs)
    alone = student(**{name: value[1:, :9] for name, value in tiny_pair.items()}).logits
    torch.testing.assert_close(student(**tiny_pair).logits[1:], alone)
    other = {**tiny_pair, "input_ids": tiny_pair["input_ids"].clone()}
    other["input_ids"][1, 9:] = 17
    assert torch.equal(student(**other).logits, student(**tiny_pair).logits)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_text_without_words_is_read_as_its_separator(teacher, pairs):
    student = make(teacher, pairs=pairs)
    ids = torch.tensor([[2, 3, 0, 0], [2, 9, 3, 0]])
    separator = torch.tensor([3])
    expected = reference(student, [separator, separator] if pairs else [separator])
    torch.testing.assert_close(student(ids, ids != 0).logits[0], expected)


def test_labels_give_the_loss_of_the_task(build, teacher, tiny_pair):
    student = make(teacher)
    labels = torch.tensor([2, 0])
    output = student(**tiny_pair, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    student = make(build("bert", "SequenceClassification", num_labels=1, problem_type="regression"))
    targets = torch.tensor([0.5, 4.0], dtype=torch.float64)
    output = student(**tiny_pair, labels=targets)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - targets).square().mean())


def test_words_start_as_the_teachers_and_the_rest_from_the_random_state(teacher):
    words = teacher.get_input_embeddings().weight
    student = make(teacher).float()
    assert student.get_input_embeddings().weight is student.bilstm.embeddings.weight
    assert torch.equal(student.bilstm.embeddings.weight, words)
    assert student.bilstm.embeddings.weight.data_ptr() != words.data_ptr()
    again = make(teacher).float()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    drawn = make(teacher, init="random", embedding_size=400)
    assert 0.04 < drawn.bilstm.embeddings.weight.std() < 0.06
    assert 0.2 < drawn.bilstm.forward_lstm.weight_hh_l0.std() < 0.3  # uniform up to 5 ** -0.5


def test_the_config_has_the_teachers_labels_and_limits(teacher):
    teacher.config.label2id = {"a": 0, "b": 1, "c": 2}
    config = make(teacher).config
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    assert (config.num_labels, config.vocab_size, config.max_position_embeddings) == (3, 61, 40)
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (1, 0, 5)


def test_the_sizes_of_the_paper(build):
    student = make_bilstm(
        build("bert", "SequenceClassification"), pairs=False, embedding_size=300, init="random"
    )
    lstm, words = 2 * 4 * (150 * (300 + 150) + 2 * 150), 61 * 300
    assert count_parameters(student) == words + lstm + 300 * 200 + 200 + 200 * 2 + 2


@pytest.mark.parametrize("pairs", [False, True])
def test_a_saved_student_loads_back_to_the_same_bits(teacher, tiny_pair, tmp_path, pairs):
    student = make(teacher, pairs=pairs).float()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**tiny_pair).logits, student(**tiny_pair).logits)
    encoder = AutoModel.from_pretrained(tmp_path)
    ours, theirs = encoder(**tiny_pair), student.base_model(**tiny_pair)
    assert torch.equal(ours.pooler_output, theirs.pooler_output)
    assert torch.equal(ours.last_hidden_state[:, 0], theirs.pooler_output)


def test_it_runs_under_autocast_and_twice_the_same(teacher, tiny_pair):
    student = make(teacher).float().train()
    exact = student.eval()(**tiny_pair).logits

    def run():
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(**tiny_pair).logits
        logits.float().square().sum().backward()
        return logits, torch.cat([p.grad.flatten() for p in student.parameters()])

    (logits, gradient), (again, repeated) = run(), run()
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.02)
    assert torch.equal(logits, again)
    assert torch.equal(gradient, repeated)


def test_its_latency_is_measured_like_any_other_models(teacher):
    student = make(teacher).float()
    (latency,) = measure_latency({"bilstm": student}, batch_sizes=(2,), length=8, runs=2, warmup=0)["bilstm"]
    assert latency.p50_ms > 0


@pytest.mark.parametrize(
    ("family", "head", "arguments", "message"),
    [
        ("bert", "QuestionAnswering", {}, "classification and regression, BertForQuestionAnswering is not"),
        ("bert", "MaskedLM", {}, "classification and regression, BertForMaskedLM is not"),
        ("distilbert", "SequenceClassification", {}, "'distilbert' does not have"),
        ("bert", "SequenceClassification", {"embedding_size": 8}, "is 8, but the teacher's.* 16 wide"),
    ],
)
def test_impossible_students_are_refused(build, family, head, arguments, message):
    with pytest.raises(UserError, match=message):
        make_bilstm(build(family, head), pairs=True, **arguments)
