"""Which tables the planner uses: a pinned file, or the package's tables and then the user's own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from .. import _C
from ..build_info import build_id, version
from ..device import indexed
from .table import Entry, Table, TableError, read_table

PACKAGED = Path(__file__).with_name("measured")

# The pinned tables by card; no other table is used for such a card.
_pinned: dict[str, tuple[Table, Path]] = {}


def user_folder() -> Path:
    """The folder in which `lora_ext.warmup` stores its tables.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path.home() / ".cache" / "lora_ext" / "winners"


def empty_table(card: str) -> Table:
    """A table of this torch, driver and build of lora_ext without entries."""
    driver = _C.cuda_driver() if _C.with_cuda else ""
    return Table(card, str(torch.__version__), driver, version(), build_id(), ())


def file_of(table: Table, folder: Path) -> Path:
    """The file in a folder for a table's card and versions."""
    return folder / f"{_slug(table.card)}{_suffix(table.torch, table.lora_ext)}"


def table_path(folder: Path, device: torch.device | None = None) -> Path:
    """The file in a folder for a device with this torch and lora_ext.

    Args:
        folder: any folder; the user's is `user_folder()`.
        device: a CUDA device; default: the current one.
    """
    return file_of(empty_table(_C.cuda_card(indexed(device)).name), folder)


def cache_file(card: str) -> Path:
    """The file of the user's cache for a card.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return file_of(empty_table(card), user_folder())


def cached_table(path: Path, card: str) -> Table:
    """The table in a file of the cache, if it is for this card and build; else an empty one."""
    empty = empty_table(card)
    try:
        found = read_table(path)
    except FileNotFoundError:
        return empty
    except (OSError, TableError) as error:
        _ignored(path, error)
        return empty
    return found if found.origin == empty.origin else empty


def given_table(path: Path, card: str) -> Table:
    """The table in a file that the user names.

    Raises:
        TableError: it is not a table, or not for this card, torch, driver and build of lora_ext.
        OSError: it cannot be read.
    """
    found, expected = read_table(path), empty_table(card)
    if found.origin != expected.origin:
        raise TableError(
            f"{path}: expected winners of {expected.described}, but got those of"
            f" {found.described}; lora_ext.warmup(..., winners=...) measures them into a new file"
        )
    return found


def load_winners(path: str | Path | None, device: torch.device | str | None = None) -> None:
    """Pins a file of winners: the planner uses only this file for this card, in this process.

    For layers that are not in the file it uses its prediction, never the user's cache; so the
    choice depends only on the problem and the file, and ranks with the same file choose the same
    routes. A pinned file is also used under ``torch.use_deterministic_algorithms``.

    Args:
        path: a file from ``lora_ext.warmup(..., winners=path)``; None: back to the cache.
        device: a CUDA device of the card; default: the current one.

    Raises:
        TableError: the file is corrupt, or not for this card, torch, driver and build; a
            ValueError.
        OSError: it cannot be read.
        RuntimeError: the build has no CUDA kernels, or torch finds no CUDA device.
    """
    if path is None:
        for card in _pinned:
            _C.replace_winners(card, [])
        _pinned.clear()
        if _C.with_cuda:
            load_cached()
        return
    if not _C.with_cuda:
        raise RuntimeError(
            "lora_ext.winners.load_winners: this build has no CUDA kernels to choose from;"
            " lora_ext.build_info() says why"
        )
    path = Path(path)
    pin(given_table(path, _C.cuda_card(indexed(device)).name), path)


def pin(table: Table, path: Path) -> None:
    """Makes the planner use only this table for its card."""
    _pinned[table.card] = (table, path)
    install([])


def pinned_at(card: str) -> Path | None:
    """The file that is pinned for a card."""
    return _pinned[card][1] if card in _pinned else None


def load_cached(folder: Path | None = None, also: Table | None = None) -> list[Table]:
    """Reads the package's and the user's tables and gives them to the planner.

    Called by ``import lora_ext`` in builds with CUDA kernels. A file that is corrupt, or has
    another format, is ignored with a warning; a file for another torch, driver or build without a
    warning.

    Args:
        folder: the user's tables; default: `user_folder()`.
        also: a table that takes precedence over these.

    Returns:
        The tables in use, the package's first.
    """
    packaged = list(_tables_of(PACKAGED, f"*--lora_ext-{_slug(version())}.json", lambda _: True))
    try:
        folder = folder or user_folder()
    except RuntimeError:
        own = []
    else:
        suffix = _suffix(str(torch.__version__), version())
        own = list(_tables_of(folder, f"*{suffix}", _is_of_this_build))
    if also is not None:
        own.append(also)
    install(packaged, own)
    return [*packaged, *own]


def install(packaged: list[Table], own: list[Table] | None = None) -> None:
    """Passes tables to the planner; of two entries with the same key, the last is used.

    Args:
        packaged: measured on other cards of the same name.
        own: measured on this machine.
    """
    by_card: dict[str, dict[object, tuple[Entry, str]]] = {}
    for table, where in (
        *((table, f"on another {table.card} with torch {table.torch}") for table in packaged),
        *((table, f"on this card with torch {table.torch}") for table in own or []),
    ):
        entries = by_card.setdefault(table.card, {})
        entries.update({entry.key: (entry, where) for entry in table.entries})
    for card, entries in by_card.items():
        winners = [entry.winner(where) for entry, where in entries.values()]
        _C.replace_winners(card, winners)
    for card, (table, path) in _pinned.items():
        winners = [entry.winner(f"on {card}, pinned by {path}") for entry in table.entries]
        _C.replace_winners(card, winners, pinned=True)


def _is_of_this_build(table: Table) -> bool:
    return replace(table, entries=()) == empty_table(table.card)


def _tables_of(folder: Path, pattern: str, counts: Callable[[Table], bool]) -> Iterator[Table]:
    try:
        paths = sorted(folder.glob(pattern))
    except OSError as error:
        _ignored(folder, error)
        return
    for path in paths:
        try:
            table = read_table(path)
        except (OSError, TableError) as error:
            _ignored(path, error)
            continue
        if file_of(table, folder) != path:
            _ignored(path, f"it says it is of {table.card}, torch {table.torch}")
        elif counts(table):
            yield table


def _ignored(path: Path, reason: object) -> None:
    warnings.warn(f"lora_ext ignores the winners in {path}: {reason}", stacklevel=4)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _suffix(torch_version: str, own_version: str) -> str:
    return f"--torch-{_slug(torch_version)}--lora_ext-{_slug(own_version)}.json"
