"""Examples of a task are the same from every kind of file, and what is wrong is said in one line."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdistil.data.tasks import TASKS, Examples, find_task, read_examples
from fastdistil.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs the data sets beside the repository")

PAIRS = [
    {"sentence1": 'He said "no" .', "sentence2": "He refused, loudly .", "label": 1},
    {"sentence1": "Rain falls .", "sentence2": "Über Nacht schneit es .", "label": 0},
    {"sentence1": "A 2nd text .", "sentence2": "A third one .", "label": 1},
]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".tsv":
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(name: str, data: Path, split: str = "validation") -> Examples:
    return read_examples(find_task(name), data, split)


def same(examples: Examples, rows: list[dict]) -> bool:
    texts = [(row["sentence1"], row["sentence2"]) for row in rows]
    return examples.texts == texts and examples.labels.tolist() == [row["label"] for row in rows]


@pytest.mark.parametrize(
    ("name", "task"), [("sst2", "sst2"), ("SST-2", "sst2"), ("STS-B", "stsb"), ("MNLI", "mnli")]
)
def test_tasks_are_found_as_people_write_them(name, task):
    assert find_task(name).name == task


def test_an_unknown_task_names_the_nearest_or_all():
    with pytest.raises(UserError, match=r"^unknown task 'sst3'; did you mean 'sst2'\?$"):
        find_task("sst3")
    with pytest.raises(UserError, match=r"^unknown task 'translation'; the tasks are sst2, .*, libraries; "):
        find_task("translation")


def test_heads_have_an_output_for_each_class_option_or_end_of_a_span():
    sizes = {name: task.num_labels for name, task in TASKS.items()}
    assert sizes == {
        **dict.fromkeys(("sst2", "cola", "mrpc", "qqp", "qnli", "rte", "wnli", "imdb", "squad"), 2),
        **dict.fromkeys(("mnli", "snli", "dream"), 3),
        "stsb": 1,
        "race": 4,
        "libraries": 8,
    }


@pytest.mark.parametrize("suffix", [".parquet", ".tsv", ".csv", ".json", ".jsonl"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    write(tmp_path / f"validation{suffix}", PAIRS)
    examples = read("mrpc", tmp_path)
    assert same(examples, PAIRS)
    assert examples.labels.dtype == np.int64
    assert examples.split == "validation"


def test_shards_are_read_in_order(tmp_path):
    write(tmp_path / "train-00001-of-00002.parquet", PAIRS[1:])
    write(tmp_path / "train-00000-of-00002.parquet", PAIRS[:1])
    assert same(read("mrpc", tmp_path, "train"), PAIRS)


def test_a_split_in_two_formats_is_read_once(tmp_path):
    write(tmp_path / "train.tsv", PAIRS)
    write(tmp_path / "train.parquet", PAIRS[:2])
    assert len(read("mrpc", tmp_path, "train")) == 2


@pytest.mark.parametrize("folder", ["", "mrpc", "MRPC", "glue/mrpc", "GLUE/MRPC"])
def test_the_folder_may_be_the_task_or_hold_it(tmp_path, folder):
    write(tmp_path / folder / "dev.tsv", PAIRS)
    assert same(read("mrpc", tmp_path), PAIRS)


def test_folder_names_may_have_hyphens(tmp_path):
    write(tmp_path / "SST-2" / "dev.tsv", [{"sentence": "fine", "label": 1}])
    assert read("sst2", tmp_path).texts == [("fine",)]


def test_without_a_validation_split_the_test_split_is_read(tmp_path):
    write(tmp_path / "imdb" / "test.parquet", [{"text": "bad", "label": 0}])
    assert read("imdb", tmp_path).split == "test"
    row = {"premise": "A dog", "hypothesis": "A cat", "label": 2}
    write(tmp_path / "snli" / "test.parquet", [row])
    assert read("snli", tmp_path).split == "test"
    write(tmp_path / "snli" / "snli_1.0_dev.jsonl", [row, row])
    assert (read("snli", tmp_path).split, len(read("snli", tmp_path))) == ("validation", 2)


def test_mnli_has_two_validation_splits(tmp_path):
    rows = [
        {"sentence1": "a", "sentence2": "b", "label1": "x", "gold_label": label}
        for label in ("neutral", "entailment")
    ]
    write(tmp_path / "dev_matched.tsv", rows)
    write(tmp_path / "dev_mismatched.tsv", rows[1:])
    assert read("mnli", tmp_path).labels.tolist() == [1, 0]
    assert read("mnli", tmp_path).split == "validation_matched"
    assert read("mnli", tmp_path, "validation_mismatched").labels.tolist() == [0]


def test_a_validation_file_counts_also_where_the_hub_has_none(tmp_path):
    row = {"premise": "A dog", "hypothesis": "A cat", "label": 2}
    write(tmp_path / "mnli" / "validation.parquet", [row])
    assert read("mnli", tmp_path).split == "validation"
    write(tmp_path / "imdb" / "test.parquet", [{"text": "bad", "label": 0}])
    write(tmp_path / "imdb" / "validation.parquet", [{"text": "good", "label": 1}])
    assert read("imdb", tmp_path).labels.tolist() == [1]


def test_colas_own_files_have_no_header(tmp_path):
    (tmp_path / "train.tsv").write_text('gj04\t1\t\tOur friends agree.\nbc01\t0\t*\tThey "is.\n')
    examples = read("cola", tmp_path, "train")
    assert examples.texts == [("Our friends agree.",), ('They "is.',)]
    assert examples.labels.tolist() == [1, 0]


def test_mrpcs_own_files_have_other_names_and_a_byte_order_mark(tmp_path):
    text = 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tone " text\tanother\n'
    (tmp_path / "dev.tsv").write_text(text, encoding="utf-8-sig")
    examples = read("mrpc", tmp_path)
    assert (examples.texts, examples.labels.tolist()) == ([('one " text', "another")], [1])


def test_labels_may_be_names(tmp_path):
    write(
        tmp_path / "dev.tsv",
        [
            {"question": "Who?", "sentence": "He.", "label": label}
            for label in ("not_entailment", "entailment")
        ],
    )
    assert read("qnli", tmp_path).labels.tolist() == [1, 0]


def test_scores_are_float32_targets(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (0.0, 3.8, 5.0)]
    write(tmp_path / "dev.tsv", rows)
    labels = read("stsb", tmp_path).labels
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, np.float32([0.0, 3.8, 5.0]))


def test_pairs_without_a_gold_label_are_left_out_and_counted(tmp_path):
    rows = [
        {"sentence1": "a", "sentence2": str(i), "gold_label": label}
        for i, label in enumerate(("-", "neutral", "contradiction"))
    ]
    write(tmp_path / "snli_1.0_dev.jsonl", rows)
    examples = read("snli", tmp_path)
    assert (examples.texts, examples.labels.tolist(), examples.left_out) == (
        [("a", "1"), ("a", "2")],
        [1, 2],
        1,
    )


def test_qqps_broken_lines_and_empty_questions_are_left_out(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    (tmp_path / "train.tsv").write_text(
        header + "1\t2\t3\tHow?\tWhy?\t1\n4\t5\t6\tWho?\n7\t8\t9\tHow?\t\t0\n"
    )
    examples = read("qqp", tmp_path, "train")
    assert (examples.texts, examples.labels.tolist(), examples.left_out) == ([("How?", "Why?")], [1], 2)


CONTEXT = "The Rhine is 1,230 km long. It ends in the North Sea."
ANSWERS = [{"text": " 1,230 km", "answer_start": 12}, {"text": "1,230 km long", "answer_start": 13}]


@pytest.mark.parametrize("form", ["nested", "hub", "own"])
def test_span_answers_of_every_layout(tmp_path, form):
    if form == "own":
        question = {"id": "q", "question": "How long?", "answers": ANSWERS}
        data = {
            "version": "1.1",
            "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [question]}]}],
        }
        (tmp_path / "dev-v1.1.json").write_text(json.dumps(data))
    else:
        columns = {key: [answer[key] for answer in ANSWERS] for key in ("text", "answer_start")}
        row = {"question": "How long?", "context": CONTEXT, "answers": columns if form == "hub" else ANSWERS}
        write(tmp_path / "validation.parquet", [row])
    examples = read("squad", tmp_path)
    assert examples.texts == [("How long?", CONTEXT)]
    assert examples.answers == [(" 1,230 km", "1,230 km long")]
    # Without the blank that the annotator took with it.
    assert examples.labels.tolist() == [[13, 21]]


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_span_answers_of_a_table(tmp_path, suffix):
    """Whose cells are all text."""
    rows = [("question", "context", "answer_text", "answer_start"), ("q", "one two", "two", "4")]
    lines = [("\t" if suffix == "tsv" else ",").join(row) for row in rows]
    (tmp_path / f"validation.{suffix}").write_text("\n".join(lines) + "\n")
    examples = read("squad", tmp_path)
    assert (examples.answers, examples.labels.tolist()) == ([("two",)], [[4, 7]])


def test_a_single_span_answer_need_not_be_a_list(tmp_path):
    write(tmp_path / "validation.jsonl", [{**ASKED, "answers": {"text": "two", "answer_start": 4}}])
    assert read("squad", tmp_path).labels.tolist() == [[4, 7]]


@pytest.mark.parametrize("answer", ["B", 1, "b2", "1"])
def test_the_right_option_is_a_letter_a_number_or_its_text(tmp_path, answer):
    options = ["a1", "b2", "c3", "d4"]
    write(tmp_path / "dev.jsonl", [{"article": "x", "question": "y", "options": options, "answer": answer}])
    examples = read("race", tmp_path)
    assert (examples.texts, examples.labels.tolist()) == ([("x", "y", *options)], [1])


def test_texts_of_options_may_look_like_letters_and_numbers(tmp_path):
    options = [["B", "5", "x"], ["0", "1", "2"]]
    rows = [
        {"article": "x", "question": "y", "options": o, "answer": a}
        for o, a in zip(options, "x0", strict=True)
    ]
    write(tmp_path / "dev.jsonl", rows)
    assert read("dream", tmp_path).labels.tolist() == [2, 0]


def test_dreams_own_files_hold_dialogues_with_several_questions(tmp_path):
    questions = [
        {"question": "Who?", "choice": ["He.", "She.", "They."], "answer": "She."},
        {"question": "When?", "choice": ["Today.", "Soon.", "Never."], "answer": "Never."},
    ]
    (tmp_path / "dev.json").write_text(json.dumps([[["M: Hello.", "W: Hi."], questions, "1-1"]]))
    examples = read("dream", tmp_path)
    assert examples.texts[1] == ("M: Hello.\nW: Hi.", "When?", "Today.", "Soon.", "Never.")
    assert examples.labels.tolist() == [1, 2]


def test_select_takes_rows_in_the_given_order(tmp_path):
    examples = Examples([("a",), ("b",), ("c",)], np.array([5, 6, 7]), [("x",), ("y",), ("z",)], "train")
    chosen = examples.select(np.array([2, 0]))
    assert (chosen.texts, chosen.labels.tolist(), chosen.answers) == (
        [("c",), ("a",)],
        [7, 5],
        [("z",), ("x",)],
    )
    assert chosen.split == "train"


def test_the_hub_is_asked_for_the_tasks_configuration(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(path, configuration, split):
        asked.append((path, configuration, split))
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert same(read_examples(find_task("mrpc"), None, "validation"), PAIRS)
    read_examples(find_task("mrpc"), None, "train")
    assert read_examples(find_task("mnli"), None, "dev").split == "validation_matched"
    with pytest.raises(UserError, match=r"^stanfordnlp/imdb \(plain_text\), split 'test': no column 'text'"):
        read_examples(find_task("imdb"), None, "validation")
    assert asked == [
        ("nyu-mll/glue", "mrpc", "validation"),
        ("nyu-mll/glue", "mrpc", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("stanfordnlp/imdb", "plain_text", "test"),
    ]


def test_a_hub_that_is_out_of_reach_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(path, configuration, split):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as error:
        read_examples(find_task("sst2"), None, "train")
    reason = "not loaded from the hub: Couldn't reach 'nyu-mll/glue' on the Hub"
    assert str(error.value) == f"nyu-mll/glue (sst2), split 'train': {reason}"


GOOD = {"sentence": "fine", "label": 1}
NLI = {"premise": "x", "hypothesis": "y", "label": 0}
SIMILAR = {"sentence1": "x", "sentence2": "y", "score": 1.0}
CHOICE = {"article": "x", "question": "y", "options": ["a", "b", "c", "d"], "answer": "A"}
ASKED = {"question": "q", "context": "one two"}
SPAN = {**ASKED, "answer_text": "two", "answer_start": 4}
HIDDEN = "this split has hidden labels and can neither be learned nor scored"


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("sst2", [GOOD, {**GOOD, "label": 2}], "row 2: 'label' is 2; the classes are 0 (negative), 1 (posi"),
        ("sst2", [{**GOOD, "label": "good"}], "row 1: 'label' is 'good'; the classes are"),
        ("sst2", [{**GOOD, "label": 0.5}], "row 1: 'label' is 0.5; the classes are"),
        ("sst2", [GOOD, {**GOOD, "label": -1}], f"row 2: 'label' is -1: {HIDDEN}"),
        ("sst2", [{**GOOD, "label": None}], f"row 1: 'label' is missing: {HIDDEN}"),
        ("mnli", [{**NLI, "label": -1}], f"row 1: 'label' is -1: {HIDDEN}"),
        ("stsb", [{**SIMILAR, "score": -1.0}], f"row 1: 'score' is -1.0: {HIDDEN}"),
        ("sst2", [GOOD, {**GOOD, "sentence": " "}], "row 2: 'sentence' is empty"),
        ("sst2", [GOOD, {**GOOD, "sentence": None}], "row 2: 'sentence' is missing"),
        ("sst2", [{**GOOD, "sentence": 7}], "row 1: 'sentence' is 7, not text"),
        ("sst2", [{"text": "x", "label": 0}], "no column 'sentence'; the columns there are text, label"),
        (
            "stsb",
            [{"sentence1": "x", "sentence2": "y"}],
            "no column 'label' or 'score'; the columns there are",
        ),
        ("stsb", [{**SIMILAR, "score": 5.5}], "row 1: 'score' is 5.5, not a number from 0 to 5"),
        ("stsb", [{**SIMILAR, "score": "high"}], "row 1: 'score' is 'high', not a number from 0 to 5"),
        ("race", [{**CHOICE, "options": ["a", "b"]}], "row 1: 'options' has 2 options, the task has 4"),
        ("race", [{**CHOICE, "options": "a"}], "row 1: 'options' is 'a', not a list of texts"),
        ("race", [{**CHOICE, "options": ["a", ""]}], "row 1: 'options' is ['a', ''], not a list of texts"),
        ("race", [{**CHOICE, "article": ["x", 1]}], "row 1: 'article' holds something that is not text"),
        ("race", [{**CHOICE, "answer": "E"}], "row 1: 'answer' is 'E', which is none of the row's options"),
        ("race", [CHOICE, {**CHOICE, "answer": "E"}], "row 2: 'answer' is 'E'; the classes are 0 (A), 1 (B)"),
        ("race", [{**CHOICE, "answer": 4}], "row 1: 'answer' is 4; the classes are 0 (A), 1 (B), 2 (C), 3"),
        ("squad", [{**SPAN, "answer_start": 3}], "row 1: the answer 'two' is not at 3 of the context"),
        ("squad", [{**SPAN, "answer_start": -3}], "row 1: the answer 'two' is not at -3 of the context"),
        ("squad", [{**SPAN, "answer_text": " ", "answer_start": 3}], "row 1: 'answer_text' is ' ', not text"),
        ("squad", [{"question": "q", "context": "c", "answers": []}], "row 1: 'answers' has no answer"),
        ("squad", [{**ASKED, "answers": "two"}], "row 1: 'answers' is 'two', not {\"text\": [...], "),
        ("squad", [{**ASKED, "answers": ["two"]}], "row 1: 'answers' is ['two'], not {"),
        ("squad", [{**ASKED, "answers": {"text": ["two"], "answer_start": 4}}], "row 1: 'answers' is {"),
        (
            "squad",
            [{**ASKED, "answers": {"text": ["two", "one"], "answer_start": [4]}}],
            "with as many of both",
        ),
        ("squad", [{**ASKED, "answers": {"text": ["two", ""], "answer_start": [4, 0]}}], "is '', not text"),
        (
            "squad",
            [{**SPAN, "answer_start": "--4"}],
            "row 1: the answer 'two' is not at '--4' of the context",
        ),
        ("squad", [{"question": "q", "context": "c", "answers": None}], "row 1: 'answers' has no answer"),
        ("squad", [{"question": "q", "context": "c"}], "no column 'answers'; the columns there are question"),
        ("sst2", [[1]], "row 1: not a JSON object"),
        ("sst2", [], "has no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, task, rows, message):
    file = write(tmp_path / "validation.jsonl", rows)
    with pytest.raises(UserError) as error:
        read(task, tmp_path)
    text = str(error.value)
    assert text.startswith(str(file))
    assert message in text
    assert "\n" not in text


def test_a_field_may_be_a_whole_document(tmp_path):
    """Longer than the 128 KiB that `csv` takes by itself."""
    (tmp_path / "dev.csv").write_text(f"sentence,label\n{'x' * 200_000},1\n")
    assert len(read_examples(find_task("sst2"), tmp_path, "validation").texts[0][0]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dev.json", b"[{]", "is not JSON"),
        ("dev.json", b'{"data": [{"title": "t"}]}', "is not in SQuAD's format: 'paragraphs'"),
        ("dev.json", b'[["a", "b"]]', "is not in DREAM's format"),
        ("dev.parquet", b"PAR", "is not a parquet file"),
        ("dev.tsv", b"", "is empty"),
        ("dev.tsv", b"sentence\tlabel\n", "has no rows"),
        ("dev.tsv", b"sentence\tlabel\ngood\t1\nbad\n", "row 2: 'label' is missing"),
        ("dev.tsv", b"sentence\tlabel\na\tb\t1\n", "row 1: 3 fields, but there are 2 columns"),
        ("dev.tsv", b"sentence\tlabel\nna\xefve\t1\n", "is not UTF-8 text: byte 0xef"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read("sst2", tmp_path)
    assert str(error.value).startswith(str(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_split_names_those_there(tmp_path):
    write(tmp_path / "train_small.parquet", [GOOD])
    write(tmp_path / "test.parquet", [GOOD])
    with pytest.raises(UserError, match=r"no file of split 'validation'; those there are test, train_small$"):
        read("sst2", tmp_path)
    with pytest.raises(UserError, match="no file of split 'tune'"):
        read("sst2", tmp_path, "tune")


def test_a_folder_without_files_or_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \.parquet, .* file here, and no folder of the task$"):
        read("sst2", tmp_path)
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        read("sst2", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a\.tsv: not a folder"):
        read("sst2", write(tmp_path / "a.tsv", [GOOD]))


def test_shards_with_other_columns_are_refused(tmp_path):
    write(tmp_path / "train-0.parquet", [GOOD])
    write(tmp_path / "train-1.parquet", [{"text": "x", "label": 1}])
    with pytest.raises(
        UserError, match=r"train-1.parquet: the columns there are text, label, unlike those of .*train-0"
    ):
        read("sst2", tmp_path, "train")


@real_data
@pytest.mark.parametrize(
    ("task", "split", "count"),
    [
        ("sst2", "train", 67_349),
        ("sst2", "validation", 872),
        ("cola", "train", 8_551),
        ("cola", "validation", 1_043),
        ("mrpc", "validation", 408),
        ("mrpc", "test", 1_725),
        ("stsb", "validation", 1_500),
        ("rte", "validation", 277),
        ("qnli", "validation", 5_463),
        ("snli", "train", 99_890),
        ("snli", "validation", 9_824),
        ("imdb", "validation", 25_000),
        ("squad", "validation", 1_190),
        ("dream", "validation", 2_040),
    ],
)
def test_real_data_is_read_whole(task, split, count):
    examples = read(task, REAL, split)
    assert (len(examples), len(examples.labels), examples.left_out) == (count, count, 0)
