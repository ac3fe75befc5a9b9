"""Documents come out whole and in order, and sentences end where a reader would end them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdistil.data.corpus import ListCorpus, open_corpus
from fastdistil.data.sentences import read_documents, split_sentences
from fastdistil.errors import UserError

TEXT = Path(__file__).parents[3] / "shared/data/text"
needs_text = pytest.mark.skipif(not TEXT.is_dir(), reason="the shared text is not here")


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rained.", "We stayed in.", "Why not?", "Nobody asked!", "Well…", "No."],
        ['She said "Stop!"', "He did.", '"Why?" he asked.', "(Nobody knew.)", "[Then] it ended."],
        ["Dr. Smith met J. R. R. Tolkien and Mr. Lee of Acme Inc. Tokyo.", "They talked."],
        ["The U.S. Army and others (e.g. NATO) agreed, cf. Clause 5 et al. Miller.", "Others did not."],
        ["Version 2.0 of No. 5 cost 3.50 dollars.", "Élan vital follows.", "Ärger auch."],
        ["He said no. 5 of them left and went on to e.g. the sea.", "Nobody saw them."],
        ["The game ( 2010 ) began .", "It ended ."],
        ["all of this is lower case. so it stays one sentence. really."],
        ["A heading without a stop"],
    ],
)
def test_sentences_end_where_a_reader_would_end_them(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


def test_line_breaks_end_sentences_and_empty_lines_are_none():
    assert split_sentences("A heading\nA line. And more \n\n  \r\nlast") == [
        "A heading",
        "A line.",
        "And more",
        "last",
    ]
    assert split_sentences(" \n ") == []


@needs_text
def test_gold_sentence_ends_are_found():
    """WikiSplit: one sentence rewritten as two by hand; " <::::> " is between them."""
    rows = pq.read_table(TEXT / "wikisplit/validation.parquet")["split"].to_pylist()
    pairs = [[part.strip() for part in row.split("<::::>")] for row in rows]
    found = sum(split_sentences(" ".join(pair)) == pair for pair in pairs)
    assert found > 0.99 * len(pairs) > 4000


@needs_text
@pytest.mark.parametrize("name", ["enwik8", "wikitext2_raw"])
def test_no_text_is_lost(name):
    corpus = open_corpus(str(TEXT / name / "validation.parquet"))
    for text in corpus:
        assert " ".join(split_sentences(text)).split() == text.split()


def documents(path: Path, **keywords) -> list[list[str]]:
    return list(read_documents(open_corpus(str(path)), **keywords))


def test_each_row_is_a_document(write_lines):
    path = write_lines("corpus.txt", ["One. Two.", "Three."])
    assert documents(path) == [["One.", "Two."], ["Three."]]
    assert list(read_documents(["One. Two.", " ", "Three."])) == [["One.", "Two."], ["Three."]]
    rows = write_lines("corpus.jsonl", ['{"text": "One. Two."}', '{"text": ""}', "", '{"text": "Three."}'])
    assert documents(rows) == [["One.", "Two."], ["Three."]]


def test_empty_lines_of_a_text_file_separate_documents(write_lines):
    path = write_lines("corpus.txt", ["", "One. Two.", "Three.", "", " ", "Four.", "Five.", "", ""])
    assert documents(path) == [["One.", "Two.", "Three."], ["Four.", "Five."]]


def test_empty_lines_around_the_text_of_a_file_separate_nothing(write_lines):
    path = write_lines("corpus.txt", ["", "One. Two.", "Three.", ""])
    assert documents(path) == [["One.", "Two."], ["Three."]]


def test_files_are_read_one_by_one(write_lines, tmp_path):
    write_lines("a.txt", ["One.", "Two.", "", "Three."])
    write_lines("b.txt", ["Four.", "Five."])
    assert documents(tmp_path) == [["One.", "Two."], ["Three."], ["Four."], ["Five."]]


def test_rows_of_equal_value_in_the_document_column_are_one_document(write_lines, tmp_path):
    rows = [("a", "One."), ("a", None), ("a", "Two. Three."), ("b", "Four."), ("a", "Five."), ("c", "")]
    titles, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"title": titles, "text": texts}), tmp_path / "corpus.parquet")
    expected = [["One.", "Two.", "Three."], ["Four."], ["Five."]]
    assert documents(tmp_path / "corpus.parquet", document_column="title") == expected
    lines = write_lines("corpus.jsonl", ['{"id": "1", "text": "One."}', '{"id": "1", "text": "Two."}'])
    assert documents(lines, document_column="id") == [["One.", "Two."]]
    table = write_lines("corpus.csv", ["id,text", "1,One.", "1,Two.", "2,Three."])
    assert documents(table, document_column="id") == [["One.", "Two."], ["Three."]]
    assert documents(table) == [["One."], ["Two."], ["Three."]]


def test_document_column_that_is_not_there_is_refused(write_lines, tmp_path):
    pq.write_table(pa.table({"text": ["One."]}), tmp_path / "corpus.parquet")
    with pytest.raises(UserError, match=r"no column 'title'; the columns there are text"):
        documents(tmp_path / "corpus.parquet", document_column="title")
    with pytest.raises(UserError, match=r"corpus\.txt: a text file has no column 'title'"):
        documents(write_lines("corpus.txt", ["One."]), document_column="title")
    with pytest.raises(UserError, match=r"corpus 'listed': only parquet, JSON, csv and tsv files"):
        list(read_documents(ListCorpus("listed", ["One."], ""), "title"))
