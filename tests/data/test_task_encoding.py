"""Encoded examples against what transformers' own call of the tokenizer gives, and spans against the text."""

import copy
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import fastdistil.data.task_encoding
import fastdistil.data.task_windows
from fastdistil.data.task_encoding import encode
from fastdistil.data.tasks import Examples, find_task
from fastdistil.errors import UserError

SINGLE, PAIR = find_task("sst2"), find_task("mrpc")


def sequences(data) -> list[list[int]]:
    return [part.tolist() for part in np.split(data.input_ids, data.offsets[1:-1])]


def types(data) -> list[list[int]]:
    return [part.tolist() for part in np.split(data.token_type_ids, data.offsets[1:-1])]


def labelled(texts: list[tuple[str, ...]]) -> Examples:
    return Examples(texts, np.arange(len(texts)) % 2)


@pytest.fixture
def small_chunks(monkeypatch):
    """So that a few examples need several chunks."""
    monkeypatch.setattr(fastdistil.data.task_encoding, "_CHUNK", 3)
    monkeypatch.setattr(fastdistil.data.task_windows, "_CHUNK", 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("max_length", [512, 40])
def test_single_texts_are_encoded_as_transformers_does(tokenizer, documents, max_length):
    texts = documents[:10]
    data = encode(SINGLE, labelled([(text,) for text in texts]), tokenizer, max_length)
    expected = tokenizer(texts, truncation=True, max_length=max_length)
    assert sequences(data) == expected["input_ids"]
    assert types(data) == expected["token_type_ids"]
    whole = tokenizer(texts)["input_ids"]
    assert data.truncated == sum(len(ids) > max_length for ids in whole)
    assert (data.truncated > 0) == (max_length == 40)
    assert data.lengths.tolist() == [len(ids) for ids in expected["input_ids"]]
    assert data.labels.tolist() == [0, 1] * 5


@pytest.mark.usefixtures("small_chunks")
def test_the_longer_text_of_a_pair_is_truncated_first(tokenizer, documents):
    texts = [(documents[i], documents[-i]) for i in range(1, 10)]
    data = encode(PAIR, labelled(texts), tokenizer, 270)
    first, second = zip(*texts, strict=True)
    expected = tokenizer(list(first), list(second), truncation="longest_first", max_length=270)
    assert sequences(data) == expected["input_ids"]
    assert types(data) == expected["token_type_ids"]
    assert data.truncated == sum(len(ids) > 270 for ids in tokenizer(list(first), list(second))["input_ids"])
    assert 0 < data.truncated < 9


def test_a_tokenizer_without_segments_gives_zeros(roberta_tokenizer, documents):
    roberta_tokenizer = copy.deepcopy(roberta_tokenizer)
    roberta_tokenizer.model_input_names = ["input_ids", "attention_mask"]
    texts = [(documents[0], documents[1])]
    data = encode(PAIR, labelled(texts), roberta_tokenizer, 512)
    assert sequences(data) == roberta_tokenizer([documents[0]], [documents[1]])["input_ids"]
    assert not data.token_type_ids.any()


def test_the_callers_tokenizer_keeps_its_settings(tokenizer, documents):
    tokenizer.backend_tokenizer.enable_truncation(17)
    try:
        encode(SINGLE, labelled([(documents[8],)]), tokenizer, 30)
        assert tokenizer.backend_tokenizer.truncation["max_length"] == 17
    finally:
        tokenizer.backend_tokenizer.no_truncation()


def test_a_mask_in_a_text_is_the_mask_token(tokenizer):
    data = encode(SINGLE, labelled([("the [MASK] learns",)]), tokenizer, 32)
    assert tokenizer.mask_token_id in data.input_ids


def test_an_option_follows_the_question_or_fills_its_blank(tokenizer):
    options = ("one", "two", "three", "four")
    texts = [("The text .", "How many ?", *options), ("The text .", "It has _ parts .", *options)]
    data = encode(find_task("race"), Examples(texts, np.array([2, 0])), tokenizer, 64)
    seconds = [f"How many ? {o}" for o in options] + [f"It has {o} parts ." for o in options]
    assert sequences(data) == tokenizer(["The text ."] * 8, seconds)["input_ids"]
    assert (len(data), data.num_choices) == (2, 4)
    longest = [max(len(ids) for ids in sequences(data)[i : i + 4]) for i in (0, 4)]
    assert data.lengths.tolist() == longest


def test_encoded_examples_are_compact_and_can_be_pickled(tokenizer):
    data = encode(SINGLE, labelled([("fine",), ("bad",)]), tokenizer, 16)
    assert (data.input_ids.dtype, data.token_type_ids.dtype) == (np.int32, np.int8)
    assert pickle.loads(pickle.dumps(data)).sha256 == data.sha256


def test_the_fingerprint_changes_with_every_part(tokenizer):
    def fingerprint(text: str, label: int) -> str:
        return encode(SINGLE, Examples([(text,)], np.array([label])), tokenizer, 16).sha256

    assert len({fingerprint("fine", 0), fingerprint("fine", 1), fingerprint("bad", 1)}) == 3
    assert fingerprint("fine", 0) == fingerprint("fine", 0)


def question_about(context: str, answer: str, question: str = "What is it ?") -> tuple:
    start = context.index(answer)
    return (question, context), (start, start + len(answer)), (answer,)


def span_examples(*rows: tuple) -> Examples:
    texts, spans, answers = zip(*rows, strict=True)
    return Examples(list(texts), np.array(spans), list(answers))


@pytest.fixture
def contexts(documents) -> Examples:
    rows = [question_about(document, f"Number {i}") for i, document in enumerate(documents[:12])]
    return span_examples(*rows, question_about(documents[8], "soft targets"))


@pytest.mark.usefixtures("small_chunks")
def test_windows_are_those_of_transformers(tokenizer, contexts):
    data = encode(find_task("squad"), contexts, tokenizer, 64)
    questions, texts = zip(*contexts.texts, strict=True)
    room = 64 - 3  # the overlap is half of what a question of at most half the room leaves
    expected = tokenizer(
        list(questions),
        list(texts),
        truncation="only_second",
        max_length=64,
        stride=(room - room // 2) // 2,
        return_overflowing_tokens=True,
    )
    assert sequences(data) == expected["input_ids"]
    assert types(data) == expected["token_type_ids"]
    assert data.windows.example.tolist() == list(expected["overflow_to_sample_mapping"])
    assert len(data) > len(contexts)


def test_windows_of_384_tokens_share_128(tokenizer, documents):
    context = " ".join(documents[:40])
    data = encode(find_task("squad"), span_examples(question_about(context, "Number 3")), tokenizer, 384)
    starts = [data.windows.characters[data.offsets[i] :, 0] for i in range(3)]
    first, second = (starts[i][: data.offsets[i + 1] - data.offsets[i]] for i in (0, 1))
    assert len(np.intersect1d(first[first >= 0], second[second >= 0])) == 128
    assert data.offsets[1] == 384


def test_labels_cut_the_answer_out_of_the_context(tokenizer, contexts):
    data = encode(find_task("squad"), contexts, tokenizer, 64)
    found = set()
    for window, (start, end) in enumerate(data.labels.tolist()):
        example, offset = data.windows.example[window], data.offsets[window]
        characters = data.windows.characters[offset : data.offsets[window + 1]]
        context, (answer,) = data.windows.contexts[example], data.windows.answers[example]
        if start == end == 0:
            first, last = characters[characters[:, 0] >= 0][[0, -1]]
            begin, stop = contexts.labels[example]
            assert begin < first[0] or stop > last[1], "the window holds the answer"
        else:
            assert context[characters[start, 0] : characters[end, 1]] == answer
            found.add(int(example))
    assert found == set(range(len(contexts)))
    assert (data.labels == 0).all(axis=1).any()


def test_an_answer_inside_a_token_takes_the_whole_token(tokenizer):
    example = ("What ?", "It has 1234 parts ."), (8, 10), ("23",)
    data = encode(find_task("squad"), span_examples(example), tokenizer, 64)
    (start, end), characters = data.labels[0], data.windows.characters
    assert characters[start, 0] <= 8
    assert characters[end, 1] >= 10


def test_a_question_is_cut_to_64_tokens_and_counted(tokenizer):
    long = " ".join(f"w{i}" for i in range(100))
    examples = span_examples(
        question_about("The text is short .", "short", "What is it ?"),
        question_about("The text is short .", "short", long),
    )
    data = encode(find_task("squad"), examples, tokenizer, 384)
    assert data.truncated == 1
    cut = sequences(data)[1]
    assert cut[1:65] == tokenizer(long, add_special_tokens=False)["input_ids"][:64]
    assert cut[65] == tokenizer.sep_token_id


def test_what_cannot_be_encoded_is_refused(tokenizer):
    examples = labelled([("fine",)])
    with pytest.raises(UserError, match="max_length must be >= 4, special tokens included, got 3"):
        encode(SINGLE, examples, tokenizer, 3)
    with pytest.raises(UserError, match="task 'sst2' has no examples"):
        encode(SINGLE, examples.select([]), tokenizer, 16)
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="has no padding token"):
        encode(SINGLE, examples, PreTrainedTokenizerFast(tokenizer_object=backend), 16)
