"""`python -m benchmarks.finetune`: train, compare, check, and write JSON, report and picture."""

from __future__ import annotations

import argparse
import sys

import torch

import lora_ext

from .. import minilm, results
from . import claims, data
from .classifier import Batch, largest_batch, load_classifier
from .demonstration import ROWS, Say, batches_to_learn, demonstration, train_all
from .round_trip import peft_files, round_trip
from .trained_models import (
    ALPHA,
    HEAD_ONLY_RATE,
    LABELS,
    LEARNING_RATE,
    RANK,
    TARGETS,
    TrainedModel,
    make_variants,
)
from .training import step_memories, train

HALF_STEPS = 16
_SLOW_HALF = 3.0  # x the float32 step; some processors emulate bfloat16


def describe_data(dataset: data.Dataset) -> dict[str, object]:
    """Counts, an example each, and what the split was checked for."""
    examples = {}
    for text in dataset.held_out:
        examples.setdefault(dataset.areas[text.label], text.sentence)
    return {
        "train": dataset.counts(dataset.train),
        "held_out": dataset.counts(dataset.held_out),
        "majority": dataset.majority(),
        "examples": examples,
        "definitions_on_both_sides": dataset.definitions_on_both_sides(),
        "largest_similarity": dataset.largest_similarity(),
    }


def describe_settings(
    variant: TrainedModel, encoder: torch.nn.Module, batches: list[Batch]
) -> dict:
    """What is trained, and how."""
    base = list(encoder.parameters())
    adapters_and_head = sum(p.numel() for p in variant.trainable.values())
    return {
        "rank": RANK,
        "alpha": ALPHA,
        "targets": TARGETS,
        "rows": ROWS,
        "steps": len(batches),
        "tokens": sum(batch.ids.numel() for batch in batches),
        "learning_rate": LEARNING_RATE,
        "head_only_rate": HEAD_ONLY_RATE,
        "trainable": adapters_and_head,
        "parameters": sum(p.numel() for p in base) + adapters_and_head,
        "encoder_bytes": sum(p.nbytes for p in base),
    }


def measure_half(classes: int, batches: list[Batch], float_ms: float) -> dict:
    """Times and memory with a bfloat16 encoder; {"skipped": why} where it is far too slow."""
    names = ["frozen", "ours_dropout", "peft_dropout"]
    base = load_classifier(classes, torch.bfloat16)
    variants = make_variants(base, names)
    trial = train({"frozen": variants["frozen"]}, batches[:3], lambda line: None)
    half_ms = trial["frozen"].passes.summary()["ms"]
    if half_ms > _SLOW_HALF * float_ms:
        return {"skipped": f"a frozen step takes {half_ms:.0f} ms, {float_ms:.0f} ms in float32"}
    curves = train(variants, batches[:HALF_STEPS], lambda line: None)
    return {
        "timing": {name: curve.passes.summary() for name, curve in curves.items()},
        "memory": step_memories(variants, largest_batch(batches)),
    }


def run(options: argparse.Namespace, document: results.Document, say: Say) -> None:
    """The whole run."""
    dataset = data.read()
    document["data"] = describe_data(dataset)
    say(
        f"{len(dataset.train)} training and {len(dataset.held_out)} held-out sentences of "
        f"{len(dataset.areas)} areas; majority class {dataset.majority():.1%}"
    )
    tokenizer = minilm.tokenizer()
    every = len(dataset.held_out)
    batches, held_out = batches_to_learn(dataset, tokenizer, options.steps, every)
    base = load_classifier(len(dataset.areas))
    variants = make_variants(base, list(LABELS))
    document["settings"] = describe_settings(variants["ours"], base.encoder, batches)
    say(str(lora_ext.models.trainable_parameters(variants["ours"].model)))
    curves, logits = train_all(document, variants, batches, held_out, say)
    document["updates"] = {name: curve.updates.summary() for name, curve in curves.items()}

    folder = options.out / "adapter"
    say(f"saving to {folder}, loading, merging; opening the folder with PEFT")
    trained, expected = variants["ours_dropout"].model, logits["ours_dropout"]
    document["round_trip"] = round_trip(trained, expected, held_out, folder)
    document["peft_files"] = peft_files(variants["peft_dropout"].model)

    say("a few steps in bfloat16")
    floor_ms = document["timing"]["frozen"]["ms"]
    document["half"] = measure_half(len(dataset.areas), batches, floor_ms)


SUITE = demonstration(
    "finetune",
    "MiniLM fine-tuned on real sentences, with lora_ext and with PEFT.",
    run,
    claims.evaluate,
    {"default": 0, "help": "stop after so many; 0: go on"},
)

if __name__ == "__main__":
    sys.exit(SUITE.main())
