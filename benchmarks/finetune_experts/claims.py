"""What a run claims. Each claim says what was found, and holds or not; none is left out."""

from __future__ import annotations

from ..finetune.claims import Check, accuracy_check, check_of, loss_check
from ..results import Document, peak_ratio

MOST_DIFFERENCE = 1e-4  # of the largest logit


def evaluate(document: Document) -> list[Check]:
    """All claims in the order of the run."""
    start = document["upcycled"]
    folder, memory = document["folder"], peak_ratio(document, "ours", "peft")
    texts = folder["texts"]
    return [
        check_of(
            f"before training the mixture computes what MiniLM does, within {MOST_DIFFERENCE:g}",
            f"{start:.1e} of the largest logit",
            start <= MOST_DIFFERENCE,
        ),
        loss_check(document),
        accuracy_check(document, "ours"),
        check_of(
            "every layer of experts is computed by lora_ext's own path",
            f"{document['fused']} of {document['layers']} weights",
            document["fused"] == document["layers"],
        ),
        check_of(
            f"the folder opened by PEFT: same answers, logits within {MOST_DIFFERENCE:g}",
            f"{folder['same_answers']} of {texts} answers, {folder['difference']:.1e}",
            folder["same_answers"] == texts and folder["difference"] <= MOST_DIFFERENCE,
        ),
        check_of(
            "a step's peak memory is below PEFT's",
            "not measured" if memory is None else f"{memory:.2f} x",
            memory is not None and memory < 1,
        ),
    ]
