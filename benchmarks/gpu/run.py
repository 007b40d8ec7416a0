"""One run of `make gpu`: its document, where it is kept, and how much time is left."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .. import results
from ..results import Document
from .child import ROOT, Log

# Of the machine, for results to belong together: other kernels are another machine.
_SAME = ("name", "device", "versions", "sources")
MEASURED = ("csrc", "lora_ext", "setup.py")
CHECKING = ("benchmarks", "emulator", "tests")
_SUFFIXES = {".py", ".cpp", ".cu", ".h", ".cuh"}
_OVERRUN = 3.0  # a stage is stopped after so many times what it is expected to take
# What a command, and a stage's measurements, may take at least where only the code is tried.
_TRIAL_S, _TRIAL_MEASURED_S = 180.0, 20.0


@dataclass
class Run:
    """What every stage gets.

    Attributes:
        device: "cuda", or "cpu" to try the code.
        out: the folder for everything that the run writes.
        document: what has been found so far, written to out/results.json after each finding.
        quick: only what matters most.
        end: when to stop, as `time.monotonic()` counts.
        checking: a hash of the tests and benchmarks, which a stage's result is done for.
        log: where all that children print is kept.
    """

    device: str
    out: Path
    document: Document
    quick: bool = False
    end: float = float("inf")
    checking: str = ""
    log: Log = field(default_factory=lambda: Log(None))
    stages: dict = field(init=False)

    def __post_init__(self) -> None:
        self.stages = self.document.setdefault("stages", {})

    @property
    def path(self) -> Path:
        """The results' file."""
        return self.out / "results.json"

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    @property
    def hard_end(self) -> float:
        """When everything is stopped. Where only the code is tried, the end does not count."""
        return self.end if self.device == "cuda" else float("inf")

    def limit_s(self, expected_s: float) -> float:
        """How long what is expected to take so many seconds may take now."""
        longest = _OVERRUN * expected_s
        if self.device == "cuda":
            return min(longest, self.left)
        return max(_TRIAL_S, min(longest, self.left))

    def until(self, seconds: float) -> float:
        """When a stage that may take so many seconds begins no further measurement."""
        if self.device != "cuda":
            seconds = max(_TRIAL_MEASURED_S, min(seconds, self.left))
        return time.monotonic() + seconds

    def say(self, text: str) -> None:
        """Prints and logs what is about to run, before it does."""
        self.log.write(f"== {text}")
        print(text, flush=True)

    def write(self) -> None:
        """Keeps the document; a full disk is a word on stderr, not the end."""
        results.keep(self.document, self.path)


def hash_of(names: Iterable[str]) -> str:
    """Of the sources under these files and folders of the repository."""
    digest = hashlib.sha256()
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in _SUFFIXES and file.is_file():
                digest.update(str(file.relative_to(ROOT)).encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit, for the report; empty where git knows none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def bring(source: Path, out: Path) -> None:
    """Copies the files of an earlier run to a folder that has no results yet."""
    if not (out / "results.json").exists() and (source / "results.json").exists():
        shutil.copytree(source, out, dirs_exist_ok=True)


def resumed(path: Path, fresh: Document) -> Document:
    """The document at `path` if it is this machine's, else a fresh one; another is kept aside."""
    if not path.exists():
        return fresh
    try:
        found = results.read(path)
    except (OSError, ValueError) as error:
        print(f"{path} is not read ({error}); it is kept as {path.name}.old", file=sys.stderr)
        path.replace(path.with_name(path.name + ".old"))
        return fresh
    others = [key for key in _SAME if found["machine"].get(key) != fresh["machine"].get(key)]
    if others:
        print(
            f"{path} is of another machine or build ({', '.join(others)} differ); it is kept as"
            f" {path.name}.old",
            file=sys.stderr,
        )
        path.replace(path.with_name(path.name + ".old"))
        return fresh
    done = len(found["cells"]) + len(found.get("stages", {}))
    print(f"resuming: {done} results are there", flush=True)
    found["skipped"] = []
    return found
