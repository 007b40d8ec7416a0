"""`python -m benchmarks.gpu.mixtures`: mixtures of experts on the card, how fast.

Forwards and steps of one layer over the frozen model's, which has transformers' grouped products:
PEFT's as they are and accelerated. What is right about them, tests say.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

import torch

from ..timing import Function
from ..whole_models.experts import (
    MIXTURES,
    VARIANTS,
    Mixture,
    adapted,
    base_model,
    forward_of,
    step_of,
)
from .command_line import conclude, device_of, medians_ms

_NEEDED = ("transformers", "peft")
_TIMED = {"cuda": MIXTURES[1:], "cpu": (Mixture("a small layer", 4, 256, 64, 1, slots=2),)}
_TOKENS = {"cuda": (1, 4096), "cpu": (1, 16)}


def works_of(mixture: Mixture, device: str) -> dict[str, dict[str, Function]]:
    """What is timed of a mixture: by work, by variant."""
    base = base_model(mixture, device)
    models = {variant: adapted(base, variant).to(device) for variant in VARIANTS}
    works: dict[str, dict[str, Function]] = {}
    for tokens in _TOKENS[device]:
        works[f"forward of {tokens}"] = {n: forward_of(m, tokens) for n, m in models.items()}
    steps = {name: step_of(model, _TOKENS[device][-1]) for name, model in models.items()}
    return works | {f"step of {_TOKENS[device][-1]}": steps}


def timed(device: str) -> str:
    """Prints medians over the frozen model's, and returns the last line."""
    said = ""
    for mixture in _TIMED[device]:
        for work, calls in works_of(mixture, device).items():
            for call in calls.values():
                call()
            times = medians_ms(calls, device, 3)
            frozen = times.pop("frozen")
            cells = [f"{name} {ms / frozen:.2f}" for name, ms in times.items()]
            said = f"{mixture.name}, {work}: frozen {frozen:.2f} ms, {', '.join(cells)}"
            print(said, flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: where packages are missing, that is said and nothing is timed."""
    device = device_of("mixtures", __doc__, arguments)
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return conclude([], f"{' and '.join(absent)} missing: nothing is timed")
    return conclude([], timed(device))


if __name__ == "__main__":
    sys.exit(main())
