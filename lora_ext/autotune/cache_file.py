"""A file of the autotune cache: JSON for one card, torch, driver and build of lora_ext."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lora_ext._C as _C

from ..strict_json import parse_json
from .shape import Shape

SCHEMA = "lora_ext.autotune 2"
_MOST_BYTES = 16 << 20
_DEPTH = 6


class CacheError(ValueError):
    """A file is not a cache file of this format; the message states what was expected and found."""


@dataclass(frozen=True)
class Entry:
    """The fastest route for one shape.

    Attributes:
        shape: the layer and its number of rows.
        backward: whether it is for backward; else for forward.
        route: "library", "hybrid" or "kernel".
        tile: with "kernel" the tile, as in "128 x 128"; else "".
        us: candidate -> median in microseconds.
    """

    shape: Shape
    backward: bool
    route: str
    tile: str
    us: Mapping[str, float]

    def __str__(self) -> str:
        """One line of text: shape, fastest route, and every candidate's microseconds."""
        direction = "backward" if self.backward else "forward"
        times = ", ".join(f"{name} {us:.1f} us" for name, us in self.us.items())
        return f"{self.shape}, {direction}: {self.name} ({times})"

    @property
    def name(self) -> str:
        """Route and tile, as a candidate is named in `us`."""
        return f"{self.route} {self.tile}".strip()

    @property
    def key(self) -> tuple[Shape, bool]:
        """The shape and direction for which it is valid."""
        return (self.shape, self.backward)

    def for_planner(self, measured: str) -> _C.AutotuneEntry:
        """The entry in the planner's form; measured: the end of the text "fastest as measured"."""
        own = {"backward": self.backward, "route": self.route, "tile": self.tile}
        return _C.AutotuneEntry(**vars(self.shape), **own, measured=measured)


@dataclass(frozen=True)
class Cache:
    """The entries of a file, and the versions for which they are valid.

    Attributes:
        card: the driver's name of the GPU.
        versions: torch, whose library routes were timed, the CUDA version that the driver supports,
            lora_ext and its build, as text.
        entries: at most one for a shape and direction.
    """

    card: str
    versions: str
    entries: tuple[Entry, ...] = ()

    def with_entries(self, entries: Iterable[Entry]) -> Cache:
        """The cache with entries added; one for the same shape and direction is replaced."""
        merged = {entry.key: entry for entry in (*self.entries, *entries)}
        return replace(self, entries=tuple(merged.values()))


def read_cache(path: Path) -> Cache:
    """The entries in a file. CacheError if it is none, OSError if it cannot be read."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise CacheError(f"{path}: expected at most {_MOST_BYTES} bytes, but got more")
    try:
        document = parse_json(data, _DEPTH)
        match document:
            case {"schema": own, "card": str(card), "versions": str(versions), "entries": [*each]}:
                if own == SCHEMA:
                    return Cache(card, versions).with_entries(map(_entry, each))
        raise ValueError(f"expected an object of schema {SCHEMA!r}, but got {document!r:.80}")
    except ValueError as error:
        raise CacheError(f"{path}: {error}") from None


def _entry(value: Any) -> Entry:
    try:
        own = dict(value)
        us = {name: float(time) for name, time in own.pop("us").items()}
        entry = Entry(Shape(**own.pop("shape")), us=us, **own)
        entry.for_planner("")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"expected an entry, but got {value!r:.80}: {error!s:.200}") from None
    return entry


def write_cache(cache: Cache, path: Path) -> None:
    """Replaces the file atomically: readers, also after an interrupt, find the old or the new
    one."""
    head = json.dumps({"schema": SCHEMA, "card": cache.card, "versions": cache.versions}, indent=1)
    lines = ",\n  ".join(json.dumps(asdict(entry), allow_nan=False) for entry in cache.entries)
    text = f'{head[:-2]},\n "entries": [\n  {lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
