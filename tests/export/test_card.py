"""Model cards: what made the model, whose licence it is under, how it is loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdistil.export.card import UNKNOWN, _fetch_card, licence, model_card


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdistil.export.card._fetch_card", _fetch_card.__wrapped__)  # without its cache
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _folder(path: Path, **config: object) -> Path:
    path.mkdir()
    plain = {"architectures": ["BertForSequenceClassification"], **config}
    (path / "config.json").write_text(json.dumps(plain))
    return path


def _readme(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "README.md").write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n\n# Model", "apache-2.0"),
        ("---\ntags: [a]\n---\n\nlicense: mit", UNKNOWN),
        ("license: mit", UNKNOWN),
        ("---\nlicense: [unclosed\n---\n", UNKNOWN),
        ("---\n- license\n---\n", UNKNOWN),
    ],
)
def test_licence_is_that_of_the_front_matter(text: str, expected: str, tmp_path: Path) -> None:
    assert licence(_readme(tmp_path / "teacher", text)) == expected


def test_licence_of_a_folder_without_a_card(tmp_path: Path) -> None:
    assert licence(tmp_path) == UNKNOWN


def test_licence_of_a_model_on_the_hub_is_that_of_its_card_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = _readme(tmp_path / "cached", "---\nlicense: mit\n---\n") / "README.md"

    def download(model: str, file: str) -> str:
        if model != "owner/with-card":
            raise OSError("no network")
        assert file == "README.md"
        return str(card)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert licence("owner/with-card") == "mit"
    assert licence("owner/out-of-reach") == UNKNOWN


def test_card_hands_the_licence_on(tmp_path: Path) -> None:
    teacher = _readme(tmp_path / "teacher", "---\nlicense: mit\n---\n")
    student = _folder(tmp_path / "student")
    text = model_card(student, title="t", command="c", made_of=teacher)
    (student / "README.md").write_text(text)
    assert licence(student) == "mit"


def test_card_without_a_licence_says_whom_to_ask(tmp_path: Path) -> None:
    text = model_card(_folder(tmp_path / "student"), title="t", command="c", made_of="a/teacher")
    assert "license: unknown\n" in text
    assert "Licence: unknown, no card of `a/teacher` was found that says it: ask its authors" in text


def test_card_lists_steps_and_facts(tmp_path: Path) -> None:
    text = model_card(
        _folder(tmp_path / "m"),
        title="sst2: pkd+int8",
        command="fastdistil compare t --methods pkd+int8",
        made_of="t",
        steps=["Distilled.", "Quantised."],
        facts=[("accuracy", "91.2%"), ("size | disk", "3 MB")],
    )
    assert "# sst2: pkd+int8\n" in text
    assert "1. Distilled.\n2. Quantised.\n" in text
    assert "| accuracy | 91.2% |\n| size \\| disk | 3 MB |\n" in text


@pytest.mark.parametrize(
    ("config", "loader"),
    [
        ({}, "AutoModelForSequenceClassification.from_pretrained("),
        ({"architectures": ["BertModel"]}, "AutoModel.from_pretrained("),
        ({"fastdistil": {"replacements": []}}, "fastdistil.load("),
        ({"model_type": "fastdistil-bilstm"}, "fastdistil.load("),
        (
            {"fastdistil": {"runtime": "onnxruntime", "file": "m.onnx", "parameters": 1}},
            'onnxruntime.InferenceSession("path/to/this/folder/m.onnx")',
        ),
    ],
)
def test_card_says_how_the_model_is_loaded(config: dict[str, object], loader: str, tmp_path: Path) -> None:
    assert loader in model_card(_folder(tmp_path / "m", **config), title="t", command="c", made_of="t")


@pytest.mark.parametrize("is_bilstm", [False, True])
def test_the_code_of_a_card_runs(
    is_bilstm: bool, source: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification

    from fastdistil.models.bilstm import make_bilstm

    model = AutoModelForSequenceClassification.from_pretrained(source)
    if is_bilstm:
        model = make_bilstm(model, pairs=False, hidden_size=5, fc_size=7)
    folder = tmp_path / "path" / "to" / "this" / "folder"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = model_card(folder, title="t", command="c", made_of="t")
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    # In a process of its own: here the class of a BiLSTM is known already.
    script = f"{code}\nprint(*output.logits.shape)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "3"]
