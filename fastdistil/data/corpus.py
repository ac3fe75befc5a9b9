"""Where text comes from: files, folders, globs, or a dataset of the hub, all read as an iterable of
documents.

A document is one non-empty line of a text file (as in DistilBERT's own preparation script), one non-null
row of a column of parquet, JSON, csv or tsv, or one row of a `datasets` column.
"""

from __future__ import annotations

import copy
import csv
import glob
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastdistil.data.task_files import delimited
from fastdistil.errors import UserError

_JSON_LINES = {".jsonl", ".ndjson"}
_SUFFIXES = {".txt", ".text", ".parquet", *_JSON_LINES}
# In a folder of the others these are, as a rule, about the text and not the text.
_TABLES = {".csv", ".tsv", ".json"}
COLUMNS = {".parquet", *_JSON_LINES, *_TABLES}  # files that have any
_SPLIT_NAMES = ("train", "validation", "valid", "dev", "test")


class Reader(Iterator[str]):
    """One pass over a corpus. `position()` is JSON-able and `Corpus.read(position)` goes on from there."""

    def __init__(self, texts: Iterator[str | None], position: Callable[[], dict[str, Any]]) -> None:
        self._texts = texts
        self.position = position

    def __next__(self) -> str:
        for text in self._texts:
            if text is not None and not text.isspace() and text:
                return text
        raise StopIteration


class Corpus(ABC):
    """Documents that can be read again and again, always in the same order.

    Attributes:
        spec: what the user wrote, for messages.
        fingerprint: changes when the documents may have changed.
    """

    spec: str
    fingerprint: str

    @abstractmethod
    def read(self, position: dict[str, Any] | None = None) -> Reader:
        """A reader from the start, or from a `Reader.position()` of an earlier one."""

    def __iter__(self) -> Iterator[str]:
        return self.read()


class FileCorpus(Corpus):
    """Text files and those with a column of texts, one after the other."""

    def __init__(self, spec: str, files: list[Path], text_column: str) -> None:
        self.spec = spec
        self.files = files
        self.text_column = text_column
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        identity: list[Any] = [stats, text_column]
        if any(file.suffix.lower() in _TABLES for file in files):
            identity.append("columns")  # not the lines that a text file would have
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def read(self, position: dict[str, Any] | None = None) -> Reader:
        at = {"file": 0, "row": 0} if position is None else dict(position)

        def texts() -> Iterator[str | None]:
            while at["file"] < len(self.files):
                for text in file_rows(self.files[at["file"]], self.text_column, at["row"]):
                    at["row"] += 1
                    yield text
                at.update(file=at["file"] + 1, row=0)

        return Reader(texts(), at.copy)


class ListCorpus(Corpus):
    """Documents held in memory, or anything else with a length and an index."""

    def __init__(self, spec: str, documents: Any, fingerprint: str) -> None:
        self.spec = spec
        self.documents = documents
        self.fingerprint = fingerprint

    def read(self, position: dict[str, Any] | None = None) -> Reader:
        at = {"row": 0} if position is None else dict(position)

        def texts() -> Iterator[str | None]:
            while at["row"] < len(self.documents):
                at["row"] += 1
                yield self.documents[at["row"] - 1]

        return Reader(texts(), at.copy)


class StreamedDataset(Corpus):
    """A `datasets.IterableDataset`: nothing is downloaded but what is read."""

    def __init__(self, spec: str, dataset: Any, text_column: str, fingerprint: str) -> None:
        self.spec = spec
        self.dataset = dataset
        self.text_column = text_column
        self.fingerprint = fingerprint

    def read(self, position: dict[str, Any] | None = None) -> Reader:
        # A dataset holds the position of its own iteration: each reader needs one to itself.
        dataset = copy.deepcopy(self.dataset.select_columns([self.text_column]))
        if position is not None:
            dataset.load_state_dict(position)

        def texts() -> Iterator[str | None]:
            for row in dataset:
                yield row[self.text_column]

        return Reader(texts(), dataset.state_dict)


