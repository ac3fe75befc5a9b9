"""Tasks of the user's own, from a YAML file."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdistil.data.tasks import find_task, read_examples
from fastdistil.errors import UserError

TICKETS = """
columns: [title, body]
label: queue
labels: [billing, bug, feature]
metrics: [accuracy, macro_f1]
"""
ROWS = [
    ("Invoice twice", "I was charged twice.", "billing"),
    ("Crash", "It crashes at start.", "bug"),
    ("Dark mode", "Please add one.", "feature"),
]


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    (tmp_path / "tickets.yaml").write_text(TICKETS)
    folder = tmp_path / "files"
    folder.mkdir()
    for split in ("train", "validation"):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("title", "body", "queue"), *ROWS])
    return tmp_path


def test_a_file_is_a_task(tickets: Path) -> None:
    task = find_task(str(tickets / "tickets.yaml"))
    assert (task.name, task.kind, task.num_labels) == ("tickets", "classification", 3)
    assert task.argument == str(tickets / "tickets.yaml")
    assert find_task(task.argument) == task
    examples = read_examples(task, tickets / "files", "validation")
    assert examples.texts == [(title, body) for title, body, _ in ROWS]
    assert examples.labels.tolist() == [0, 1, 2]


def test_a_task_of_ours_written_down_reads_the_same(tmp_path: Path, tasks: Path) -> None:
    file = tmp_path / "mrpc.yml"
    file.write_text(
        "columns: [sentence1, sentence2]\nlabels: [not_equivalent, equivalent]\nmetrics: [accuracy, f1]\n"
        "hub: nyu-mll/glue:mrpc\n"
    )
    own, ours = find_task(str(file)), find_task("mrpc")
    assert own.hub == ours.hub
    first, second = (read_examples(task, tasks, "train") for task in (own, ours))
    assert first.texts == second.texts
    np.testing.assert_array_equal(first.labels, second.labels)


@pytest.mark.parametrize("kind", ["numbers", "text", "floats"])
def test_classes_that_are_called_by_numbers_are_found_by_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "stars.yaml").write_text("columns: [text]\nlabel: stars\nlabels: [1, 2, 3, 4, 5]\n")
    stars = {"numbers": [5, 1, 3], "text": ["5", "1", "3"], "floats": [5.0, 1.0, 3.0]}[kind]
    pq.write_table(pa.table({"text": ["good", "bad", "so so"], "stars": stars}), tmp_path / "train.parquet")
    task = find_task(str(tmp_path / "stars.yaml"))
    assert task.labels == ("1", "2", "3", "4", "5")
    assert read_examples(task, tmp_path, "train").labels.tolist() == [4, 0, 2]
    pq.write_table(pa.table({"text": ["odd"], "stars": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"row 1: 'stars' is 0; the classes are 1, 2, 3, 4, 5$"):
        read_examples(task, tmp_path, "train")


def test_a_regression_takes_any_number_or_those_of_its_range(tmp_path: Path) -> None:
    (tmp_path / "price.yaml").write_text("kind: regression\ncolumns: [text]\nlabel: price\n")
    pq.write_table(pa.table({"text": ["a", "b"], "price": [-3.5, 1e6]}), tmp_path / "train.parquet")
    task = find_task(str(tmp_path / "price.yaml"))
    assert (task.num_labels, task.metrics) == (1, ("pearson", "spearman"))
    assert read_examples(task, tmp_path, "train").labels.tolist() == [-3.5, 1e6]
    pq.write_table(pa.table({"text": ["a"], "price": [float("inf")]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"row 1: 'price' is inf, not a number$"):
        read_examples(task, tmp_path, "train")
    (tmp_path / "price.yaml").write_text("kind: regression\ncolumns: [text]\nlabel: price\nrange: [0, 9]\n")
    with pytest.raises(UserError, match=r"row 1: 'price' is inf, not a number from 0 to 9$"):
        read_examples(find_task(str(tmp_path / "price.yaml")), tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: [a, b]", "columns is missing"),
        ("columns: [t]\nlabel: t\nlabels: [a, b]", "label: 't' is one of the columns"),
        ("columns: [t, u, v]\nlabels: [a, b]", "columns: list should have at most 2 items"),
        ("columns: [t]", "labels: name the classes, two or more, in the order of their numbers"),
        ("columns: [t]\nlabels: [a]", "labels: name the classes"),
        ("columns: [t]\nlabels: [a, a]", "labels: 'a' stands there twice"),
        ("columns: [t]\nlabels: [no, yes]", r"labels.0: in YAML yes, no, .*: write it in quotes, got False"),
        ("columns: [t]\nlabels: [-1, 0, 1]", "labels: '-1' marks a row without a label"),
        (
            "columns: [t]\nlabels: [a, b, c]\nmetrics: [f1]",
            "f1 is for two classes, and there are 3: macro_f1",
        ),
        ("columns: [t]\nlabels: [a, b]\nmetrics: [pearson]", "metrics: pearson is not for classification"),
        ("columns: [t]\nlabels: [a, b]\nmetrics: [auc]", r"metrics.0: input should be 'accuracy', 'f1'"),
        ("columns: [t]\nlabels: [a, b]\nlables: 3", "unknown key lables: did you mean label"),
        ("columns: [t]\nkind: regression\nlabels: [a, b]", "labels: a regression has none"),
        ("columns: [t]\nkind: regression\nrange: [2, 1]", r"range: the first must be less than the second"),
        ("columns: [t]\nkind: span", "kind: input should be 'classification' or 'regression', got 'span'"),
        ("just text", "keys and values are wanted: name, kind, columns"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        find_task(str(file))
    assert str(error.value).startswith(f"task {file}")
    assert "\n" not in str(error.value)


def test_files_and_datasets_that_are_not_there_are_named(tickets: Path) -> None:
    with pytest.raises(UserError, match=r"task .*nowhere\.yaml: there is no such file"):
        find_task(str(tickets / "nowhere.yaml"))
    with pytest.raises(UserError, match=r"tickets\.yaml names no dataset of the hub: give the folder"):
        read_examples(find_task(str(tickets / "tickets.yaml")), None, "train")
    with pytest.raises(UserError, match=r"one of your own is a YAML file, tasks/tickets\.yaml"):
        find_task("tickets")
