"""What names a model in a cache."""

import shutil
from pathlib import Path

import pytest

from fastdistil.train.cache import cache_file, model_fingerprint


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "m" / "teacher"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return "m/teacher"


def test_a_model_is_its_name_and_its_files(model):
    files = [(Path(model) / name).stat() for name in ("model.safetensors", "config.json")]
    expected = [["model.safetensors", 7, files[0].st_mtime_ns], ["config.json", 2, files[1].st_mtime_ns]]
    assert model_fingerprint(model) == [model, expected]
    assert model_fingerprint("google-bert/bert-base-uncased") == ["google-bert/bert-base-uncased", []]
    shutil.rmtree(model)
    assert model_fingerprint(model) == [model, []]


@pytest.mark.parametrize("spelling", ["m/teacher/", "./m/teacher", "m//teacher", "m/../m/teacher/."])
def test_a_folder_is_the_same_however_its_path_is_spelt(model, spelling):
    assert model_fingerprint(spelling) == model_fingerprint(model)


def test_a_cache_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file("kind", 1, ".npy", Path("~/cache")).parent == tmp_path / "cache" / "kind"
