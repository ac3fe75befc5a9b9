"""What a comparison keeps of its finished parts, so that one that is interrupted repeats none of them.

output/
  compare.json         teacher, task and held-out examples: another comparison cannot go on here
  rows/<method>/       seed-<n>.json: the model of one method and one seed, scored
  timings.json         what the models cost to run, and which models these were
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdistil.compare.costs import Cost, Measured
from fastdistil.compare.files import check_output, write_json
from fastdistil.compare.results import Timing
from fastdistil.errors import UserError
from fastdistil.evaluate.cost import weight_files

COMPARISON = "compare.json"


@dataclass(frozen=True)
class Piece:
    """One finished model: what it is, and how good."""

    identity: dict[str, Any]  # everything that decides what was made
    folder: str | None  # of the model, relative to the comparison's folder; None: the teacher's, elsewhere
    scores: dict[str, float]
    parameters: int
    disk_bytes: int
    seconds: float | None  # it took to make
    notes: list[str] = field(default_factory=list)


class Pieces:
    """The files in a comparison's folder."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def check(self, identity: dict[str, Any]) -> None:
        """`UserError` if the folder is another comparison's, or somebody else's."""
        output, file = self.output, self.output / COMPARISON
        check_output(output, "comparison", ours=file.exists())
        if file.exists() and (change := difference(_read(file), identity)):
            raise UserError(
                f"output {output} holds another comparison: {change}; give what it was begun with, or "
                "choose another --output"
            )

    def begin(self, identity: dict[str, Any]) -> None:
        """Make the folder, which was checked, this comparison's."""
        write_json(self.output / COMPARISON, identity)

    def find(self, method: str, seed: int, identity: dict[str, Any]) -> Piece | None:
        """The finished piece; None if it, or its model, is not there.

        `UserError` if it was made in another way than `identity` says.
        """
        file = self._file(method, seed)
        if not file.exists():
            return None
        piece = Piece(**_read(file))
        if change := difference(piece.identity, identity):
            raise UserError(
                f"{self.output}: {method} was made otherwise: {change}; give what it was made with, or "
                "choose another --output"
            )
        return piece if piece.folder is None or (self.output / piece.folder).is_dir() else None

    def keep(self, method: str, seed: int, piece: Piece) -> None:
        write_json(self._file(method, seed), asdict(piece))

    def traceback_file(self, method: str, seed: int) -> Path:
        """Where the traceback of an error goes that is nobody's mistake but ours."""
        file = self._file(method, seed).with_suffix(".traceback.txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def measured(self) -> Measured | None:
        file = self.output / "timings.json"
        if not file.exists():
            return None
        plain = _read(file)
        costs = {
            name: Cost(**{**cost, "timings": [Timing(**timing) for timing in cost["timings"]]})
            for name, cost in plain["costs"].items()
        }
        return Measured(**{**plain, "costs": costs})

    def keep_measured(self, measured: Measured) -> None:
        write_json(self.output / "timings.json", asdict(measured))

    def _file(self, method: str, seed: int) -> Path:
        return self.output / "rows" / slug(method) / f"seed-{seed}.json"


def slug(method: str) -> str:
    """A method's name as that of a folder: "kd+prune-ffn:0.5" is "kd+prune-ffn-0.5"."""
    return re.sub(r"[^\w.+-]+", "-", method)


def weights_sha256(folder: Path) -> str:
    """Of a model's weights and its config: the same wherever the folder lies."""
    digest = hashlib.sha256()
    for file in (folder / "config.json", *weight_files(folder)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def fingerprint(folder: Path) -> list[Any]:
    """Names, sizes and times of a model's weights: enough to see that it was made anew."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weight_files(folder)]


def difference(old: Any, new: Any, path: str = "") -> str | None:
    """`key was old value, is new value` of the first key that differs; None if there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs: Iterable[tuple[str, Any, Any]] = ((str(k), old.get(k), new.get(k)) for k in {**old, **new})
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = ((str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True)))
    else:
        return None if old == new else f"{path} was {old!r}, is {new!r}"
    found = (difference(a, b, f"{path}.{key}" if path else key) for key, a, b in pairs)
    return next((text for text in found if text), None)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not what a comparison wrote ({error}): remove it") from None
