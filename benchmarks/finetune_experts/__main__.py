"""`python -m benchmarks.finetune_experts`: train, compare, check, and write JSON and report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import lora_ext

from .. import minilm, results
from ..finetune import data
from ..finetune.classifier import Batch, Classifier, load_classifier
from ..finetune.demonstration import ROWS, Say, batches_to_learn, demonstration, train_all
from ..finetune.trained_models import make_variants
from ..finetune.training import largest_deviation, predict
from ..finetune_many.tasks import tasks_of
from . import claims, mixture
from .models import LABELS, adapted
from .two_tasks import TASKS, two_tasks

STEPS = 80
HELD_OUT = 240  # texts, of all lengths


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


def run(options: argparse.Namespace, document: results.Document, say: Say) -> None:
    """The whole run."""
    dataset, tokenizer = data.read(), minilm.tokenizer()
    document["data"] = {"majority": dataset.majority()}
    batches, held_out = batches_to_learn(dataset, tokenizer, options.steps, HELD_OUT)

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
    curves, _ = train_all(document, variants, batches, held_out, say)
    same = mixture.steps_with_same_routes(model, variants["peft"].model, len(batches))
    document["same_routes"] = same
    if same:
        losses = [curves[name].losses[:same] for name in ("ours", "peft")]
        document["deviation"] = largest_deviation(*losses)
    say("opening the folder with PEFT")
    document["folder"] = opened_by_peft(model, held_out, options.out / "adapter")
    tasks, encoder = tasks_of(dataset)[:TASKS], mixture.encoder()
    width = encoder.config.hidden_size
    document["two_tasks"] = two_tasks(encoder, width, tasks, len(batches), tokenizer, say)


SUITE = demonstration(
    "finetune_experts",
    "The experts of a MiniLM-sized mixture fine-tuned on real sentences.",
    run,
    claims.evaluate,
    {"default": STEPS, "help": "of training"},
)

if __name__ == "__main__":
    sys.exit(SUITE.main())
