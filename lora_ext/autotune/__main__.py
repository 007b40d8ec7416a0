"""`python -m lora_ext.autotune`: times the routes of layers on this card and keeps the fastest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from .cache_file import CacheError
from .planner_cache import load_cached
from .session import line_of, warmup
from .shape import Shape


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
    parser = argparse.ArgumentParser(prog="python -m lora_ext.autotune", description=__doc__)
    parser.add_argument("--layer", type=_size, action="append", default=[], metavar="INxOUT")
    parser.add_argument("--rank", type=_count, nargs="+", default=[16])
    parser.add_argument("--rows", type=_count, nargs="+", default=[2048], help="batch times length")
    parser.add_argument("--adapters", choices=("half", "float32", "both"), default="both")
    parser.add_argument("--dropout", choices=("off", "on", "both"), default="both")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default=None, help="default: the current CUDA device")
    parser.add_argument(
        "--cache", type=Path, default=None, help="default: a file in the user's folder"
    )
    parser.add_argument("--show", action="store_true", help="print the cache files in use")
    return parser


def _chosen(name: str, both: str, true: str) -> list[bool]:
    return [False, True] if name == both else [name == true]


def _show() -> int:
    caches = load_cached()
    for cache in caches:
        print(f"{cache.described}:")
        print(*(f"  {line_of(entry)}" for entry in cache.entries), sep="\n")
    if not caches:
        print("the autotune cache is empty: the planner uses its prediction")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit status 2 if there is nothing to time, 1 if --cache cannot be written, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.show:
        return _show()
    if not options.layer:
        parser.error("expected at least one --layer, as in --layer 4096x4096")
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
        found = warmup(
            shapes,
            device=options.device,
            dtype=getattr(torch, options.dtype),
            cache=options.cache,
        )
    except (RuntimeError, CacheError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the shapes timed so far are in the cache", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"the cache is not written: {error}", file=sys.stderr)
        return 1
    if not found.entries:
        print(found.note, file=sys.stderr)
        return 2
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
