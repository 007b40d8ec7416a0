"""What the demonstrations share: their command, their batches of text, how a run of one ends."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..results import Document
from ..suite import Suite
from .classifier import Batch, batches_of, largest_batch, training_order
from .data import Dataset
from .trained_models import SEED, TrainedModel
from .training import Curve, accuracy, largest_deviation, predict, step_memories, train

ROWS = 16  # texts in a step
PREDICTED_TOGETHER = 48  # held-out texts

Say = Callable[[str], None]


def demonstration(
    name: str,
    about: str,
    run: Callable[[argparse.Namespace, Document, Say], None],
    evaluate: Callable[[Document], list[Any]],
    steps: dict[str, Any],
) -> Suite:
    """A suite that trains models, and ends with claims that have to hold.

    Args:
        name: of its package and of its kind of document.
        run: fills a document but for its claims, which `evaluate` makes of it.
        steps: of the option ``--steps``.
    """

    def measure(options: argparse.Namespace, document: Document, path: Path) -> None:
        start = time.monotonic()

        def say(line: str) -> None:
            print(f"[{time.monotonic() - start:5.1f} s] {line}", flush=True)

        run(options, document, say)
        document["checks"] = evaluate(document)
        document["seconds"] = time.monotonic() - start

    options = {"--steps": {"type": int, **steps}}
    return Suite(f"benchmarks.{name}", about, name, measure, options)


def batches_to_learn(
    dataset: Dataset, tokenizer: Callable[..., Any], steps: int, held_out: int
) -> tuple[list[Batch], list[Batch]]:
    """(ROWS training texts a step, of similar length; about so many held-out ones, by length).

    Args:
        steps: 0 for as many as there are texts for.
    """
    lengths = [len(tokenizer(text.sentence)["input_ids"]) for text in dataset.train]
    order = training_order(lengths, ROWS, SEED)[: steps * ROWS or None]
    others = sorted(dataset.held_out, key=lambda text: len(text.sentence))
    others = others[:: max(1, len(others) // held_out)]
    first = batches_of([dataset.train[i] for i in order], ROWS, tokenizer)
    return first, batches_of(others, PREDICTED_TOGETHER, tokenizer)


def train_all(
    document: Document,
    variants: Mapping[str, TrainedModel],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    say: Say,
) -> tuple[dict[str, Curve], dict[str, Tensor]]:
    """`train`, `predict` and `step_memories`, returns curves and logits of the held-out texts.

    Losses, times, the deviation from PEFT's losses, accuracies and peaks go into the document.
    """
    say(f"{len(batches)} steps of {ROWS} sentences, {len(variants)} models in turns")
    curves = train(variants, batches, say)
    document["losses"] = {name: curve.losses for name, curve in curves.items()}
    document["timing"] = {name: curve.passes.summary() for name, curve in curves.items()}
    deviation = largest_deviation(curves["ours"].losses, curves["peft"].losses)
    document["deviation"] = deviation if math.isfinite(deviation) else None
    say("predicting the held-out sentences")
    logits = {name: predict(variant.model, held_out) for name, variant in variants.items()}
    document["accuracy"] = {name: accuracy(found, held_out) for name, found in logits.items()}
    say("peak memory")
    document["memory"] = step_memories(variants, largest_batch(batches))
    return curves, logits
