"""`python -m benchmarks.finetune`: train, compare, check, and write JSON, report and picture."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import lora_ext

from .. import minilm, report, results
from ..machine import describe
from . import claims, data
from .classifier import Batch, batches_of, load_classifier, training_order
from .round_trip import peft_files, round_trip
from .trained_models import (
    ALPHA,
    HEAD_ONLY_RATE,
    LABELS,
    LEARNING_RATE,
    RANK,
    SEED,
    TARGETS,
    TrainedModel,
    make_variants,
)
from .training import accuracy, largest_deviation, predict, step_memories, train

ROWS = 16  # texts in a step
PREDICTED_TOGETHER = 48  # held-out texts
HALF_STEPS = 16
_SLOW_HALF = 3.0  # x the float32 step; some processors emulate bfloat16

Say = Callable[[str], None]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description="MiniLM fine-tuned on real sentences, with lora_ext and with PEFT.",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/finetune"), help="folder")
    parser.add_argument("--machine", default="", help="what to call this machine in the report")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many; 0: go on")
    return parser.parse_args(arguments)


def progress() -> Say:
    """Prints lines with the seconds since the start."""
    start = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - start:5.1f} s] {line}", flush=True)


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
    largest = max(batches, key=lambda batch: batch.ids.numel())
    return {
        "timing": {name: curve.passes.summary() for name, curve in curves.items()},
        "memory": step_memories(variants, largest),
    }


def run(options: argparse.Namespace, say: Say) -> results.Document:
    """The whole run."""
    started = time.monotonic()
    document = results.new_document("finetune", describe("cpu", options.machine))
    dataset = data.read()
    document["data"] = describe_data(dataset)
    say(
        f"{len(dataset.train)} training and {len(dataset.held_out)} held-out sentences of "
        f"{len(dataset.areas)} areas; majority class {dataset.majority():.1%}"
    )
    tokenizer = minilm.tokenizer()
    lengths = [len(tokenizer(text.sentence)["input_ids"]) for text in dataset.train]
    order = training_order(lengths, ROWS, SEED)
    batches = batches_of([dataset.train[i] for i in order], ROWS, tokenizer)
    batches = batches[: options.steps or len(batches)]
    by_length = sorted(dataset.held_out, key=lambda text: len(text.sentence))
    held_out = batches_of(by_length, PREDICTED_TOGETHER, tokenizer)
    base = load_classifier(len(dataset.areas))
    variants = make_variants(base, list(LABELS))
    document["settings"] = describe_settings(variants["ours"], base.encoder, batches)
    say(str(lora_ext.models.trainable_parameters(variants["ours"].model)))
    say(f"MiniLM loaded; {len(batches)} steps of {ROWS} sentences, {len(variants)} models in turns")

    curves = train(variants, batches, say)
    document["losses"] = {name: curve.losses for name, curve in curves.items()}
    document["timing"] = {name: curve.passes.summary() for name, curve in curves.items()}
    document["updates"] = {name: curve.updates.summary() for name, curve in curves.items()}
    deviation = largest_deviation(curves["ours"].losses, curves["peft"].losses)
    document["deviation"] = deviation if math.isfinite(deviation) else None

    say("predicting the held-out sentences")
    logits = {name: predict(variant.model, held_out) for name, variant in variants.items()}
    document["accuracy"] = {name: accuracy(found, held_out) for name, found in logits.items()}
    say("saving, loading, merging; opening the folder with PEFT")
    trained, expected = variants["ours_dropout"].model, logits["ours_dropout"]
    document["round_trip"] = round_trip(trained, expected, held_out, options.out / "adapter")
    document["peft_files"] = peft_files(variants["peft_dropout"].model)

    say("peak memory")
    largest = max(batches, key=lambda batch: batch.ids.numel())
    document["memory"] = step_memories(variants, largest)
    say("a few steps in bfloat16")
    floor_ms = document["timing"]["frozen"]["ms"]
    document["half"] = measure_half(len(dataset.areas), batches, floor_ms)
    document["checks"] = claims.evaluate(document)
    document["complete"] = True
    document["seconds"] = time.monotonic() - started
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a claim does not hold, else 0."""
    options = parse(arguments)
    document = run(options, progress())
    kept = report.publish(document, options.out / "results.json")
    print(f"the adapter: {options.out / 'adapter'}")
    failed = [check for check in document["checks"] if not check["holds"]]
    for check in failed:
        print(f"DOES NOT HOLD: {check['claim']}: {check['found']}", file=sys.stderr)
    return 1 if failed or not kept else 0


if __name__ == "__main__":
    sys.exit(main())
