"""The alpha of each layer by alpha_pattern; its expressions come from an untrusted file."""

from __future__ import annotations

import time
from collections.abc import Iterable

from .errors import AdapterError, shown
from .peft_config import AdapterConfig

_SECONDS = 10.0
_MOST_CHARACTERS = 1 << 14  # which the package compiles in a fraction of a second


def find_alphas(paths: Iterable[str], config: AdapterConfig) -> dict[str, float]:
    r"""Path -> alpha: that of the first key with ``re.match(rf"(.*\.)?({key})$", path)``, as PEFT.

    The `regex` package matches, since a backtracking match in `re` cannot be ended. AdapterError if
    a key is not a valid expression or too long, or matching takes more than ten seconds.
    """
    if not config.alpha_pattern:
        return dict.fromkeys(paths, config.lora_alpha)
    import regex

    end = time.monotonic() + _SECONDS
    found: dict[str, float] = {}
    waiting = list(paths)
    for key, alpha in config.alpha_pattern.items():
        if len(key) > _MOST_CHARACTERS:
            raise AdapterError(
                f"expected expressions of at most {_MOST_CHARACTERS} characters in alpha_pattern, "
                f"but {shown(key)} has {len(key)}"
            )
        try:
            pattern = regex.compile(rf"(.*\.)?({key})$")
            hits = {path for path in waiting if pattern.match(path, timeout=_left(end))}
        except TimeoutError:
            raise AdapterError(
                f"expected alpha_pattern to be matched in {_SECONDS:.0f} s, but {shown(key)} is "
                "not; write the modules' names"
            ) from None
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"expected an expression in alpha_pattern, but got {shown(key)}: {error}"
            ) from None
        found |= dict.fromkeys(hits, alpha)
        waiting = [path for path in waiting if path not in hits]
        if not waiting:
            break
    return dict.fromkeys(waiting, config.lora_alpha) | found


def _left(end: float) -> float:
    """Seconds until `end`; a match that fails at once does not check the time itself."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
