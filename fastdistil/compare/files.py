"""The files of a comparison, a chain and a search: never found torn, never in somebody else's folder."""

import json
from pathlib import Path
from typing import Any

from fastdistil.errors import UserError
from fastdistil.train.checkpoint import write_durably


def write_json(file: Path, plain: Any) -> None:
    """Write `plain` aside and rename it, in a folder that is made if it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".writing-{file.name}")
    write_durably(partial, (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode())
    partial.replace(file)


def check_output(output: Path, what: str, *, ours: bool) -> None:
    """`UserError` if `output` is a file, or has something in it that is not `ours`: holds no `what`."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file, not a folder")
    if not ours and output.is_dir() and any(output.iterdir()):
        raise UserError(f"output {output} is not empty and holds no {what}: choose another --output")
