"""MobileBERT students: what is copied is exact where there is room, and taps and heads work on them."""

import pytest
import torch

from fastdistil.errors import UserError
from fastdistil.models.heads import mlm_head
from fastdistil.models.load import load_masked_lm
from fastdistil.models.mobilebert import make_mobilebert
from fastdistil.models.taps import Wanted, tap

TINY = {"bottleneck_size": 8, "num_attention_heads": 2, "num_feedforward_networks": 2, "embedding_size": 12}
HEADS = ["SequenceClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "PreTraining"]


def embedded(model, batch):
    """What enters the first layer, of the words and not of the padding."""
    batch = {"input_ids": batch["input_ids"], "token_type_ids": batch["token_type_ids"]}
    return model.base_model.embeddings(**batch)


def by_hand(student, batch):
    """The embeddings, from the weights: trigrams, projection, positions, token types, scale and shift."""
    e = student.base_model.embeddings
    words = torch.nn.functional.pad(e.word_embeddings.weight[batch["input_ids"]], (0, 0, 1, 1))
    trigrams = torch.cat([words[:, 2:], words[:, 1:-1], words[:, :-2]], dim=-1)
    total = trigrams @ e.embedding_transformation.weight.mT + e.embedding_transformation.bias
    total = total + e.position_embeddings.weight[: total.shape[1]]
    total = total + e.token_type_embeddings.weight[batch["token_type_ids"]]
    return total * e.LayerNorm.weight + e.LayerNorm.bias


@pytest.mark.parametrize("head", HEADS)
def test_a_student_has_the_teachers_head(build, head):
    teacher = build("bert", head)
    teacher.config.label2id = {"no": 0, "yes": 1}
    student = make_mobilebert(teacher, **TINY)
    assert type(student).__name__ == f"MobileBertFor{head}"
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (16, 4)
    assert student.config.label2id == {"no": 0, "yes": 1}
    theirs = {name.replace("bert.", "mobilebert."): w for name, w in teacher.state_dict().items()}
    copied = [
        name
        for name, weight in student.state_dict().items()
        if "embeddings" not in name and name in theirs and torch.equal(weight, theirs[name])
    ]
    outside = [name for name in theirs if "embeddings" not in name and "encoder" not in name]
    assert sorted(copied) == sorted(name for name in outside if name != "cls.predictions.decoder.weight")


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_matrix_is_the_teachers(build, tied):
    teacher = build("bert", tie_word_embeddings=tied)
    student = make_mobilebert(teacher, **TINY, trigram_input=False)
    theirs, ours = mlm_head(teacher), mlm_head(student)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    # With trigrams, padding beside a word must not reach it.
    student = make_mobilebert(teacher, **TINY)
    assert student.get_input_embeddings().weight[0].eq(0).all()
    assert torch.equal(mlm_head(student).weight[1:], theirs.weight[1:])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("trigram_input", [True, False])
@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_embeddings_with_room_for_all_are_the_teachers(build, tiny_pair, head, trigram_input):
    teacher = build("bert", head, layer_norm_eps=1e-5)  # that of MobileBERT's norm
    sizes = {**TINY, "embedding_size": 16, "trigram_input": trigram_input, "normalization_type": "layer_norm"}
    student = make_mobilebert(teacher, **sizes)
    mask = tiny_pair["attention_mask"]
    ours, theirs = (embedded(model, tiny_pair)[mask] for model in (student, teacher))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_narrow_embeddings_lose_the_least(build):
    """Eckart and Young: what is lost is the sum of the smallest squared singular values."""
    teacher = build("bert", "SequenceClassification").double()
    student = make_mobilebert(teacher, **TINY, trigram_input=False)
    embeddings = student.base_model.embeddings
    words = teacher.get_input_embeddings().weight
    back = embeddings.word_embeddings.weight @ embeddings.embedding_transformation.weight.mT
    smallest = torch.linalg.svdvals(words)[12:].square().sum()
    torch.testing.assert_close((back - words).square().sum(), smallest)


def test_a_projection_is_the_least_squares_way_back(build):
    teacher = build("bert").double()
    student = make_mobilebert(teacher, **TINY, trigram_input=False)
    words = teacher.get_input_embeddings().weight
    embeddings = student.base_model.embeddings
    lost = words - embeddings.word_embeddings.weight @ embeddings.embedding_transformation.weight.mT
    assert torch.equal(embeddings.word_embeddings.weight, words[:, :12])
    torch.testing.assert_close(words[:, :12].mT @ lost, torch.zeros(12, 16, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_norm_scales_and_shifts_as_the_layer_norm_does_on_the_average(build, tiny_pair):
    teacher = build("bert")
    student = make_mobilebert(teacher, **{**TINY, "embedding_size": 16})
    torch.testing.assert_close(embedded(student, tiny_pair), by_hand(student, tiny_pair))
    words, position, kind = (
        teacher.bert.embeddings.word_embeddings.weight,
        teacher.bert.embeddings.position_embeddings.weight.mean(0),
        teacher.bert.embeddings.token_type_embeddings.weight[0],
    )
    raw = words + position + kind
    expected = teacher.bert.embeddings.LayerNorm
    scale, shift = (getattr(student.mobilebert.embeddings.LayerNorm, name) for name in ("weight", "bias"))
    torch.testing.assert_close(scale, expected.weight / raw.std(1, correction=0).mean())
    torch.testing.assert_close(shift, expected.bias - scale * raw.mean())


def test_padding_changes_no_word(build, tiny_pair):
    student = make_mobilebert(build("bert"), **TINY).eval()
    alone = student(**{name: value[1:, :9] for name, value in tiny_pair.items()}).logits
    torch.testing.assert_close(student(**tiny_pair).logits[1:, :9], alone)


def test_blocks_start_from_the_random_state_and_the_teacher_is_not_touched(build):
    teacher = build("bert")
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}

    def weights(seed):
        torch.manual_seed(seed)
        return list(make_mobilebert(teacher, **TINY).parameters())

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())


def test_the_sizes_of_the_paper(build):
    """Table 1: 24 blocks, 128 wide inside and 512 between; as many weights as google/mobilebert-uncased."""
    teacher = build(
        "bert",
        vocab_size=30522,
        hidden_size=512,
        num_hidden_layers=24,
        intermediate_size=8,
        max_position_embeddings=512,
    ).bert
    student = make_mobilebert(teacher)
    assert student.config.intermediate_size == 512
    assert sum(parameter.numel() for parameter in student.parameters()) == 24_581_888


def test_a_saved_student_loads_back_to_the_same_logits(build, save, tiny_pair):
    student = make_mobilebert(build("bert"), **TINY).eval()
    loaded, _ = load_masked_lm(save(student))
    assert torch.equal(loaded(**tiny_pair).logits, student(**tiny_pair).logits)


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_feature_maps_and_attention_compare_with_the_teachers(build, tiny_pair, head):
    teacher = build("bert", head)
    student = make_mobilebert(teacher, **TINY).eval()
    wanted = Wanted(attention=frozenset({0, 3}), hidden=frozenset({0, 3}))
    ours, theirs = (tap(model, tiny_pair, wanted) for model in (student, teacher))
    assert ours.hidden[3].shape == theirs.hidden[3].shape
    states = ours.attention[3]
    assert states.query.shape[:3] == theirs.attention[3].query.shape[:3]  # heads and tokens are the teacher's
    layer = student.base_model.encoder.layer[3]
    narrow = layer.bottleneck.attention(student(**tiny_pair, output_hidden_states=True).hidden_states[3])
    torch.testing.assert_close(states.relation("query"), layer.attention.self.query(narrow))
    torch.testing.assert_close(states.relation("key"), layer.attention.self.key(narrow))
    states.query.square().sum().backward()
    assert layer.bottleneck.attention.dense.weight.grad.abs().sum() > 0
    assert layer.bottleneck.input.dense.weight.grad is None


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("roberta", {}, "needs a BERT teacher, but RobertaForMaskedLM is 'roberta'"),
        ("bert", {"bottleneck_size": 10, "num_attention_heads": 4}, "10 is not a multiple of .* 4"),
        ("bert", {"embedding_size": 17}, "embedding_size is 17, above the teacher's hidden_size 16"),
    ],
)
def test_impossible_students_are_refused(build, family, arguments, message):
    with pytest.raises(UserError, match=message):
        make_mobilebert(build(family), **{**TINY, **arguments})
