"""Two tasks in one batch through the experts, with dropout, beside PEFT one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..finetune.classifier import largest_batch
from ..finetune.trained_models import DROPOUT
from ..finetune_many.tasks import ROWS, Task, mixed_batches
from ..finetune_many.tenants import make_tenants, rank_of, rate_of
from ..finetune_many.training import (
    Step,
    in_turn,
    largest_difference,
    peaks,
    together,
    train,
    with_dropout,
)
from .models import MODULES, PARAMETERS

TASKS = 2
STEPS = 40  # at most
PASSES = 4  # over the same texts: so the first pass and the last are compared alike
LABELS = {
    "ours_dropout": f"lora_ext, one batch, dropout {DROPOUT:g}",
    "ours": "lora_ext, one batch",
    "peft": "PEFT, one after the other",
}
_SAME_MASKS = 4  # steps of each task alone, with the masks that it has among the others


def _finite(differences: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in differences]  # JSON has none


def passes(found: dict[str, Any], name: str, place: int) -> list[float]:
    """Mean loss of one task in each pass over its texts. found: by `two_tasks`."""
    losses = [step[place] for step in found["losses"][name]]
    texts = len(losses) // found["passes"]
    return [sum(losses[i : i + texts]) / texts for i in range(0, len(losses), texts)]


def two_tasks(
    encoder: nn.Module,
    width: int,
    tasks: Sequence[Task],
    steps: int,
    tokenizer: Callable[..., Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Losses, times, peaks of LABELS, and how far losses are from those of each task alone.

    steps: of training, if there are so many
    """
    make = partial(make_tenants, encoder, width, len(tasks), targets=MODULES, stacks=PARAMETERS)
    ways: dict[str, tuple[str, float, Step]] = {
        "ours_dropout": ("ours", DROPOUT, together),
        "ours": ("ours", 0.0, together),
        "peft": ("peft", 0.0, in_turn),  # it refuses dropout on experts, and a mixed batch
    }
    runs = {name: (make(kind, dropout), step) for name, (kind, dropout, step) in ways.items()}
    batches = mixed_batches(tasks, max(1, min(steps, STEPS) // PASSES), tokenizer) * PASSES
    say(f"{len(tasks)} tasks in one batch, {len(batches)} steps of {ROWS} texts of each")
    losses, times = train(runs, batches, say)
    masked = with_dropout(partial(make, "ours", DROPOUT), batches[:_SAME_MASKS])
    return {
        "steps": len(batches),
        "passes": PASSES,
        "rows": ROWS,
        "tasks": [
            {"name": task.name, "rank": rank_of(place), "rate": rate_of(place)}
            for place, task in enumerate(tasks)
        ],
        "losses": losses,
        "timing": {name: timing.summary() for name, timing in times.items()},
        "differences": {
            "peft": _finite(largest_difference(losses["ours"], losses["peft"])),
            "dropout": _finite(largest_difference(masked["together"], masked["alone"])),
        },
        "memory": peaks(runs, largest_batch(batches)),
    }
