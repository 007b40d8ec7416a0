"""Which tables the planner goes by: those of the package, and on top of them the user's own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import _C
from ..build_info import version
from ..device import indexed
from .table import Entry, Table, TableError, read_table

PACKAGED = Path(__file__).with_name("measured")


def user_folder() -> Path:
    """Where `python -m lora_ext.tune` keeps its tables.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path.home() / ".cache" / "lora_ext" / "tuning"


def empty_table(card: str) -> Table:
    """A table of this torch and this version of lora_ext without entries."""
    return Table(card, str(torch.__version__), version(), ())


def file_of(table: Table, folder: Path) -> Path:
    """The one file in a folder for a table's card and versions."""
    return folder / f"{_slug(table.card)}{_suffix(table.torch, table.lora_ext)}"


def table_path(folder: Path, device: torch.device | None = None) -> Path:
    """The file in a folder for a device with this torch and lora_ext.

    Args:
        folder: any; the user's is `user_folder()`.
        device: a CUDA device; default: the current one.
    """
    return file_of(empty_table(_C.cuda_card(indexed(device)).name), folder)


def table_at(path: Path, card: str) -> Table:
    """The table in a file, if it is the card's for this torch and lora_ext; else an empty one."""
    empty = empty_table(card)
    try:
        found = read_table(path)
    except FileNotFoundError:
        return empty
    except (OSError, TableError) as error:
        _ignored(path, error)
        return empty
    if found == empty.with_entries(found.entries):
        return found
    _ignored(path, f"it is of {found.card}, torch {found.torch}, lora_ext {found.lora_ext}")
    return empty


def load_tables(folder: Path | None = None) -> list[Table]:
    """Reads the package's and the user's tables and gives them to the planner.

    Called by ``import lora_ext`` in builds with CUDA kernels. A file that is corrupt, or of another
    format, is ignored with a warning; one for another torch or another version of lora_ext without.

    Args:
        folder: the user's tables; default: `user_folder()`.

    Returns:
        The tables in use, the package's first.
    """
    packaged = list(_tables_of(PACKAGED, f"*--lora_ext-{_slug(version())}.json"))
    try:
        folder = folder or user_folder()
    except RuntimeError:
        own = []
    else:
        own = list(_tables_of(folder, f"*{_suffix(str(torch.__version__), version())}"))
    install([*packaged, *own])
    return [*packaged, *own]


def install(tables: list[Table]) -> None:
    """Gives tables to the planner; of two entries for the same, the last counts."""
    by_card: dict[str, dict[object, tuple[Entry, str]]] = {}
    for table in tables:
        where = f"on {table.card} with torch {table.torch}"
        entries = by_card.setdefault(table.card, {})
        entries.update({entry.key: (entry, where) for entry in table.entries})
    for card, entries in by_card.items():
        _C.replace_winners(card, [entry.winner(where) for entry, where in entries.values()])


def _tables_of(folder: Path, pattern: str) -> Iterator[Table]:
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
        if file_of(table, folder) == path:
            yield table
        else:
            _ignored(path, f"it says it is of {table.card}, torch {table.torch}")


def _ignored(path: Path, reason: object) -> None:
    warnings.warn(f"lora_ext ignores the tuning in {path}: {reason}", stacklevel=4)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _suffix(torch_version: str, own_version: str) -> str:
    return f"--torch-{_slug(torch_version)}--lora_ext-{_slug(own_version)}.json"
