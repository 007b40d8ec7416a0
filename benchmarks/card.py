"""Clocks, power and temperature of the GPU: read, never set."""

from __future__ import annotations

import subprocess
from typing import Any

_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "pstate")
_SECONDS = 10


def readings() -> dict[str, Any] | None:
    """What nvidia-smi says of the first GPU: MHz, W, degrees Celsius; None if it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return None
    values = [_number(word.strip()) for word in lines[0].split(",")]
    return dict(zip(_FIELDS, values, strict=False))


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word
