"""English that is on this machine already: the documentation inside Python and in the installed libraries.

Corpus "machine" of `open_corpus`: it needs no network and no file of the user's. The text is what
`pydoc_data.topics` (the language reference) holds and the docstrings of the standard library and of the
libraries that this package depends on, of which only paragraphs of prose are kept: sentences, no code, no
signatures, no parameter lists, each paragraph once. Files are read as text and never imported.

What comes out depends on the versions installed, not on the order of a directory listing or on the run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fastdistil.data.corpus import ListCorpus
from fastdistil.errors import UserError

# Direct dependencies and what they bring along, the most prose for the fewest files first: the size is
# capped.
_LIBRARIES = (
    "numpy",
    "pandas",
    "networkx",
    "matplotlib",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "torch",
    "sympy",
    "fsspec",
    "rich",
    "pydantic",
    "jinja2",
    "typer",
    "click",
    "mpmath",
    "filelock",
    "transformers",
)
_MAX_CHARACTERS = 6_000_000
_MAX_FILE_BYTES = 1_000_000  # larger ones are generated tables
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "site-packages",
    "dist-packages",
    "_vendor",
    "vendored",
    "__pycache__",
}

# Strings are paired from the left, so that a closing quote is never taken for an opening one; a docstring
# is one that stands alone on its line. This is some twenty times faster than `ast` and finds the same prose.
_TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
_BEFORE_DOCSTRING = re.compile(r"[ \t]*[rRuU]?\Z")
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)|`([^`<]+?)\s*<[^`>]*>`_{1,2}")
_BACKTICKS = re.compile(r"`+([^`]*)`+_{0,2}")
_EMPHASIS = re.compile(r"(?<!\w)\*{1,2}([^*\s][^*]*)\*{1,2}(?!\w)")
_SENTENCE = re.compile(r"[A-Z][\w'\"(),;:/%.?! -]*[.!?][\")]?\Z")
_WORD = re.compile(r"(?<![\w.=/])[A-Za-z]+(?:'[a-z]+)?(?=[\s,.;:?!)\"]|\Z)")


def machine_corpus() -> ListCorpus:
    """The corpus; a document is the prose of one docstring. UserError if this Python has none."""
    documents = _documents()
    if not documents:
        raise UserError(
            "corpus 'machine': no docstring found in this Python installation; name another corpus"
        )
    digest = hashlib.sha256("\n".join(documents).encode()).hexdigest()
    return ListCorpus("machine", documents, digest)


@cache
def _documents() -> tuple[str, ...]:
    """Collected once a process: it takes seconds."""
    documents: list[str] = []
    seen: set[str] = set()
    size = 0
    for docstring in _docstrings():
        paragraphs = [paragraph for paragraph in prose(docstring) if paragraph not in seen]
        if not paragraphs:
            continue
        seen.update(paragraphs)
        documents.append(" ".join(dict.fromkeys(paragraphs)))
        size += len(documents[-1])
        if size >= _MAX_CHARACTERS:
            break
    return tuple(documents)


def _docstrings() -> Iterator[str]:
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    roots = [Path(sysconfig.get_path("stdlib"))]
    for library in _LIBRARIES:
        spec = importlib.util.find_spec(library)
        if spec is not None:
            roots += [Path(folder) for folder in spec.submodule_search_locations or ()]
    for root in roots:
        for file in python_files(root):
            yield from docstrings_of(file.read_text(encoding="utf-8", errors="ignore"))


def python_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            file = Path(folder, name)
            if name.endswith(".py") and file.stat().st_size <= _MAX_FILE_BYTES:
                yield file


def docstrings_of(source: str) -> Iterator[str]:
    for match in _TRIPLE_QUOTED.finditer(source):
        line_start = source.rfind("\n", 0, match.start()) + 1
        if _BEFORE_DOCSTRING.match(source, line_start, match.start()):
            yield inspect.cleandoc(match[2])


def prose(docstring: str) -> list[str]:
    """The paragraphs of whole English sentences, one line each, without markup."""
    paragraphs: list[list[str]] = [[]]
    indent = 0
    for line in docstring.splitlines():
        text = line.strip()
        if text and not text.strip("-=~^*#"):  # an underline: what stands above it is a heading
            paragraphs[-1] = []
            continue
        # A change of indentation separates a parameter's name from its description.
        if not text or not line.startswith(" " * indent) or line[indent] == " ":
            paragraphs.append([])
            indent = len(line) - len(line.lstrip())
        if text:
            paragraphs[-1].append(text)
    joined = (" ".join(lines) for lines in paragraphs)
    # Most paragraphs are rejected by their ends alone, before the costlier cleaning.
    cleaned = (
        _clean(text) for text in joined if len(text) >= 40 and text.rstrip('`*")')[-1:] in (".", "!", "?")
    )
    return [text for text in cleaned if _is_prose(text)]


def _clean(text: str) -> str:
    if "`" in text:
        text = _ROLE.sub(r"\1", text)
        text = _LINK.sub(lambda match: match[1] or match[2], text)
        text = _BACKTICKS.sub(r"\1", text)
    if "*" in text:
        text = _EMPHASIS.sub(r"\1", text)
    return " ".join(text.split())


def _is_prose(text: str) -> bool:
    """Sentences: from a capital to a full stop, in ordinary characters, four fifths of it plain words."""
    num_tokens = text.count(" ") + 1
    return num_tokens >= 8 and bool(_SENTENCE.match(text)) and len(_WORD.findall(text)) >= 0.8 * num_tokens
