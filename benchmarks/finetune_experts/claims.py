"""What a run claims. Each claim says what was found, and holds or not; none is left out."""

from __future__ import annotations

from typing import Any

from ..results import Document, peak_ratio

Check = dict[str, Any]  # claim, found, holds

MOST_DEVIATION = 1e-3  # of a step's loss
MOST_DIFFERENCE = 1e-4  # of the largest logit
LEAST_GAIN = 0.10  # of accuracy above the majority class


def _check(claim: str, found: str, holds: bool) -> Check:
    return {"claim": claim, "found": found, "holds": bool(holds)}


def evaluate(document: Document) -> list[Check]:
    """All claims in the order of the run."""
    deviation, start = document["deviation"], document["upcycled"]
    majority, accuracy = document["data"]["majority"], document["accuracy"]["ours"]
    folder, memory = document["folder"], peak_ratio(document, "ours", "peft")
    texts = folder["texts"]
    return [
        _check(
            f"before training the mixture computes what MiniLM does, within {MOST_DIFFERENCE:g}",
            f"{start:.1e} of the largest logit",
            start <= MOST_DIFFERENCE,
        ),
        _check(
            f"each step's loss within {MOST_DEVIATION:g} of PEFT's, relative",
            "not finite" if deviation is None else f"largest deviation {deviation:.1e}",
            deviation is not None and deviation <= MOST_DEVIATION,
        ),
        _check(
            f"{100 * LEAST_GAIN:g} points above the majority class ({majority:.1%}) on held-out",
            f"{accuracy:.1%}",
            accuracy >= majority + LEAST_GAIN,
        ),
        _check(
            "every layer of experts is computed by lora_ext's own path",
            f"{document['fused']} of {document['layers']} weights",
            document["fused"] == document["layers"],
        ),
        _check(
            f"the folder opened by PEFT: same answers, logits within {MOST_DIFFERENCE:g}",
            f"{folder['same_answers']} of {texts} answers, {folder['difference']:.1e}",
            folder["same_answers"] == texts and folder["difference"] <= MOST_DIFFERENCE,
        ),
        _check(
            "a step's peak memory is below PEFT's",
            "not measured" if memory is None else f"{memory:.2f} x",
            memory is not None and memory < 1,
        ),
    ]
