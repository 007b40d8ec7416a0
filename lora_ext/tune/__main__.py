"""`python -m lora_ext.tune`: time the routes of layers on this card and keep the fastest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from .. import _C
from . import trial
from .shape import Shape
from .table import Entry, TableError
from .tables import load_tables, user_folder


def _size(text: str) -> tuple[int, int]:
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdigit() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"expected IN x OUT, as in 4096x14336, but got {text!r}")
    return int(words[0]), int(words[1])


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, but got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_ext.tune", description=__doc__)
    parser.add_argument("--layer", type=_size, action="append", default=[], metavar="INxOUT")
    parser.add_argument("--rank", type=_count, nargs="+", default=[16])
    parser.add_argument("--rows", type=_count, nargs="+", default=[2048], help="batch times length")
    parser.add_argument("--adapters", choices=("half", "float32", "both"), default="both")
    parser.add_argument("--dropout", choices=("off", "on", "both"), default="both")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default=None, help="default: the current CUDA device")
    parser.add_argument("--table", type=Path, default=None, help="default: in the user's cache")
    parser.add_argument("--show", action="store_true", help="print the tables in use")
    return parser


def _chosen(name: str, both: str, true: str) -> list[bool]:
    return [False, True] if name == both else [name == true]


def line_of(entry: Entry) -> str:
    """One line of text: shape, winner, and every candidate's microseconds."""
    direction = "backward" if entry.backward else "forward"
    winner = f"{entry.route} {entry.tile}".strip()
    times = ", ".join(f"{name} {median:.1f} us" for name, (median, _, _) in entry.us.items())
    return f"{entry.shape}, {direction}: {winner} ({times})"


def _show() -> int:
    tables = load_tables()
    for table in tables:
        print(f"{table.card}, torch {table.torch}, lora_ext {table.lora_ext}:")
        print(*(f"  {line_of(entry)}" for entry in table.entries), sep="\n")
    if not tables:
        print("no tables: the planner goes by its own rule")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 where there is nothing to time, 1 if the table cannot be written, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.show:
        return _show()
    if not options.layer:
        parser.error("expected at least one --layer, as in --layer 4096x4096")
    if not _C.with_cuda:
        print("this build has no CUDA kernels; python -m lora_ext says why", file=sys.stderr)
        return 2
    if options.device is None and not torch.cuda.is_available():
        print("torch finds no CUDA device to time on", file=sys.stderr)
        return 2
    shapes = [
        Shape(rows, in_features, out_features, rank, wide, dropout)
        for (in_features, out_features), rank, rows, wide, dropout in product(
            options.layer,
            options.rank,
            options.rows,
            _chosen(options.adapters, "both", "float32"),
            _chosen(options.dropout, "both", "on"),
        )
    ]
    try:
        trial.tune(
            shapes,
            options.device,
            getattr(torch, options.dtype),
            options.table,
            measured=lambda entry: print(line_of(entry), flush=True),
        )
    except (RuntimeError, TableError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the shapes timed so far are in the table", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"the table is not written: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.table or user_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
