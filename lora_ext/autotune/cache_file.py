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

SCHEMA = "lora_ext.autotune"
SCHEMA_VERSION = 1
_ORIGIN = ("card", "torch", "driver", "lora_ext", "build")
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
        us: candidate -> median, lower and upper quartile, in microseconds.
    """

    shape: Shape
    backward: bool
    route: str
    tile: str
    us: Mapping[str, tuple[float, float, float]]

    def __str__(self) -> str:
        """One line of text: shape, fastest route, and every candidate's microseconds."""
        direction = "backward" if self.backward else "forward"
        times = ", ".join(f"{name} {median:.1f} us" for name, (median, _, _) in self.us.items())
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
        torch: torch.__version__, whose library routes were timed.
        driver: the CUDA version that the driver supports.
        lora_ext, build: version and compiled extension whose kernels were timed.
        entries: at most one for a shape and direction.
    """

    card: str
    torch: str
    driver: str
    lora_ext: str
    build: str
    entries: tuple[Entry, ...]

    @property
    def described(self) -> str:
        """The card and versions as text."""
        build = f"lora_ext {self.lora_ext} (build {self.build})"
        return f"{self.card}, torch {self.torch}, CUDA driver {self.driver}, {build}"

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
        return _cache(parse_json(data, _DEPTH))
    except ValueError as error:
        raise CacheError(f"{path}: {error}") from None


def write_cache(cache: Cache, path: Path) -> None:
    """Replaces the file atomically: readers, also after an interrupt, find the old or the new
    one."""
    names = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION}
    names |= {name: getattr(cache, name) for name in _ORIGIN}
    head = json.dumps(names, indent=1)[:-2]
    lines = ",\n  ".join(json.dumps(_plain(e), allow_nan=False) for e in cache.entries)
    text = f'{head},\n "entries": [\n  {lines}\n ]\n}}\n'
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


def _plain(entry: Entry) -> dict[str, Any]:
    own = asdict(entry)
    return {**own.pop("shape"), **own}


def _expect(value: Any, kind: type, what: str) -> Any:
    # bool is a subclass of int, but it is not accepted here
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise CacheError(f"expected {what} to be of {kind.__name__}, but got {value!r:.60}")
    return value


def _members(value: Any, **kinds: type) -> dict[str, Any]:
    for name, kind in kinds.items():
        if not isinstance(value, dict) or name not in value:
            raise CacheError(f"expected an object with {name!r}, but got {value!r:.60}")
        _expect(value[name], kind, repr(name))
    return {name: value[name] for name in kinds}


def _cache(document: Any) -> Cache:
    schema = tuple(_members(document, schema=str, schema_version=int).values())
    if schema != (SCHEMA, SCHEMA_VERSION):
        raise CacheError(f"expected {SCHEMA} version {SCHEMA_VERSION}, but got {schema}")
    own = _members(document, entries=list, **dict.fromkeys(_ORIGIN, str))
    own["entries"] = entries = tuple(map(_entry, own["entries"]))
    if len({entry.key for entry in entries}) < len(entries):
        raise CacheError("expected one entry for a shape and direction, but got two")
    return Cache(**own)


def _entry(value: Any) -> Entry:
    layer = dict.fromkeys(("rows", "in_features", "out_features", "rank"), int)
    layer = _members(value, **layer, float_adapters=bool, dropout=bool)
    own = _members(value, backward=bool, route=str, tile=str, us=dict)
    own["us"] = {name: _times(name, figures) for name, figures in own["us"].items()}
    try:
        entry = Entry(Shape(**layer), **own)
        entry.for_planner("")
    except ValueError as error:
        raise CacheError(str(error)) from None
    return entry


def _times(name: str, figures: Any) -> tuple[float, float, float]:
    if not (isinstance(figures, list) and len(figures) == 3):
        raise CacheError(f"expected three times of {name!r:.60}, but got {figures!r:.60}")
    median, p25, p75 = (_expect(figure, float, "a time") for figure in figures)
    return median, p25, p75
