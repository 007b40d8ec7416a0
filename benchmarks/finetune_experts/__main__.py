"""`python -m benchmarks.finetune_experts`: train, compare, check, and write JSON and report."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import lora_ext

from .. import minilm, report, results
from ..finetune import data
from ..finetune.__main__ import PREDICTED_TOGETHER, ROWS, Say, progress
from ..finetune.classifier import Batch, Classifier, batches_of, load_classifier, training_order
from ..finetune.trained_models import SEED, make_variants
from ..finetune.training import accuracy, largest_deviation, predict, step_memories, train
from ..machine import describe
from . import claims, mixture
from .models import LABELS, adapted

STEPS = 80
HELD_OUT = 240  # texts, of all lengths


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune_experts",
        description="The experts of a MiniLM-sized mixture fine-tuned on real sentences.",
    )
    out = Path("benchmarks/out/finetune_experts")
    parser.add_argument("--out", type=Path, default=out, help="folder")
    parser.add_argument("--machine", default="", help="what to call this machine in the report")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    return parser.parse_args(arguments)


def load_mixture(classes: int) -> Classifier:
    """The upcycled MiniLM with a new head."""
    encoder = mixture.encoder()
    torch.manual_seed(0)
    return Classifier(encoder, encoder.config.hidden_size, classes)


def _difference(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def opened_by_peft(trained: torch.nn.Module, batches: list[Batch], folder: Path) -> dict:
    """The trained adapter saved, and what PEFT predicts with it."""
    from peft import PeftModel

    lora_ext.save_adapter(trained, folder)
    expected = predict(trained, batches)
    model = PeftModel.from_pretrained(load_mixture(expected.shape[1]), str(folder))
    logits = predict(model, batches)
    return {
        "texts": len(expected),
        "same_answers": int((logits.argmax(1) == expected.argmax(1)).sum()),
        "difference": _difference(logits, expected),
    }


def run(options: argparse.Namespace, say: Say) -> results.Document:
    """The whole run."""
    started = time.monotonic()
    document = results.new_document("finetune_experts", describe("cpu", options.machine))
    dataset, tokenizer = data.read(), minilm.tokenizer()
    document["data"] = {"majority": dataset.majority()}
    lengths = [len(tokenizer(text.sentence)["input_ids"]) for text in dataset.train]
    order = training_order(lengths, ROWS, SEED)[: options.steps * ROWS]
    batches = batches_of([dataset.train[i] for i in order], ROWS, tokenizer)
    by_length = sorted(dataset.held_out, key=lambda text: len(text.sentence))
    by_length = by_length[:: max(1, len(by_length) // HELD_OUT)]
    held_out = batches_of(by_length, PREDICTED_TOGETHER, tokenizer)

    classes = len(dataset.areas)
    base = load_mixture(classes)
    dense = predict(load_classifier(classes), held_out[:1])
    document["upcycled"] = _difference(predict(base, held_out[:1]), dense)
    variants = make_variants(base, list(LABELS), adapted)
    model = variants["ours"].model
    say(str(lora_ext.models.trainable_parameters(model)))
    layers = [each for each in lora_ext.explain(model) if "experts" in each.name]
    document["layers"] = len(layers)
    document["fused"] = sum(each.path == "fused" for each in layers)
    document["settings"] = {
        "steps": len(batches),
        "rows": ROWS,
        "trainable": sum(p.numel() for p in variants["ours"].trainable.values()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    say(f"{len(batches)} steps of {ROWS} sentences, {len(variants)} models in turns")
    curves = train(variants, batches, say)
    document["losses"] = {name: curve.losses for name, curve in curves.items()}
    document["timing"] = {name: curve.passes.summary() for name, curve in curves.items()}
    deviation = largest_deviation(curves["ours"].losses, curves["peft"].losses)
    document["deviation"] = deviation if math.isfinite(deviation) else None

    say("predicting the held-out sentences; opening the folder with PEFT")
    document["accuracy"] = {
        name: accuracy(predict(variant.model, held_out), held_out)
        for name, variant in variants.items()
    }
    document["folder"] = opened_by_peft(model, held_out, options.out / "adapter")
    say("peak memory")
    largest = max(batches, key=lambda batch: batch.ids.numel())
    document["memory"] = step_memories(variants, largest)
    document["checks"] = claims.evaluate(document)
    document["complete"] = True
    document["seconds"] = time.monotonic() - started
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a claim does not hold, else 0."""
    options = parse(arguments)
    document = run(options, progress())
    kept = report.publish(document, options.out / "results.json")
    return 0 if kept and all(check["holds"] for check in document["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
