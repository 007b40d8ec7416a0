"""Strict JSON, of adapters' configs and cache files: no duplicate keys, limited nesting."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def parse_json(data: bytes, max_depth: int) -> Any:
    """The value of UTF-8 encoded JSON, of which the caller bounds the length; NaN and Infinity are
    floats, as in Python's json module. ValueError if it is not UTF-8 or JSON, has a key twice in
    an object or a number that is too long, or is too deep; the message ends a sentence that begins
    with the file's name."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object_of_unique_keys)
        _check_depth(value, max_depth)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, but got {error}") from None
    except RecursionError:
        raise ValueError(f"expected at most {max_depth} levels of nesting, but got more") from None
    except KeyError as error:
        raise ValueError(f"expected each key once, but got {error.args[0]!r:.80} twice") from None
    except ValueError as error:
        raise ValueError(f"expected JSON, but got {error}") from None
    return value


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise KeyError(next(key for key, count in counts.items() if count > 1))
    return table


def _check_depth(value: Any, left: int) -> None:
    if not isinstance(value, (dict, list)):
        return
    if not left:
        raise RecursionError
    for child in value.values() if isinstance(value, dict) else value:
        _check_depth(child, left - 1)
