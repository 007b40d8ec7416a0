"""Eight tasks on real sentences: is it this area of the standard library that one describes?

The sentences and their split are those of `benchmarks.finetune.data`. A task's texts are as many of
its own area as of the others together, so that a guess is right half of the time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..finetune.classifier import Batch, batch_of, training_order
from ..finetune.data import Dataset, Text

TASKS = 8
ROWS = 4  # texts of each task in a step


@dataclass(frozen=True)
class Task:
    """One area against the others; labels are 1 for the area and 0 for others."""

    name: str
    train: tuple[Text, ...]
    held_out: tuple[Text, ...]


def tasks_of(dataset: Dataset, seed: int = 0) -> list[Task]:
    """A task for each of the first areas."""
    tasks = []
    for label, area in enumerate(dataset.areas[:TASKS]):
        draw = random.Random(1000 * seed + label)
        parts = [_balanced(texts, label, draw) for texts in (dataset.train, dataset.held_out)]
        tasks.append(Task(area, *parts))
    return tasks


def _balanced(texts: Sequence[Text], label: int, draw: random.Random) -> tuple[Text, ...]:
    own = [text for text in texts if text.label == label]
    others = [text for text in texts if text.label != label]
    chosen = own + draw.sample(others, len(own))
    draw.shuffle(chosen)
    return tuple(Text(t.sentence, int(t.label == label), t.origin) for t in chosen)


def mixed_batches(
    tasks: Sequence[Task], steps: int, tokenizer: Callable[..., dict[str, Tensor]]
) -> list[Batch]:
    """Training batches of `ROWS` texts of each task, in the order of the tasks: ``[8 ROWS, ...]``.

    Texts of a batch are of similar length, in all tasks.
    """
    orders = []
    for task in tasks:
        lengths = [len(tokenizer(text.sentence)["input_ids"]) for text in task.train]
        order = training_order(lengths, ROWS, 0)[: steps * ROWS]
        if len(order) < steps * ROWS:
            raise ValueError(
                f"benchmarks.finetune_many: expected at most {len(order) // ROWS} steps, for which "
                f"{task.name!r} has texts, but got {steps}"
            )
        groups = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
        groups.sort(key=lambda group, lengths=lengths: max(lengths[i] for i in group))
        orders.append([[task.train[i] for i in group] for group in groups])
    batches = [
        batch_of([text for texts in parts for text in texts], tokenizer)
        for parts in zip(*orders, strict=True)
    ]
    random.Random(1).shuffle(batches)
    return batches


def part_of(batch: Batch, place: int, rows: int = ROWS) -> Batch:
    """The rows of one task, without padding that only others need."""
    own = slice(place * rows, (place + 1) * rows)
    mask = batch.mask[own]
    tokens = int(mask.sum(1).max())
    return Batch(batch.ids[own, :tokens], mask[:, :tokens], batch.labels[own])
