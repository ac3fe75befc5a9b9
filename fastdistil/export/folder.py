"""The folder of an exported model: the runtime's file beside a transformers config and tokenizer.

`config.json` has, beside what the model's config says, under "fastdistil", what the runtime is and what the
export was checked to do (`Exported`).
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastdistil.errors import UserError

Runtime = Literal["onnxruntime", "executorch"]
_RUNTIMES = {"onnxruntime": "ONNX", "executorch": "ExecuTorch"}


@dataclass(frozen=True)
class Exported:
    """What `config.json` of an exported folder has under "fastdistil"."""

    runtime: Runtime
    file: str  # the runtime's file in the folder, weights included
    parameters: int  # of the model in PyTorch
    quantized: Literal["dynamic", "static"] | None = None
    max_error: float | None = None  # of the outputs, absolute, from those of the model it was made from
    agreement: float | None = None  # fraction of the checked outputs with the same largest entry
    max_batch: int | None = None  # examples that the file takes at once; None: any number
    max_length: int | None = None  # tokens
    inputs: list[str] = field(default_factory=list)  # in order, where the file does not say
    outputs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block ends well, and is removed if it does not.

    Raises `UserError` if `folder` exists and has something in it.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; give the export another place, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        partial = Path(temporary) / "model"
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)


def write_exported(folder: Path, config: Any, architecture: str, exported: Exported) -> None:
    """`config.json`. The list of replaced modules is left out: the file holds what became of them.

    `architecture` is the class of transformers.
    """
    plain = config.to_dict() | {"architectures": [architecture], "fastdistil": asdict(exported)}
    del plain["_name_or_path"]
    (folder / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_exported(folder: str | Path) -> Exported | None:
    """What an exported folder says of itself; None of any other folder, and of a hub model."""
    file = Path(folder).expanduser() / "config.json"
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    facts = plain.get("fastdistil") if isinstance(plain, dict) else None
    if not isinstance(facts, dict) or facts.get("runtime") not in _RUNTIMES:
        return None
    known = {name: value for name, value in facts.items() if name in Exported.__dataclass_fields__}
    try:
        return Exported(**known)
    except TypeError as error:
        raise UserError(f"{file} does not describe an exported model: {error}") from None


def copy_tokenizer(source: Path, folder: Path) -> None:
    """All of the folder's small files but its config and its card, which are written anew."""
    for file in source.iterdir():
        if file.suffix in {".json", ".txt", ".model", ".jinja"} and file.name != "config.json":
            shutil.copy2(file, folder / file.name)
