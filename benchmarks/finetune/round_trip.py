"""A trained adapter saved, loaded into a new model, merged, and opened by PEFT."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_ext

from .classifier import Batch, load_classifier
from .training import predict

# Merged and unmerged add the same numbers in another order.
TOLERANCE = 1e-4  # of the largest logit's magnitude
_OTHER_SEED = 1  # the new model's head starts from other values than the trained one's did


def compared(logits: Tensor, expected: Tensor) -> dict[str, Any]:
    """How logits [texts, classes] differ from those that are expected, by the largest."""
    difference = (logits - expected).abs().max() / expected.abs().max()
    return {
        "identical": torch.equal(logits, expected),
        "same_answers": int((logits.argmax(1) == expected.argmax(1)).sum()),
        "difference": difference.item() if difference.isfinite() else None,  # JSON has no NaN
    }


def folder_bytes(folder: Path) -> dict[str, int]:
    """File name -> size."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def round_trip(
    trained: nn.Module, expected: Tensor, batches: Sequence[Batch], folder: Path
) -> dict[str, Any]:
    """Logits of the trained model's successors on the held-out texts, compared with its own.

    expected: the trained model's logits [texts, classes] on these batches
    folder: where the adapter is saved, and stays
    """
    classes = expected.shape[1]
    lora_ext.save_adapter(trained, folder)
    model = load_classifier(classes, head_seed=_OTHER_SEED)
    unadapted = predict(model, batches)
    lora_ext.load_adapter(model, folder)
    found = {"texts": len(expected), "unadapted": compared(unadapted, expected)}
    found["reloaded"] = compared(predict(model, batches), expected)
    lora_ext.merge_adapter(model)
    found["merged"] = compared(predict(model, batches), expected)
    found["peft"] = compared(_in_peft(classes, batches, folder), expected)
    found["files"] = folder_bytes(folder)
    return found


def _in_peft(classes: int, batches: Sequence[Batch], folder: Path) -> Tensor:
    from peft import PeftModel

    model = load_classifier(classes, head_seed=_OTHER_SEED)
    return predict(PeftModel.from_pretrained(model, str(folder)), batches)


def peft_files(trained: Any) -> dict[str, int]:
    """What PEFT writes for its own model: file name -> size."""
    with tempfile.TemporaryDirectory() as folder:
        trained.save_pretrained(folder)
        return folder_bytes(Path(folder))
