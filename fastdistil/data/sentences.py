"""Documents as lists of sentences, for BERT's next-sentence prediction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from fastdistil.data.corpus import COLUMNS, Corpus, FileCorpus, file_rows
from fastdistil.errors import UserError

_STOP = re.compile(r"""([.!?…])["'”’»)\]]*\s+(?=["'“‘«(\[]*(\w))""")
# What keeps its own full stop: an initial ("J."), what has stops inside ("U.S."), and words that a capital
# often follows. ("No." is followed by a number, with which no sentence begins here.)
_ABBREVIATION = re.compile(
    r"""(?: \A | [\s"'“‘«(\[] )
    (?: [^\W\d_] | \S*\.\S*
    | mr | mrs | ms | mx | messrs | dr | prof | rev | fr | hon | st | ste | sr | jr | pres | gov | sen | rep
    | amb | gen | lt | col | maj | capt | cmdr | adm | sgt | cpl | pvt | mt | ft | vs | cf | al | ed | eds
    | trans | ca | inc | ltd | co | corp | bros | dept | univ | var | subsp ) \Z""",
    re.VERBOSE | re.IGNORECASE,
)
_LONGEST_ABBREVIATION = 12


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, by rules; joined again with white space they are the text.

    A line break ends a sentence. So does a full stop, exclamation or question mark, or ellipsis, with the
    quotes and brackets that close behind it, where white space and a capital letter follow; but not the full
    stop of an initial ("J. Smith"), of an abbreviation with stops inside ("U.S.") or of one in a short list.
    In doubt two sentences stay one, which harms next-sentence prediction less than a false end. Text in lower
    case, or in a script without capitals, is split at line breaks alone.
    """
    sentences = []
    for line in text.splitlines():
        start = 0
        for stop in _STOP.finditer(line):
            if stop[2].isupper() and not (stop[1] == "." and _is_abbreviated(line, stop.start())):
                sentences.append(line[start : stop.end()])
                start = stop.end()
        sentences.append(line[start:])
    return [stripped for sentence in sentences if (stripped := sentence.strip())]


def _is_abbreviated(line: str, stop: int) -> bool:
    """Whether the full stop at `stop` belongs to the word before it."""
    return _ABBREVIATION.search(line, max(0, stop - _LONGEST_ABBREVIATION), stop) is not None


def read_documents(corpus: Corpus | Iterable[str], document_column: str | None = None) -> Iterator[list[str]]:
    """The documents of a corpus, each as the list of its sentences.

    A document is a row of the corpus. Two kinds of files hold documents of several rows: in a text file with
    empty lines between its lines these separate the documents, as in BERT's own input format; and with a
    `document_column` consecutive rows of another file that have the same value in it are one.

    Raises:
        UserError: `document_column` of a corpus that has none, or what reading the corpus raises.
    """
    if not isinstance(corpus, FileCorpus):
        if document_column is not None:
            spec = corpus.spec if isinstance(corpus, Corpus) else "documents"
            raise UserError(
                f"corpus {spec!r}: only parquet, JSON, csv and tsv files are read with a document column, "
                f"not {document_column!r} of this corpus"
            )
        rows = ([row] for row in corpus)
    else:
        rows = (
            document
            for file in corpus.files
            for document in _documents_of(file, corpus.text_column, document_column)
        )
    for document in rows:
        sentences = [sentence for row in document for sentence in split_sentences(row)]
        if sentences:
            yield sentences


def _documents_of(file: Path, text_column: str, document_column: str | None) -> Iterator[list[str]]:
    """The documents of one file, as lists of rows."""
    texts = file_rows(file, text_column, 0)
    if document_column is not None:
        if file.suffix.lower() not in COLUMNS:
            raise UserError(f"corpus file {file}: a text file has no column {document_column!r}")
        rows = zip(file_rows(file, document_column, 0), texts, strict=True)
        for _, group in groupby(rows, key=itemgetter(0)):
            yield [text for _, text in group if text]
    elif file.suffix.lower() not in COLUMNS and _has_empty_lines(texts):
        for is_text, lines in groupby(file_rows(file, text_column, 0), key=bool):
            if is_text:
                yield [line for line in lines if line]
    else:
        for text in file_rows(file, text_column, 0):
            yield [text or ""]


def _has_empty_lines(lines: Iterable[str | None]) -> bool:
    """Whether an empty line lies between two lines of text."""
    runs = [is_text for is_text, _ in groupby(lines, key=bool)]
    return runs.count(True) > 1
