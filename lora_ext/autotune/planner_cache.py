"""The cache files that the planner uses: the user's own, or one that ranks share."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

import lora_ext._C as _C

from ..build_info import build_id, version
from ..device import indexed, need_kernels
from .cache_file import Cache, CacheError, read_cache


def user_folder() -> Path:
    """The folder in which `lora_ext.warmup` writes its files. RuntimeError if there is no home."""
    return Path.home() / ".cache" / "lora_ext" / "autotune"


def user_file(card: str) -> Path:
    """The user's file for a card with this torch and lora_ext. RuntimeError if there is no home."""
    return user_folder() / f"{_slug(card)}{_suffix()}"


def empty_cache(card: str) -> Cache:
    """A cache for this torch, driver and build of lora_ext without entries."""
    driver = _C.cuda_driver() if _C.with_cuda else ""
    own = f"lora_ext {version()} (build {build_id()})"
    return Cache(card, f"torch {torch.__version__}, CUDA driver {driver}, {own}")


def user_cache(path: Path) -> Cache | None:
    """The cache in a file of the user's. None if there is none, or one for another torch, driver or
    build; also, with a warning, if it cannot be read."""
    try:
        found = read_cache(path)
    except FileNotFoundError:
        return None
    except (OSError, CacheError) as error:
        warnings.warn(f"lora_ext ignores the autotune cache in {path}: {error}", stacklevel=4)
        return None
    is_own = found.versions == empty_cache("").versions and user_file(found.card) == path
    return found if is_own else None


def named_cache(path: Path, card: str) -> Cache:
    """The cache in a file that the user names. CacheError if it is not a cache file, or for another
    card, torch, driver or build of lora_ext; OSError if it cannot be read."""
    found, expected = read_cache(path), empty_cache(card)
    if (found.card, found.versions) != (expected.card, expected.versions):
        raise CacheError(
            f"{path}: expected a cache for {expected.card}, {expected.versions}, but got one for"
            f" {found.card}, {found.versions}; lora_ext.warmup(..., cache=...) measures a new one"
        )
    return found


def load_cache(path: str | Path, device: torch.device | str | None = None) -> None:
    """Makes the planner use the entries of this cache file for a card, and no others.

    For layers that are not in the file it uses its prediction; so the choice depends only on the
    problem and the file, and ranks with the same file choose the same routes, until
    `lora_ext.warmup` is called.

    Args:
        path: a file from ``lora_ext.warmup(..., cache=path)``.
        device: a CUDA device of the card; default: the current one.

    Raises:
        CacheError: the file is corrupt, or not for this card, torch, driver and build; a
            ValueError.
        OSError: it cannot be read.
        RuntimeError: the build has no CUDA kernels, or torch finds no CUDA device.
    """
    need_kernels("autotune.load_cache")
    path = Path(path)
    use(named_cache(path, _C.cuda_card(indexed(device)).name), path)


def load_user_caches() -> None:
    """Makes the planner use the user's files, of all cards, since asking for the card would start
    CUDA. ``import lora_ext`` calls it."""
    try:
        paths = sorted(user_folder().glob(f"*{_suffix()}"))
    except (OSError, RuntimeError):  # there is no home, or it cannot be read
        return
    for path in paths:
        found = user_cache(path)
        if found is not None:
            use(found, path)


def use(cache: Cache, path: Path) -> None:
    """Makes the planner use only this cache, which is that of a file, for its card."""
    where = f"on this GPU, in {path}"
    _C.replace_autotune_cache(cache.card, [entry.for_planner(where) for entry in cache.entries])


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _suffix() -> str:
    return f"--torch-{_slug(torch.__version__)}--lora_ext-{_slug(version())}.json"
