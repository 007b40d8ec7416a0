"""The error for adapter files, and how its messages show values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WAY_OUT = (
    "; if PEFT takes it, lora_ext.accelerate(peft.PeftModel.from_pretrained(model, folder)) runs it"
)


class AdapterError(ValueError):
    """An adapter folder cannot be read or written; the model and the folder are unchanged."""


@contextmanager
def telling(start: str = "", end: str = "") -> Iterator[None]:
    """Makes a ValueError an AdapterError, with a text before its message, and one after it unless
    it has a way out of its own."""
    try:
        yield
    except ValueError as error:
        raise AdapterError(f"{start}{error}{'' if 'PeftModel' in str(error) else end}") from None


def shown(value: Any, limit: int = 80) -> str:
    """``repr(value)``, cut at `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def some(names: Any, limit: int = 4) -> str:
    """The first few names and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name, 160) for name in names[:limit]) + more
