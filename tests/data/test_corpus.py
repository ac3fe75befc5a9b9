"""Every kind of source gives its documents in order, goes on from any position, and says what is wrong."""

import hashlib
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdistil.data.corpus import Corpus, ListCorpus, StreamedDataset, open_corpus
from fastdistil.errors import UserError


def parquet(path: Path, column: str = "text", texts: list[str | None] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = texts if texts is not None else [f"row {i}" for i in range(25)]
    pq.write_table(pa.table({column: values, "label": range(len(values))}), path, row_group_size=10)
    return path


def test_each_line_that_is_not_blank_is_a_document(write_lines):
    path = write_lines("a.txt", ["one", "", "  two \r", "\t", "drei ✓"])
    assert list(open_corpus(str(path))) == ["one", "two", "drei ✓"]


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo")
    assert list(open_corpus(str(tmp_path / "a.txt"))) == ["one", "two"]


def test_json_lines(write_lines):
    rows = [json.dumps({"text": "one"}), "", json.dumps({"text": None}), json.dumps({"text": "two", "id": 3})]
    assert list(open_corpus(str(write_lines("a.jsonl", rows)))) == ["one", "two"]


def test_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", "body", ["one", None, " ", "two"])
    assert list(open_corpus(str(path), text_column="body")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id,text\n1,one\n2,"two, or ""2""\nlines"\n\n3,\n4\n5,drei ✓\n'),
        ("a.csv", '\ufefftext,id\r\none,1\r\n"two, or ""2""\nlines",2\r\ndrei ✓\r\n'),
        ("a.json", '[{"text": "one", "id": 1}, {"text": null},\n {"text": "two, or \\"2\\"\\nlines"},'
                   ' {"text": "drei ✓"}]'),
        ("a.json", '{"text": "one"}\n\n{"text": "two, or \\"2\\"\\nlines"}\n{"text": "drei ✓"}\n'),
        ("a.JSON", '[\n  {"text": "one"},\n  {"text": "two, or \\"2\\"\\nlines"},\n  {"text": "drei ✓"}\n]'),
    ],
)  # fmt: skip
def test_columns_of_csv_and_json(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    corpus = open_corpus(str(tmp_path / name))
    assert list(corpus) == ["one", 'two, or "2"\nlines', "drei ✓"]
    assert list(open_corpus(str(tmp_path))) == list(corpus)
    first = corpus.read()
    next(first)
    assert list(corpus.read(first.position())) == list(corpus)[1:]


def test_tsv_quotes_nothing(tmp_path):
    (tmp_path / "a.tsv").write_text('id\tbody\n1\t"one\n2\t\n3\ttwo "quoted"\n')
    assert list(open_corpus(str(tmp_path / "a.tsv"), text_column="body")) == ['"one', 'two "quoted"']


def test_a_field_of_a_csv_file_may_be_a_long_document(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "long " * 40_000 + "\n")
    (document,) = open_corpus(str(tmp_path / "a.csv"))
    assert len(document) == 200_000


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "body,id\none,1\n"), ("a.tsv", "body\tid\none\t1\n"), ("a.json", '[{"body": "a", "id": 1}]'),
     ("a.json", '{"body": "a", "id": 1}\n')],
)  # fmt: skip
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        list(open_corpus(str(tmp_path / name)))
    assert str(caught.value) == (
        f"corpus {tmp_path / name}: no column 'text'; the columns there are body, id (name one by "
        "--text-column, or data.text_column of a recipe)"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\none,2\n", "row 1: 2 fields, but there are 1 columns"),
        ("a.csv", b"text\n\xff\n", "is not UTF-8 text: byte 0xff"),
        ("a.json", b'{"text": "one",\n "id": 1}', "neither a list of JSON objects nor one a line"),
        ("a.json", b"[1]", "row 1: not a JSON object"),
        ("a.json", b'[{"text": 1}]', "row 1: 'text' is not a string"),
        ("a.json", b"[", "not JSON"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(open_corpus(str(tmp_path / name)))
    assert str(tmp_path / name) in str(caught.value)


def test_tables_beside_text_are_not_text(write_lines, tmp_path):
    write_lines("a.txt", ["one"])
    write_lines("meta.csv", ["text", "two"])
    write_lines("config.json", ['{"text": "three"}'])
    assert list(open_corpus(str(tmp_path))) == ["one"]
    # As a file that is named, it is.
    assert list(open_corpus(str(tmp_path / "*.csv"))) == ["two"]


def test_the_fingerprint_of_text_is_by_files_and_column(write_lines):
    """Token stores in the cache depend on it; that of a table is another than that of its lines."""
    path = write_lines("a.txt", ["one"])
    stat = path.stat()
    plain = [[[str(path.resolve()), stat.st_size, stat.st_mtime_ns]], "text"]
    expected = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    assert open_corpus(str(path)).fingerprint == expected
    table = path.rename(path.with_suffix(".csv"))
    plain[0][0][0] = str(table.resolve())
    assert open_corpus(str(table)).fingerprint != hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def test_folder_is_read_in_sorted_order_without_hidden_and_foreign_files(write_lines, tmp_path):
    write_lines("c/b.txt", ["b"])
    write_lines("c/a/z.text", ["z"])
    write_lines("c/.hidden/x.txt", ["hidden"])
    write_lines("c/README.md", ["readme"])
    parquet(tmp_path / "c" / "d.parquet", texts=["d"])
    assert list(open_corpus(str(tmp_path / "c"))) == ["z", "b", "d"]


def test_a_split_may_be_a_folder_of_files(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "part-0.txt").write_text(f"{split} text\n")
    assert list(open_corpus(str(tmp_path))) == ["train text"]
    assert list(open_corpus(str(tmp_path), split="test")) == ["test text"]
    # A folder above them does not count.
    assert list(open_corpus(str(tmp_path / "test"))) == ["test text"]


def test_folder_of_splits_gives_only_the_one_asked_for(tmp_path):
    for split in ("train", "validation"):
        for shard in range(2):
            parquet(tmp_path / f"{split}-0000{shard}.parquet", texts=[f"{split} {shard}"])
    assert list(open_corpus(str(tmp_path))) == ["train 0", "train 1"]
    assert list(open_corpus(str(tmp_path), split="validation")) == ["validation 0", "validation 1"]
    with pytest.raises(UserError, match="no file of split 'test'; the splits there are train, validation"):
        open_corpus(str(tmp_path), split="test")


def test_glob_reads_the_matching_files_sorted(write_lines, tmp_path):
    for name in ("x/2.txt", "x/1.txt", "y/1.txt", "y/1.log"):
        write_lines(name, [name])
    assert list(open_corpus(f"{tmp_path}/*/1.txt")) == ["x/1.txt", "y/1.txt"]
    assert list(open_corpus(f"{tmp_path}/**/*.log")) == ["y/1.log"]


def test_fingerprint_changes_with_the_files(write_lines):
    path = write_lines("a.txt", ["one"])
    before = open_corpus(str(path)).fingerprint
    assert open_corpus(str(path)).fingerprint == before
    write_lines("a.txt", ["one", "two"])
    assert open_corpus(str(path)).fingerprint != before


@pytest.fixture(params=["files", "list", "streamed"])
def corpus(request, tmp_path, write_lines) -> Corpus:
    """23 documents or more."""
    if request.param == "list":
        return ListCorpus("list", [f"document {i}" for i in range(23)], "fingerprint")
    if request.param == "streamed":
        rows = {"text": [f"document {i}" if i % 5 else None for i in range(30)], "id": list(range(30))}
        stream = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=3)
        return StreamedDataset("streamed", stream, "text", "fingerprint")
    write_lines("a.txt", ["one", "", "two", "three"])
    write_lines("b.jsonl", [json.dumps({"text": f"json {i}"}) for i in range(4)])
    parquet(tmp_path / "c.parquet")
    write_lines("d.txt", ["last"])
    return open_corpus(str(tmp_path))


def test_reading_goes_on_from_any_position(corpus):
    everything = list(corpus)
    assert len(everything) >= 23
    for consumed in range(1, len(everything) + 1):
        reader = corpus.read()
        assert [next(reader) for _ in range(consumed)] == everything[:consumed]
        position = json.loads(json.dumps(reader.position()))
        assert list(corpus.read(position)) == everything[consumed:]


def test_readers_of_one_corpus_do_not_disturb_each_other(corpus):
    everything = list(corpus)
    first, second = corpus.read(), corpus.read()
    heads = [next(first), next(second), next(first), next(second)]
    assert heads == [everything[0], everything[0], everything[1], everything[1]]
    assert list(first) == everything[2:]
    assert list(second) == everything[2:]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset(monkeypatch, streaming):
    asked = {}

    def load_dataset(name, configuration, *, split, streaming):
        asked.update(name=name, configuration=configuration, split=split)
        dataset = datasets.Dataset.from_dict({"body": ["one", "", "two"], "id": [1, 2, 3]})
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_corpus("owner/name:config", text_column="body", split="test", streaming=streaming)
    assert list(corpus) == ["one", "two"]
    assert asked == {"name": "owner/name", "configuration": "config", "split": "test"}
    with pytest.raises(UserError, match="'owner/name': no column 'text'; the columns there are body, id"):
        open_corpus("owner/name", streaming=streaming)


def test_unknown_hub_dataset_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'wikpedia' doesn't exist\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as error:
        open_corpus("wikpedia")
    assert str(error.value) == (
        "corpus 'wikpedia': no such file or folder, and not loaded from the hub: "
        "Dataset 'wikpedia' doesn't exist"
    )


@pytest.mark.parametrize(
    "spec", ["missing.txt", "./missing", "/missing/folder", "a/b/missing", "~/missing", ""]
)
def test_missing_path_is_named_without_asking_the_hub(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"corpus '{spec}': there is no such file or folder"):
        open_corpus(spec)


def test_glob_without_match(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        open_corpus(f"{tmp_path}/*.txt")


def test_folder_without_text(write_lines, tmp_path):
    write_lines("notes.md", ["x"])
    with pytest.raises(UserError, match=r"no \.csv, \.json, .*, \.txt file in this folder"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "offset", "byte"),
    [
        (b"good line\nbad \xff line\n", 14, "0xff"),
        (b"one\ntwo\nnul\0\n", 11, "0x00"),
        (b"\x89PNG\r\n", 0, "0x89"),
    ],
)
def test_file_that_is_not_text_is_named_with_the_offset(tmp_path, content, offset, byte):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(open_corpus(str(path)))
    assert str(error.value) == f"corpus file {path} is not UTF-8 text: byte {byte} at offset {offset}"


def test_parquet_without_the_column(tmp_path):
    with pytest.raises(UserError, match="no column 'text'; the columns there are body, label"):
        list(open_corpus(str(parquet(tmp_path / "a.parquet", "body"))))


def test_parquet_column_that_is_not_text(tmp_path):
    with pytest.raises(UserError, match="column 'label' holds int64, not text"):
        list(open_corpus(str(parquet(tmp_path / "a.parquet")), text_column="label"))


def test_file_that_is_not_parquet(write_lines):
    with pytest.raises(UserError, match=r"a\.parquet is not a parquet file"):
        list(open_corpus(str(write_lines("a.parquet", ["plain text"]))))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"text": 3}', "line 2: 'text' is not a string"),
        ('{"body": "x", "id": 1}', "no column 'text'; the columns there are body, id"),
    ],
)
def test_bad_json_line_is_named(write_lines, line, message):
    path = write_lines("a.jsonl", ['{"text": "fine"}', line])
    with pytest.raises(UserError, match=message):
        list(open_corpus(str(path)))
