"""Sentences of the installed libraries: balanced, without what gives them away, no module in both splits."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastdistil.data import machine_task
from fastdistil.data.machine_task import LIBRARIES
from fastdistil.data.tasks import find_task, read_examples
from fastdistil.errors import UserError


def test_every_class_has_as_many_examples():
    task = find_task("libraries")
    for split, least in (("train", 1000), ("validation", 100)):
        examples = read_examples(task, None, split)
        counts = Counter(examples.labels.tolist())
        assert counts.keys() == set(range(8))
        assert len(set(counts.values())) == 1
        assert counts[0] >= least
        assert examples.split == split


def test_classes_are_mixed():
    first = read_examples(find_task("libraries"), None, "train").labels[:200]
    assert len(set(first.tolist())) == 8


def test_no_sentence_is_there_twice():
    splits = machine_task._splits()
    sentences = [sentence for split in splits.values() for sentence in split[0]]
    assert len(sentences) == len(set(sentences))


def test_names_of_the_libraries_are_gone():
    sentences = [s.lower() for split in machine_task._splits().values() for s in split[0]]
    for name in (*LIBRARIES, "pytorch", "cpython"):
        assert not [s for s in sentences if name in s.replace("-", " ").split()], name


def test_data_machine_is_data_none():
    task = find_task("libraries")
    ours, plain = read_examples(task, "machine", "validation"), read_examples(task, None, "validation")
    assert ours.texts == plain.texts
    assert np.array_equal(ours.labels, plain.labels)


def test_files_of_the_task_can_be_given_too(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"sentence": "Draws a line.", "label": "matplotlib"}\n')
    examples = read_examples(find_task("libraries"), tmp_path, "train")
    assert examples.texts == [("Draws a line.",)]
    assert examples.labels.tolist() == [LIBRARIES.index("matplotlib")]


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Like np.sum, but of a masked array.", "Like code, but of a masked array."),
        ("Python's DataFrame has a to_csv() method.", "library code has a code() method."),
        ("Pass --no-cache or use sys.path[0] instead.", "Pass code or use code instead."),
        ("PyTorch and NumPy arrays, float32 or int8.", "library and library arrays, code or code."),
        ("An e-mail, i.e. text, and/or a self-loop.", "An e-mail, i.e. text, and/or a self-loop."),
        ("Well known since 1990, with 3 exceptions.", "Well known since 1990, with 3 exceptions."),
    ],
)
def test_code_and_names_are_hidden(text, hidden):
    assert machine_task._hide(text) == hidden


def modules(library: str, number: int, sentences: int = 40) -> dict[str, list[str]]:
    return {
        f"{n}.py": [f"Sentence {i} of module {n} of the library {library}." for i in range(sentences)]
        for n in range(number)
    }


@pytest.fixture
def libraries(monkeypatch):
    """Eight libraries of 40 modules with 40 sentences each, which a test may change."""
    found = {library: modules(library, 40) for library in LIBRARIES}
    monkeypatch.setattr(machine_task, "_modules", found.__getitem__)
    machine_task._splits.cache_clear()
    yield found
    machine_task._splits.cache_clear()


def test_no_module_has_sentences_in_both_splits(libraries):
    splits = machine_task._splits()
    module = {
        s: (library, n) for library, found in libraries.items() for n, own in found.items() for s in own
    }
    train, validation = ({module[s] for s in splits[split][0]} for split in ("train", "validation"))
    assert train
    assert validation
    assert train.isdisjoint(validation)


def test_a_sentence_of_two_libraries_is_left_out(libraries):
    shared = "This is a sentence that two libraries have in their docstrings."
    for library in ("numpy", "torch"):
        libraries[library]["0.py"].append(shared)
    assert shared not in [s for split in machine_task._splits().values() for s in split[0]]


def test_the_smallest_library_sets_the_size_of_the_classes(libraries):
    libraries["sympy"] = modules("sympy", 20)
    assert Counter(machine_task._splits()["train"][1]) == dict.fromkeys(LIBRARIES, (20 - 7) * 40)


def test_a_library_without_docstrings_is_named(libraries):
    libraries["pandas"] = {}
    with pytest.raises(UserError, match=r"^task 'libraries': only 0 sentences in the docstrings of pandas"):
        machine_task._splits()


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^task 'libraries' needs numpy to be installed; pip install numpy$"):
        machine_task._modules("numpy")


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"^task 'libraries' has no split 'test'; its splits are train, val"):
        machine_task.library_table("test")


def test_sentences_of_a_module_do_not_depend_on_where_it_is(tmp_path, monkeypatch):
    source = '"""Reads the whole of a file into memory at once, and then closes it again."""\n'
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "package").mkdir(parents=True)
        (folder / "package" / "module.py").write_text(source)
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        monkeypatch.setattr("sysconfig.get_path", lambda name, folder=folder: str(folder))
        found.append(machine_task._modules("python"))
    assert found[0] == found[1]
    assert found[0] == {
        str(Path("package", "module.py")): [
            "Reads the whole of a file into memory at once, and then closes it again."
        ]
    }
