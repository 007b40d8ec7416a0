"""Steps of all tasks in one batch, and of one task after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lora_ext

from ..finetune.classifier import Batch
from ..finetune.training import timed
from ..memory import peak_bytes
from ..timing import CpuMeter, Timing
from .tasks import ROWS, part_of
from .tenants import CLIP, Tenants, name_of

Losses = list[list[float]]  # by step, by task


def together(tenants: Tenants, batch: Batch, only: int | None = None) -> list[Tensor]:
    """Forward and backward of one batch with rows of all tasks; returns the tasks' losses [].

    only: a task that alone has its adapter and its loss, in the same batch
    """
    count = len(tenants.heads)
    owners = [name_of(place) for place in range(count) for _ in range(ROWS)]
    if only is not None:
        owners = [name if name == name_of(only) else None for name in owners]
    with lora_ext.use_adapters(tenants.model, owners):
        pooled = tenants.pooled(batch.ids, batch.mask)
    losses = []
    for place, head in enumerate(tenants.heads):
        own = slice(place * ROWS, (place + 1) * ROWS)
        losses.append(cross_entropy(head(pooled[own]), batch.labels[own]))
    wanted = losses if only is None else losses[only : only + 1]
    torch.stack(wanted).sum().backward()
    return [loss.detach() for loss in wanted]


def alone(tenants: Tenants, batch: Batch, place: int) -> Tensor:
    """Forward and backward of one task's rows with its adapter active; the loss []."""
    part = part_of(batch, place)
    tenants.activate(name_of(place))
    loss = cross_entropy(tenants.heads[place](tenants.pooled(part.ids, part.mask)), part.labels)
    loss.backward()
    return loss.detach()


def in_turn(tenants: Tenants, batch: Batch) -> list[Tensor]:
    """`alone` of each task."""
    return [alone(tenants, batch, place) for place in range(len(tenants.heads))]


def update(tenants: Tenants, places: Sequence[int]) -> None:
    """Each task's own clipping and AdamW, for those that had rows."""
    for place in places:
        torch.nn.utils.clip_grad_norm_(tenants.parameters[place], CLIP)
        tenants.optimizers[place].step()
        tenants.optimizers[place].zero_grad()


Step = Callable[[Tenants, Batch], list[Tensor]]


def train(
    runs: Mapping[str, tuple[Tenants, Step]],
    batches: Sequence[Batch],
    say: Callable[[str], None],
) -> tuple[dict[str, Losses], dict[str, Timing]]:
    """A step of each run on a batch, in a new order each time, before the next batch comes."""
    losses: dict[str, Losses] = {name: [] for name in runs}
    times = {name: Timing(1, 0.0) for name in runs}
    order, meter = random.Random(0), CpuMeter()
    for number, batch in enumerate(batches, 1):
        names = list(runs)
        order.shuffle(names)
        for name in names:
            tenants, step = runs[name]
            found = timed(times[name], meter, partial(step, tenants, batch))
            update(tenants, range(len(tenants.heads)))
            losses[name].append([loss.item() for loss in found])
        if number % max(1, len(batches) // 4) == 0:
            means = {name: sum(found[-1]) / len(found[-1]) for name, found in losses.items()}
            shown = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            say(f"step {number} of {len(batches)}: mean loss {shown}")
    return losses, times


def with_dropout(make: Callable[[], Tenants], batches: Sequence[Batch], seed: int = 0) -> dict:
    """Losses of all tasks in one batch, and of each trained alone with the same masks.

    A mask depends on a seed and on the place of a row in the batch. So a task that is trained alone
    gets the whole batch, in which only its own rows have an adapter and a loss.
    """

    def losses_of(only: int | None) -> Losses:
        tenants = make()
        places = range(len(tenants.heads)) if only is None else [only]
        found = []
        for number, batch in enumerate(batches):
            torch.manual_seed(seed + number)
            found.append([loss.item() for loss in together(tenants, batch, only)])
            update(tenants, places)
        return found

    mixed = losses_of(None)
    separate = [losses_of(place) for place in range(len(mixed[0]))]
    by_step = [[one[step][0] for one in separate] for step in range(len(batches))]
    return {"together": mixed, "alone": by_step}


def largest_difference(found: Losses, wanted: Losses) -> list[float]:
    """Of each task, over the steps; infinite where one is no number."""
    differences = [
        [abs(a - b) for a, b in zip(*pair, strict=True)] for pair in zip(found, wanted, strict=True)
    ]
    return [
        max(d if d == d else float("inf") for d in task) for task in zip(*differences, strict=True)
    ]


def peaks(runs: Mapping[str, tuple[Tenants, Step]], batch: Batch) -> dict[str, dict[str, int]]:
    """Peak bytes of the forwards and backwards of all tasks above what is live before."""
    found = {}
    for name, (tenants, step) in runs.items():

        def clear(tenants: Tenants = tenants) -> None:
            for optimizer in tenants.optimizers:
                optimizer.zero_grad()

        found[name] = {"peak": peak_bytes(partial(step, tenants, batch), prepare=clear)}
        clear()
    return found
