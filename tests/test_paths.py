"""A folder has one spelling, whatever a user types; a name on the hub has its own."""

from pathlib import Path

import pytest

from fastdistil.paths import one_spelling


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, and the one where commands run."""
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "typed", ["models/bert", "models/bert/", "./models/bert", "models//bert", "models/../models/bert"]
)
def test_a_folder_has_one_spelling(home: Path, typed: str) -> None:
    assert one_spelling(typed) == "models/bert"


def test_the_home_folder_is_spelled_out(home: Path) -> None:
    assert one_spelling("~/models/bert/") == f"{home}/models/bert"
    assert one_spelling("~/models/roberta") == f"{home}/models/roberta"


@pytest.mark.parametrize("name", ["owner/name", "name", "./nothing/", "owner//name"])
def test_what_is_no_folder_is_left_alone(home: Path, name: str) -> None:
    assert one_spelling(name) == name


def test_two_dots_behind_a_link_are_left_alone(home: Path) -> None:
    (home / "far" / "away").mkdir(parents=True)
    (home / "far" / "bert").mkdir()
    (home / "models" / "link").symlink_to(home / "far" / "away")
    assert one_spelling("models/link/../bert") == "models/link/../bert"
