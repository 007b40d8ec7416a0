r"""Patterns that select modules by their dotted paths.

"q_proj", "attn.q_proj"   a name: the path, or its end at a dot, as in PEFT's lists
"*_proj", "layers.?.q"    a glob (any of * ? [): `fnmatch` on the path or on its end at a dot;
                          * crosses dots
"re:layers\.\d+\.mlp"     a regular expression of `re` for the whole path
"""

from __future__ import annotations

import fnmatch
import re
from functools import lru_cache


def matches(pattern: str, path: str) -> bool:
    """Whether the pattern selects the module at `path`. ValueError if its expression is not
    valid."""
    if is_pattern(pattern):
        return _compiled(pattern).fullmatch(path) is not None
    return is_name_of(pattern, path)


def is_pattern(pattern: str) -> bool:
    """Whether it is a glob or a regular expression, not a name."""
    return pattern.startswith("re:") or any(mark in pattern for mark in "*?[")


def is_name_of(name: str, path: str) -> bool:
    """Whether `name` is the path or its end at a dot."""
    return path == name or path.endswith(f".{name}")


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    if not pattern.startswith("re:"):
        return re.compile(rf"(?s:.*\.)?(?:{fnmatch.translate(pattern)})")
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise ValueError(
            f"lora_ext.models: expected a regular expression, but {pattern!r} has {error}; write "
            "module names, globs or a valid expression"
        ) from None
