"""Tables in files or on the hub, as columns of Python values: parquet, tsv, csv, JSON and JSON lines."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fastdistil.errors import UserError

# In the order in which they are looked for: a folder may hold the same split in several formats.
_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".tsv", ".csv")
_LONGEST_FIELD = 2**31 - 1
MACHINE = "machine"  # in place of a dataset of the hub: made of what is installed
VALIDATION = ("validation", "dev", "valid", "val")  # what people call this split


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        where: the file or dataset, for messages.
        names: every column that is there.
        columns: the values of those that were asked for.
    """

    where: str
    names: tuple[str, ...]
    columns: dict[str, list[Any]]


def find_folder(root: Path, name: str) -> Path:
    """`root/<name>` or `root/glue/<name>`, without regard to case and punctuation, else `root` itself."""
    parents = [root, *(child for child in _folders(root) if _plain(child.name) == "glue")]
    found = [child for parent in parents for child in _folders(parent) if _plain(child.name) == _plain(name)]
    return found[0] if found else root


def split_files(folder: Path, split: str, stems: dict[str, str]) -> list[Path]:
    """The files of a split, sorted: those whose name is the split's or has it as a part, as in
    "train-00000-of-00004" or "snli_1.0_train".

    Args:
        split: "validation" finds "dev" too, "validation_matched" also "dev_matched".
        stems: file name without suffix -> split, of files whose name does not say it.

    Raises:
        UserError: no file of this split; the message names what is there.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in _SUFFIXES)
    if not files:
        raise UserError(f"{folder}: no {', '.join(_SUFFIXES)} file here, and no folder of the task")
    head, _, tail = split.partition("_")
    spellings = (
        ["_".join(filter(None, (name, tail))) for name in VALIDATION] if head in VALIDATION else [split]
    )
    named = {file: stems.get(file.stem, file.stem.lower()) for file in files}
    found = [file for file, name in named.items() if name in spellings] or [
        file for file, name in named.items() if any(_has_part(name, spelling) for spelling in spellings)
    ]
    if not found:
        there = ", ".join(sorted(set(named.values())))
        raise UserError(f"{folder}: no file of split {split!r}; those there are {there}")
    suffix = min((file.suffix.lower() for file in found), key=_SUFFIXES.index)
    return [file for file in found if file.suffix.lower() == suffix]


def read_files(files: Sequence[Path], wanted: set[str], header: tuple[str, ...] = ()) -> Table:
    """The columns `wanted` of files of one format, one after the other.

    `header` names the columns of a tsv or csv file whose first line names none of those wanted.
    """
    tables = [_read(file, wanted, header) for file in files]
    first = tables[0]
    for table in tables[1:]:
        if table.columns.keys() != first.columns.keys():
            there = ", ".join(table.names)
            raise UserError(f"{table.where}: the columns there are {there}, unlike those of {first.where}")
    if len(tables) == 1:
        return first
    joined = {name: [value for table in tables for value in table.columns[name]] for name in first.columns}
    return Table(f"{first.where} and {len(tables) - 1} more", first.names, joined)


def read_hub(path: str, configuration: str, split: str, wanted: set[str]) -> Table:
    """The columns `wanted` of a dataset of the hub, or of this machine's own."""
    if path == MACHINE:
        from fastdistil.data.machine_task import library_table

        return library_table(split)
    import datasets

    where = f"{path} ({configuration}), split {split!r}" if configuration else f"{path}, split {split!r}"
    try:
        dataset = datasets.load_dataset(path, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: not loaded from the hub: {reason}") from None
    names = tuple(dataset.column_names)
    return Table(where, names, {name: list(dataset[name]) for name in names if name in wanted})


def delimited(stream: TextIO, *, tabs: bool) -> Any:
    """A `csv.reader`, of a file opened with newline=""."""
    csv.field_size_limit(_LONGEST_FIELD)  # a field may be a whole document, and 128 KiB are the usual limit
    # GLUE's tab-separated files quote nothing: a lone " is text.
    return csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(stream)


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _has_part(stem: str, split: str) -> bool:
    return re.search(rf"(^|[-_.]){re.escape(split)}($|[-_.])", stem) is not None


def _read(file: Path, wanted: set[str], header: tuple[str, ...]) -> Table:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(file, wanted)
    try:
        if suffix in (".tsv", ".csv"):
            return _read_delimited(file, wanted, header)
        return _from_records(file, _records(file), wanted)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte 0x{error.object[error.start]:02x}") from None


def _read_parquet(file: Path, wanted: set[str]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = tuple(pq.read_schema(file).names)
        # The file alone: a folder called "label=1" above it is no column.
        table = pq.ParquetFile(file).read(columns=[name for name in names if name in wanted])
    except (pa.ArrowInvalid, OSError):
        raise UserError(f"{file} is not a parquet file") from None
    return Table(str(file), names, {name: table[name].to_pylist() for name in table.column_names})


def _read_delimited(file: Path, wanted: set[str], header: tuple[str, ...]) -> Table:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = delimited(stream, tabs=file.suffix.lower() == ".tsv")
        try:
            lines = [row for row in rows if row]
        except csv.Error as error:
            raise UserError(f"{file}, line {rows.line_num}: {error}") from None
    if not lines:
        raise UserError(f"{file} is empty")
    names = tuple(lines[0])
    if header and wanted.isdisjoint(names):
        names = header
    else:
        del lines[0]
    for number, line in enumerate(lines, 1):
        if len(line) > len(names):
            raise UserError(f"{file}, row {number}: {len(line)} fields, but there are {len(names)} columns")
        line += [None] * (len(names) - len(line))  # type: ignore[list-item]  # what a short line lacks
    places = [(name, place) for place, name in enumerate(names) if name in wanted]
    return Table(str(file), names, {name: [line[place] for line in lines] for name, place in places})


def _records(file: Path) -> Any:
    """The rows of a JSON file: of a list, of an object a line, or of SQuAD's or DREAM's own nesting."""
    text = file.read_text(encoding="utf-8-sig")
    # Not at every line break of Unicode: JSON has them in its strings.
    lines = [line for line in text.split("\n") if line.strip()]
    # `datasets` writes an object a line in files called .json too.
    object_a_line = len(lines) > 1 and all(line.startswith("{") for line in lines[:2])
    try:
        if file.suffix.lower() != ".json" or object_a_line:
            return [json.loads(line) for line in lines]
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if isinstance(value, dict) and "data" in value:
        return list(_squad_records(file, value["data"]))
    if isinstance(value, list) and value and isinstance(value[0], list):
        return list(_dream_records(file, value))
    return value if isinstance(value, list) else [value]


def _squad_records(file: Path, articles: Any) -> Iterator[dict[str, Any]]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {**question, "context": paragraph["context"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not in SQuAD's format: {error}") from None


def _dream_records(file: Path, dialogues: list[Any]) -> Iterator[dict[str, Any]]:
    try:
        for dialogue, questions, _ in dialogues:
            for question in questions:
                yield {**question, "dialogue": dialogue}
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is not in DREAM's format: {error}") from None


def _from_records(file: Path, records: list[Any], wanted: set[str]) -> Table:
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{file}, row {number}: not a JSON object")
    if not records:
        raise UserError(f"{file} has no rows")
    names = tuple(records[0])
    kept = [name for name in names if name in wanted]
    return Table(str(file), names, {name: [record.get(name) for record in records] for name in kept})
