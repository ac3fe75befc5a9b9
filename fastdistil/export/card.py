"""The model card, README.md, of a model folder: how it was made, what it costs, whose licence it is under."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastdistil.export.folder import Exported, read_exported

UNKNOWN = "unknown"  # also what the hub calls it
_README = "README.md"
# Pipeline of the hub and Auto class, by the end of the model class's name.
_HEADS = {
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForMultipleChoice": ("multiple-choice", "AutoModelForMultipleChoice"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
}
_ENCODER = ("feature-extraction", "AutoModel")


def write_card(
    folder: str | Path,
    *,
    title: str,
    command: str,
    made_of: str | Path,
    steps: Sequence[str] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> None:
    """Write `folder`/README.md; arguments as of `model_card`."""
    text = model_card(folder, title=title, command=command, made_of=made_of, steps=steps, facts=facts)
    (Path(folder) / _README).write_text(text, encoding="utf-8")


def model_card(
    folder: str | Path,
    *,
    title: str,
    command: str,
    made_of: str | Path,
    steps: Sequence[str] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """The text of the card.

    Args:
        folder: of the model, which has its config.json already: it says how the model is loaded.
        command: that makes the model again.
        made_of: the model, or teacher, that it was made of; a folder or a hub model. Its card says the
            licence.
        steps: of the chain, in order, a sentence each.
        facts: label and value, with its unit: scores, size, latency.
    """
    from fastdistil.models.bilstm import BiLSTMConfig

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    known = licence(made_of)
    architecture = (config.get("architectures") or [""])[0]
    pipeline, auto = next((v for end, v in _HEADS.items() if architecture.endswith(end)), _ENCODER)
    exported = read_exported(folder)
    # The class of a BiLSTM is ours: transformers alone does not know it.
    ours = config.get("fastdistil") or config.get("model_type") == BiLSTMConfig.model_type
    library = exported.runtime if exported else "fastdistil" if ours else "transformers"
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: {pipeline}\nlicense: {known}\n---",
        f"# {title}",
        f"Made of `{made_of}` by\n\n```\n{command}\n```",
    ]
    if steps:
        parts.append("\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1)))
    if facts:
        rows = [f"| {_cell(label)} | {_cell(value)} |" for label, value in facts]
        parts.append("\n".join(["| | |", "|---|---|", *rows]))
    parts += [_licence_sentence(made_of, known), "## Use", _use(library, auto, exported)]
    return "\n\n".join(parts) + "\n"


def licence(source: str | Path) -> str:
    """What the front matter of the model's README.md names as `license`, else "unknown"."""
    import yaml

    text = _card_of(source)
    if text is None or not text.startswith("---\n"):
        return UNKNOWN
    try:
        matter: Any = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return UNKNOWN
    name = matter.get("license") if isinstance(matter, dict) else None
    return name if isinstance(name, str) and name.strip() else UNKNOWN


def _card_of(source: str | Path) -> str | None:
    """The README.md of a folder, or of a model on the hub; None if there is none, or it cannot be read."""
    folder = Path(source).expanduser()
    try:
        file = folder / _README if folder.is_dir() else _fetch_card(str(source))
        return None if file is None else file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


@cache
def _fetch_card(model: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, _README))
    except Exception:  # of several libraries: no such model, no card, no network
        return None


def _licence_sentence(made_of: str | Path, known: str) -> str:
    if known == UNKNOWN:
        return (
            f"Licence: unknown, no card of `{made_of}` was found that says it: ask its authors before you "
            "pass this on."
        )
    return f"Licence: {known}, that of `{made_of}`."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _use(library: str, auto: str, exported: Exported | None) -> str:
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
    if library == "transformers":
        return (
            f"```python\nfrom transformers import {auto}, AutoTokenizer\n\n{tokenizer}"
            f'model = {auto}.from_pretrained("path/to/this/folder")\n'
            'output = model(**tokenizer("A text.", return_tensors="pt"))\n```'
        )
    code = (
        f"```python\nimport fastdistil\nfrom transformers import AutoTokenizer\n\n{tokenizer}"
        'model = fastdistil.load("path/to/this/folder")\n'
        'output = model(**tokenizer("A text.", return_tensors="pt"))\n```'
    )
    if exported is None or exported.runtime != "onnxruntime":
        return code
    return (
        f"{code}\n\nor without PyTorch:\n\n"
        f"```python\nimport onnxruntime\nfrom transformers import AutoTokenizer\n\n{tokenizer}"
        f'session = onnxruntime.InferenceSession("path/to/this/folder/{exported.file}")\n'
        'encoded = tokenizer("A text.", return_tensors="np")\n'
        "output = session.run(None, {value.name: encoded[value.name] for value in session.get_inputs()})\n```"
    )
