"""The text found in an installation is prose, the same in every run, and large enough to train on."""

import re

import pytest

from fastdistil.data import machine_text
from fastdistil.data.corpus import open_corpus
from fastdistil.errors import UserError

DOCSTRING = '''
def f(x):
    r"""Computes the :func:`~torch.special.expit` of *each* element, and ``never`` writes to its argument.

    .. math::
        y = x + 1

    The result has the same shape as the input
    and is see `the manual <https://example.org>`_ always a new tensor.

    Parameters
    ----------
    x : array_like
        The values whose function is wanted, in any order that the caller likes.
    out (`Tensor`, *optional*, defaults to `None`): Where to put it.

    Example::

        >>> f(torch.ones(3)).sum().item()  # this is a long line of code that is not prose.
    """
    query = """SELECT everything from the table where nothing is ever as it seems to be."""
    return x
'''


def test_prose_of_a_docstring():
    (docstring,) = machine_text.docstrings_of(DOCSTRING)
    assert machine_text.prose(docstring) == [
        "Computes the torch.special.expit of each element, and never writes to its argument.",
        "The result has the same shape as the input and is see the manual always a new tensor.",
        "The values whose function is wanted, in any order that the caller likes.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "too short to tell.",
        "continues a sentence that began somewhere else in the docstring, and then ends.",
        "The heading of a section that nobody ever closed with a full stop",
        "Foo(bar=1, baz=2) -> qux[3] = {4: 5} + 6 * x.y.z / w[7] - 8 and so on.",
    ],
)
def test_what_is_not_prose_is_left_out(text):
    assert machine_text.prose(text) == []


@pytest.fixture
def small_installation(monkeypatch):
    monkeypatch.setattr(machine_text, "_MAX_CHARACTERS", 700_000)
    machine_text._documents.cache_clear()
    yield
    machine_text._documents.cache_clear()


def test_corpus_is_english_without_repetition(small_installation):
    documents = open_corpus("machine").documents
    assert 700_000 <= sum(map(len, documents)) < 800_000
    assert len(set(documents)) == len(documents)
    text = " ".join(documents)
    words = re.findall(r"[a-z]+", text.lower())
    # The most frequent word of English is some four to seven per cent of a text; in code it is nowhere near.
    assert 0.04 < words.count("the") / len(words) < 0.09
    assert ">>>" not in text
    assert sum(character.isalpha() or character == " " for character in text) > 0.93 * len(text)


def test_corpus_is_the_same_in_every_run(small_installation):
    first = machine_text.machine_corpus()
    machine_text._documents.cache_clear()
    second = machine_text.machine_corpus()
    assert first.documents == second.documents
    assert first.fingerprint == second.fingerprint


def test_installation_without_documentation_is_refused(monkeypatch):
    monkeypatch.setattr(machine_text, "_documents", tuple)
    with pytest.raises(UserError, match="no docstring found"):
        open_corpus("machine")