def open_corpus(
    spec: str, *, text_column: str = "text", split: str = "train", streaming: bool = False
) -> Corpus:
    """Opens the text that `spec` names.

    Args:
        spec: one of
            - "machine": English that is on this machine already (`fastdistil.data.machine_text`);
            - a file: by its suffix parquet, JSON lines (.jsonl, .ndjson), .json (a list of objects, or one a
              line), .csv and .tsv (after a line of names; tsv quotes nothing); anything else is UTF-8 text, a
              document a line;
            - a folder: its .txt, .text, .jsonl, .ndjson and .parquet files, or where there are none its
              .json, .csv and .tsv files, sorted, also those in folders below. If files, or folders that they
              lie in, are named after splits ("train.parquet", "validation-00000.parquet",
              "test/part-0.txt"), only those of `split`;
            - a glob: the files that match, sorted;
            - otherwise a dataset of the hub, "name" or "name:configuration".
        text_column: the column of files that have columns, or of the hub's dataset.
        split: of the hub's dataset, or of a folder.
        streaming: read a hub's dataset while it is downloaded. Files are never held in memory in any case,
            but for JSON that is one list.

    Raises:
        UserError: nothing there, not text, or a column that does not exist. Files are checked when they are
            read.
    """
    if spec == "machine":
        from fastdistil.data.machine_text import machine_corpus

        return machine_corpus()
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return FileCorpus(spec, _files_of_folder(path, split), text_column)
    if path.is_file():
        return FileCorpus(spec, [path], text_column)
    if any(character in spec for character in "*?["):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise UserError(f"corpus {spec!r}: no file matches")
        return FileCorpus(spec, files, text_column)
    looks_like_path = (
        spec.startswith((".", "/", "~")) or spec.count("/") > 1 or path.suffix.lower() in _SUFFIXES | _TABLES
    )
    if looks_like_path or not spec:
        raise UserError(f"corpus {spec!r}: there is no such file or folder")
    return _open_dataset(spec, text_column, split, streaming)


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    there = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    files = [file for file in there if file.suffix.lower() in _SUFFIXES]
    files = files or [file for file in there if file.suffix.lower() in _TABLES]
    if not files:
        suffixes = ", ".join(sorted(_SUFFIXES | _TABLES))
        raise UserError(f"corpus {str(folder)!r}: no {suffixes} file in this folder")
    names = (*_SPLIT_NAMES, split)
    splits = {name: [f for f in files if _belongs_to(f.relative_to(folder), name)] for name in names}
    if not any(splits.values()):
        return files
    if not splits[split]:
        present = ", ".join(name for name, members in splits.items() if members)
        raise UserError(f"corpus {str(folder)!r}: no file of split {split!r}; the splits there are {present}")
    return splits[split]


def _belongs_to(file: Path, split: str) -> bool:
    """Whether the file, or a folder that it lies in, is called after the split."""
    if split in file.parts[:-1]:
        return True
    return file.stem == split or file.stem.startswith((f"{split}-", f"{split}_", f"{split}."))


