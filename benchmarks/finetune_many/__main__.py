"""`python -m benchmarks.finetune_many`: train and serve, compare, check, write JSON and report."""

from __future__ import annotations

import argparse
import sys

import torch

from .. import minilm, results
from ..finetune import data
from ..finetune.classifier import largest_batch
from ..finetune.demonstration import Say, demonstration
from . import claims, serving
from .tasks import ROWS, mixed_batches, tasks_of
from .tenants import make_tenants, rank_of, rate_of
from .training import in_turn, largest_difference, peaks, together, train, with_dropout

STEPS = 100
DROPOUT = 0.1
DROPOUT_STEPS = 4


def _finite(differences: list[float]) -> list[float | None]:
    return [value if value < float("inf") else None for value in differences]  # JSON has none


def run(options: argparse.Namespace, document: results.Document, say: Say) -> None:
    """The whole run."""
    tasks, tokenizer = tasks_of(data.read()), minilm.tokenizer()
    batches = mixed_batches(tasks, options.steps, tokenizer)
    document["tasks"] = [
        {"name": task.name, "rank": rank_of(place), "rate": rate_of(place)}
        for place, task in enumerate(tasks)
    ]
    document["settings"] = {"steps": len(batches), "rows": ROWS}
    encoder = minilm.encoder(torch.float32)
    width, count = encoder.config.hidden_size, len(tasks)
    runs = {
        "together": (make_tenants(encoder, width, count, "ours"), together),
        "in_turn": (make_tenants(encoder, width, count, "ours"), in_turn),
        "peft": (make_tenants(encoder, width, count, "peft"), in_turn),
    }
    say(f"{count} tasks, {len(batches)} steps of {ROWS} texts of each")
    losses, times = train(runs, batches, say)
    document["losses"] = losses
    document["timing"] = {name: timing.summary() for name, timing in times.items()}
    document["differences"] = {
        name: _finite(largest_difference(losses["together"], losses[name]))
        for name in ("in_turn", "peft")
    }

    say(f"{DROPOUT_STEPS} steps with dropout, among the others and alone")
    found = with_dropout(
        lambda: make_tenants(encoder, width, count, "ours", DROPOUT), batches[:DROPOUT_STEPS]
    )
    differences = largest_difference(found["together"], found["alone"])
    document["differences"]["dropout"] = _finite(differences)

    say("serving held-out texts, mixed and one by one")
    served = runs["together"][0]
    requests = serving.requests_of(tasks, tokenizer)
    document["served"] = {}
    for dtype, tenants in (("float32", served), ("bfloat16", serving.in_bfloat16(served))):
        mixed = serving.serve_together(tenants, requests)
        single = serving.serve_one_by_one(tenants, requests)
        document["served"][dtype] = serving.compared(mixed, single, requests)

    say("peak memory")
    document["memory"] = peaks(runs, largest_batch(batches))


SUITE = demonstration(
    "finetune_many",
    "Eight adapters of one MiniLM, trained and served in one batch.",
    run,
    claims.evaluate,
    {"default": STEPS, "help": "of training"},
)

if __name__ == "__main__":
    sys.exit(SUITE.main())
