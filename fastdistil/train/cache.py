"""What a run computes once and later runs find again: files named by everything that they depend on."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdistil.data.token_store import default_cache_dir
from fastdistil.paths import one_spelling


def cache_file(kind: str, identity: Any, suffix: str, cache_dir: Path | None) -> Path:
    """The file of `identity`, which is JSON-able; `cache_dir` None: ~/.cache/fastdistil."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    root = default_cache_dir() if cache_dir is None else cache_dir.expanduser()
    return root / kind / f"{name}{suffix}"


def write_aside(file: Path, write: Callable[[Path], None]) -> None:
    """`write` the content beside `file` and rename it, so that a torn file is never found."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".writing-{os.getpid()}-{file.name}")
    try:
        write(partial)
        os.rename(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def model_fingerprint(source: str) -> list[Any]:
    """Of a file or a model folder, JSON-able; a name on the hub stands for itself."""
    path = Path(source).expanduser()
    # The config too: it says which output of the head is which label.
    files = [*sorted(path.glob("*.safetensors")), path / "config.json"] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return [one_spelling(source), stats]