def file_rows(file: Path, column: str, start: int = 0) -> Iterator[str | None]:
    """The rows of one file from `start` on, empty ones included."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(file, column, start)
    if suffix in _JSON_LINES or (suffix == ".json" and _is_object_a_line(file)):
        return _json_rows(file, column, start)
    if suffix == ".json":
        return _json_list_rows(file, column, start)
    if suffix in (".csv", ".tsv"):
        return _delimited_rows(file, column, start)
    return _lines(file, start)


def _lines(file: Path, start: int) -> Iterator[str]:
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream):
            if number >= start:
                yield _decode(file, offset, line)
            offset += len(line)


def _decode(file: Path, offset: int, line: bytes) -> str:
    at = line.find(b"\0")
    if at < 0:
        try:
            return line.decode("utf-8-sig" if offset == 0 else "utf-8").strip()
        except UnicodeDecodeError as error:
            at = error.start
    raise UserError(f"corpus file {file} is not UTF-8 text: byte 0x{line[at]:02x} at offset {offset + at}")


def _json_rows(file: Path, column: str, start: int) -> Iterator[str | None]:
    for number, line in enumerate(_lines(file, start), start + 1):
        if not line:
            yield None
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"corpus file {file}, line {number}: not JSON ({error.msg})") from None
        yield _json_text(file, f"line {number}", column, row)


def _is_object_a_line(file: Path) -> bool:
    """Whether a JSON file is written as JSON lines, as `datasets` does whatever it is called."""
    first = next(filter(None, _lines(file, 0)), "")
    try:
        return first.startswith("{") and isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        return False


def _json_list_rows(file: Path, column: str, start: int) -> Iterator[str | None]:
    try:
        rows = json.loads("\n".join(_lines(file, 0)))
    except json.JSONDecodeError as error:
        raise UserError(f"corpus file {file}: not JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"corpus file {file}: neither a list of JSON objects nor one a line")
    for number, row in enumerate(islice(rows, start, None), start + 1):
        yield _json_text(file, f"row {number}", column, row)


def _json_text(file: Path, where: str, column: str, row: Any) -> str | None:
    if not isinstance(row, dict):
        raise UserError(f"corpus file {file}, {where}: not a JSON object")
    if column not in row:
        raise _no_column(str(file), column, list(row))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"corpus file {file}, {where}: {column!r} is not a string")
    return text


def _delimited_rows(file: Path, column: str, start: int) -> Iterator[str | None]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = delimited(stream, tabs=file.suffix.lower() == ".tsv")
        rows = filter(None, reader)
        try:
            names: list[str] = next(rows, [])
            if names and column not in names:
                raise _no_column(str(file), column, names)
            for number, row in enumerate(rows, 1):
                if len(row) > len(names):
                    raise UserError(
                        f"corpus file {file}, row {number}: {len(row)} fields, but there are {len(names)} "
                        "columns"
                    )
                if number > start:
                    yield dict(zip(names, row, strict=False)).get(column)
        except csv.Error as error:
            raise UserError(f"corpus file {file}, line {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"corpus file {file} is not UTF-8 text: byte 0x{byte:02x}") from None


def _parquet_rows(file: Path, column: str, start: int) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid:
        raise UserError(f"corpus file {file} is not a parquet file") from None
    with table:
        schema = table.schema_arrow
        if column not in schema.names:
            raise _no_column(str(file), column, schema.names)
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(f"corpus file {file}: column {column!r} holds {kind}, not text")
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if start >= rows:
                start -= rows
                continue
            for batch in table.iter_batches(batch_size=1024, row_groups=[group], columns=[column]):
                yield from batch.column(0).slice(start).to_pylist()
                start = max(0, start - batch.num_rows)


def _no_column(where: str, column: str, columns: list[str]) -> UserError:
    return UserError(
        f"corpus {where}: no column {column!r}; the columns there are {', '.join(columns)} (name one by "
        "--text-column, or data.text_column of a recipe)"
    )


def _open_dataset(spec: str, text_column: str, split: str, streaming: bool) -> Corpus:
    import datasets

    name, _, configuration = spec.partition(":")
    try:
        dataset = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"corpus {spec!r}: no such file or folder, and not loaded from the hub: {reason}"
        ) from None
    columns = dataset.column_names
    if columns is None:  # a streamed dataset without declared features: its first row tells
        columns = list(next(iter(dataset), {}))
    if text_column not in columns:
        raise _no_column(repr(spec), text_column, columns)
    identity = f"{spec}|{split}|{text_column}"
    if streaming:
        return StreamedDataset(spec, dataset, text_column, identity)
    return ListCorpus(spec, dataset[text_column], f"{identity}|{dataset._fingerprint}")
