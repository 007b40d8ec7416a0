"""Reads the values of adapter_config.json, with one method for each kind of value."""

from __future__ import annotations

import math
from typing import Any

from ..models.config import BIASES
from ..nn.adapter_spec import MAX_RANK
from .errors import AdapterError, shown

_MOST_NAMES = 1024


class Fields:
    """The fields of the object, with one method for each kind of value; null means the default."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.table = {name: value for name, value in table.items() if value is not None}

    def flag(self, name: str) -> bool:
        value = self.table.get(name, False)
        if not isinstance(value, int) or value not in (0, 1):
            raise AdapterError(f"expected {name} to be true or false, but got {shown(value)}")
        return bool(value)

    def one_of(self, name: str, values: tuple[str, ...]) -> str | None:
        value = self.table.get(name)
        if value is not None and value not in values:
            raise AdapterError(f"expected {name} to be one of {values}, but got {shown(value)}")
        return value

    def text(self, name: str) -> str | None:
        value = self.table.get(name)
        return value if isinstance(value, str) else None

    def dropout(self) -> float:
        value = self.table.get("lora_dropout", 0.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise AdapterError(f"expected lora_dropout in [0, 1), but got {shown(value)}")
        return float(value)

    def bias(self) -> str:
        return self.one_of("bias", BIASES) or "none"

    def names(self, name: str) -> tuple[str, ...]:
        value = self.table.get(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise AdapterError(f"expected {name} to be a list of names, but got {shown(value)}")
        return tuple(value)

    def few_names(self, name: str) -> tuple[str, ...]:
        names = self.names(name)
        if len(names) > _MOST_NAMES or not all(names):
            raise AdapterError(
                f"expected at most {_MOST_NAMES} names in {name}, none of them empty, but got "
                f"{len(names)}"
            )
        return names

    def names_or_expression(self, name: str) -> str | tuple[str, ...]:
        value = self.table.get(name)
        return value if isinstance(value, str) else self.names(name)

    def indices(self, name: str) -> tuple[int, ...]:
        value = self.table.get(name, [])
        value = value if isinstance(value, list) else [value]
        return tuple(index for index in value if isinstance(index, int))

    def patterns(self, name: str, check: Any) -> dict[str, Any]:
        value = self.table.get(name, {})
        if not isinstance(value, dict):
            raise AdapterError(f"expected {name} to be an object, but got {shown(value)}")
        return {key: check(f"{name}[{shown(key)}]", number) for key, number in value.items()}


def as_rank(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise AdapterError(
            f"expected {name} to be an integer of 1 to {MAX_RANK}, but got {shown(value)}"
        )
    return value


def as_alpha(name: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and math.isfinite(value):
            return value
    except (TypeError, OverflowError):  # not a number, or an integer beyond float's range
        pass
    raise AdapterError(f"expected {name} to be a finite number, but got {shown(value)}")
