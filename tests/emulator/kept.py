"""What a deterministic run found, kept by the content of all that it depends on.

One file a result, named after a hash, in $XDG_CACHE_HOME/lora_ext/runs, ~/.cache by default. With
another, empty folder as XDG_CACHE_HOME everything runs anew. Beyond LIMIT the oldest go.
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_ext" / "runs"
LIMIT = 64 * 2**20


@cache
def _digest(path: Path, modified_ns: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(path: Path) -> str:
    status = path.stat()
    return _digest(path, status.st_mtime_ns, status.st_size)


def key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(name: str) -> Any:
    """What was stored by this key, or None. It counts as used now."""
    path = FOLDER / name
    try:
        found = json.loads(path.read_text())
        os.utime(path)
    except (OSError, ValueError):
        return None
    return found


def store(name: str, value: Any) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    partial = FOLDER / f"{name}.{os.getpid()}"
    partial.write_text(json.dumps(value))
    partial.replace(FOLDER / name)


def trim() -> None:
    """Removes the oldest beyond LIMIT."""
    found = []
    for path in FOLDER.glob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # by another process
            continue
        found.append((status.st_mtime_ns, status.st_size, path))
    size = 0
    for _, each, path in sorted(found, reverse=True):
        size += each
        if size > LIMIT:
            path.unlink(missing_ok=True)
