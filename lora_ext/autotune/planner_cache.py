"""The cache files that the planner uses: a pinned one, or the user's own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lora_ext._C as _C

from ..build_info import build_id, version
from ..device import indexed, need_kernels
from .cache_file import Cache, CacheError, read_cache

# The pinned files by card; no other file is used for such a card.
pinned: dict[str, tuple[Cache, Path]] = {}


def user_folder() -> Path:
    """The folder in which `lora_ext.warmup` writes its files. RuntimeError if there is no home."""
    return Path.home() / ".cache" / "lora_ext" / "autotune"


def empty_cache(card: str) -> Cache:
    """A cache for this torch, driver and build of lora_ext without entries."""
    driver = _C.cuda_driver() if _C.with_cuda else ""
    return Cache(card, str(torch.__version__), driver, version(), build_id(), ())


def file_of(cache: Cache, folder: Path) -> Path:
    """The file in a folder for a cache's card and versions."""
    return folder / f"{_slug(cache.card)}{_suffix(cache.torch, cache.lora_ext)}"


def cache_path(folder: Path, device: torch.device | None = None) -> Path:
    """The file in a folder for a device with this torch and lora_ext.

    Args:
        folder: any folder; the user's is `user_folder()`.
        device: a CUDA device; default: the current one.
    """
    return file_of(empty_cache(_C.cuda_card(indexed(device)).name), folder)


def user_cache(card: str) -> tuple[Cache, Path]:
    """The user's cache for a card with this torch and build, which may be empty; and its file.
    RuntimeError if there is no home."""
    empty = empty_cache(card)
    path = file_of(empty, user_folder())
    found = _read(path) if path.exists() else None
    return (found if found and replace(found, entries=()) == empty else empty), path


def checked_cache(path: Path, card: str) -> Cache:
    """The cache in a file that the user names. CacheError if it is not a cache file, or for another
    card, torch, driver or build of lora_ext; OSError if it cannot be read."""
    found, expected = read_cache(path), empty_cache(card)
    if replace(found, entries=()) != expected:
        raise CacheError(
            f"{path}: expected a cache for {expected.described}, but got one for"
            f" {found.described}; lora_ext.warmup(..., cache=...) measures a new one"
        )
    return found


def pin_cache(path: str | Path | None, device: torch.device | str | None = None) -> None:
    """Pins a cache file: the planner uses only this file for this card, in this process.

    For layers that are not in the file it uses its prediction, never the user's cache; so the
    choice depends only on the problem and the file, and ranks with the same file choose the same
    routes. A pinned file is also used under ``torch.use_deterministic_algorithms``.

    Args:
        path: a file from ``lora_ext.warmup(..., cache=path)``; None: back to the cache.
        device: a CUDA device of the card; default: the current one.

    Raises:
        CacheError: the file is corrupt, or not for this card, torch, driver and build; a
            ValueError.
        OSError: it cannot be read.
        RuntimeError: the build has no CUDA kernels, or torch finds no CUDA device.
    """
    if path is None:
        for card in pinned:
            _C.replace_autotune_cache(card, [])
        pinned.clear()
        if _C.with_cuda:
            load_cached()
        return
    need_kernels("autotune.pin_cache")
    path = Path(path)
    pin(checked_cache(path, _C.cuda_card(indexed(device)).name), path)


def pin(cache: Cache, path: Path) -> None:
    """Makes the planner use only this cache for its card."""
    pinned[cache.card] = (cache, path)
    install([])


def load_cached(folder: Path | None = None, also: Cache | None = None) -> list[Cache]:
    """Reads the user's cache files and gives them to the planner.

    Called by ``import lora_ext`` in builds with CUDA kernels. A file that is corrupt, or has
    another format, is ignored with a warning; a file for another torch, driver or build without a
    warning.

    Args:
        folder: the user's files; default: `user_folder()`.
        also: a cache that takes precedence over these.

    Returns:
        The caches in use.
    """
    try:
        folder = folder or user_folder()
    except RuntimeError:
        caches = []
    else:
        caches = list(_caches_in(folder))
    if also is not None:
        caches.append(also)
    install(caches)
    return caches


def install(caches: Iterable[Cache]) -> None:
    """Passes caches to the planner; of two entries with the same key, the last is used. Cards with
    a pinned file have that instead."""
    by_card: dict[str, dict[Any, _C.AutotuneEntry]] = {}
    for cache in caches:
        where = f"on this GPU with torch {cache.torch}"
        known = {entry.key: entry.for_planner(where) for entry in cache.entries}
        by_card.setdefault(cache.card, {}).update(known)
    for card, known in by_card.items():
        _C.replace_autotune_cache(card, list(known.values()))
    for card, (cache, path) in pinned.items():
        where = f"on {card}, pinned by {path}"
        known = [entry.for_planner(where) for entry in cache.entries]
        _C.replace_autotune_cache(card, known, pinned=True)


def _caches_in(folder: Path) -> Iterator[Cache]:
    """The caches in files of this torch, driver and build."""
    try:
        paths = sorted(folder.glob(f"*{_suffix(str(torch.__version__), version())}"))
    except OSError as error:
        _ignored(folder, error)
        return
    for path in paths:
        cache = _read(path)
        if cache and file_of(cache, folder) != path:
            _ignored(path, f"it was measured on {cache.card}, torch {cache.torch}")
        elif cache and replace(cache, entries=()) == empty_cache(cache.card):
            yield cache


def _read(path: Path) -> Cache | None:
    try:
        return read_cache(path)
    except (OSError, CacheError) as error:
        return _ignored(path, error)


def _ignored(path: Path, reason: object) -> None:
    warnings.warn(f"lora_ext ignores the autotune cache in {path}: {reason}", stacklevel=5)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _suffix(torch_version: str, own_version: str) -> str:
    return f"--torch-{_slug(torch_version)}--lora_ext-{_slug(own_version)}.json"
