"""A task that is on this machine already: which installed library a sentence of documentation comes from.

Task "libraries" of `find_task`: it needs no network and no file of the user's. The sentences are those of the
docstrings of eight libraries that this package depends on, directly or not, read as `machine_text` reads
them: source files as text, prose alone, nothing imported. Code is taken out and so are the libraries' own
names, which would give the answer away; what is left to go by is what a library is about and how its authors
write.

Each class has as many sentences as any other, no module has some in both splits, and no sentence is there
twice. The result depends on the versions installed, and on nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

from fastdistil.data.machine_text import docstrings_of, prose, python_files
from fastdistil.data.sentences import split_sentences
from fastdistil.data.task_files import Table
from fastdistil.errors import UserError

# In the order of their numbers; "python" is the standard library.
LIBRARIES = ("python", "numpy", "pandas", "networkx", "matplotlib", "torch", "sympy", "transformers")

_LENGTHS = range(40, 241)  # characters of a sentence
_TRAIN = 3200  # sentences of a class, at most
_VALIDATION = 250
_OF_A_MODULE = 40  # validation sentences, at most: a few long modules are no sample of a library

# What would give the answer away: the names of the libraries and their abbreviations,
_NAMES = re.compile(
    r"\b(?:c?pythons?|numpy|np|pandas|pd|networkx|nx|matplotlib|mpl|pyplot|plt|pylab|(?:py)?torch|aten|sympy"
    r"|transformers?|hugging ?face|hf)\b(?:'s)?",
    re.IGNORECASE,
)
# and identifiers: dotted names, calls, paths, options; capitals, digits or underscores inside a word.
_CODE = re.compile(r"[_()\[\]=\\<>{}@|]|[A-Za-z][./][A-Za-z]|[a-z][A-Z]|[A-Za-z]\d|\A--?[A-Za-z]")
_WORD = re.compile(r"\S+")
_PROSE = {"i.e", "e.g", "and/or"}  # what is no identifier


def library_table(split: str) -> Table:
    """Columns "sentence" and "label" of split "train" or "validation", in an order that mixes the classes.

    Raises UserError for another split, for a library that is not installed, and for one without its
    docstrings.
    """
    splits = _splits()
    if split not in splits:
        raise UserError(f"task 'libraries' has no split {split!r}; its splits are {', '.join(splits)}")
    sentences, labels = splits[split]
    columns = {"sentence": list(sentences), "label": list(labels)}
    return Table(f"the installed libraries, split {split!r}", tuple(columns), columns)


@cache
def _splits() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Collected once a process: it takes seconds."""
    modules = {library: _modules(library) for library in LIBRARIES}
    # A sentence of two libraries has no answer; of two modules, it would be in both splits.
    libraries_of: Counter[str] = Counter()
    for found in modules.values():
        libraries_of.update({sentence for sentences in found.values() for sentence in sentences})
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for library, found in modules.items():
        kept: set[str] = {sentence for sentence, count in libraries_of.items() if count > 1}
        own: dict[str, list[str]] = {"train": [], "validation": []}
        for module in sorted(found, key=_digest):
            new = sorted(set(found[module]) - kept, key=_digest)
            kept.update(new)
            if len(own["validation"]) < _VALIDATION:
                own["validation"] += new[:_OF_A_MODULE]
            else:
                own["train"] += new
        if len(own["train"]) < _VALIDATION:
            raise UserError(
                f"task 'libraries': only {sum(map(len, own.values()))} sentences in the docstrings of "
                f"{library} as it is installed here; is its source code there?"
            )
        for split, sentences in own.items():
            splits[split] += [(sentence, library) for sentence in sentences]
    limits = {"train": _TRAIN, "validation": _VALIDATION}
    return {split: _balanced(pairs, limits[split]) for split, pairs in splits.items()}


def _balanced(pairs: list[tuple[str, str]], limit: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As many of each class, in the order of their sentences' digests."""
    size = min(limit, *Counter(library for _, library in pairs).values())
    taken: Counter[str] = Counter()
    sentences, labels = [], []
    for sentence, library in sorted(pairs, key=lambda pair: _digest(pair[0])):
        if taken[library] < size:
            taken[library] += 1
            sentences.append(sentence)
            labels.append(library)
    return tuple(sentences), tuple(labels)


def _modules(library: str) -> dict[str, list[str]]:
    """File, relative to the library's folder -> the sentences of its docstrings."""
    if library == "python":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        spec = importlib.util.find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"task 'libraries' needs {library} to be installed; pip install {library}")
        root = Path(spec.submodule_search_locations[0])
    return {
        str(file.relative_to(root)): _sentences(file.read_text(encoding="utf-8", errors="ignore"))
        for file in python_files(root)
    }


def _sentences(source: str) -> list[str]:
    return [
        hidden
        for docstring in docstrings_of(source)
        for paragraph in prose(docstring)
        for sentence in split_sentences(paragraph)
        if len(hidden := _hide(sentence)) in _LENGTHS
    ]


def _hide(sentence: str) -> str:
    """The sentence without the names of the libraries and without code."""
    return _WORD.sub(_hide_code, _NAMES.sub("library", sentence))


def _hide_code(match: re.Match[str]) -> str:
    word = match[0].strip("\"'(),;:.?!")
    return match[0].replace(word, "code") if _CODE.search(word) and word not in _PROSE else match[0]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
