"""What a run claims. Each claim says what was found, and holds or not; none is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..finetune.claims import Check, check_of
from ..results import Document, ratio

MOST_DIFFERENCE = 1e-3  # of a task's losses, which begin at ln 2
MOST_IN_FLOAT32 = 1e-4  # of logits, by the largest logit
MOST_IN_BFLOAT16 = 5e-2
LEAST_ACCURACY = 0.65  # a guess is right half of the time


def losses_check(claim: str, differences: Sequence[float | None]) -> Check:
    """Whether the losses of each task differ by at most `MOST_DIFFERENCE`.

    Args:
        differences: the largest of each task; None: not finite.
    """
    worst = max(math.inf if each is None else each for each in differences)
    return check_of(
        f"{claim}, within {MOST_DIFFERENCE:g}",
        f"largest difference {worst:.1e} in {len(differences)} tasks",
        worst <= MOST_DIFFERENCE,
    )


def _losses(document: Document) -> list[Check]:
    claims = {
        "in_turn": "without dropout each task's losses are those of its training alone",
        "peft": "without dropout each task's losses are those of its training alone with PEFT",
        "dropout": "with dropout, given the same masks, they are, too",
    }
    checks = []
    for name, claim in claims.items():
        checks.append(losses_check(claim, document["differences"][name]))
    return checks


def _served(document: Document) -> list[Check]:
    checks = []
    for dtype, most in (("float32", MOST_IN_FLOAT32), ("bfloat16", MOST_IN_BFLOAT16)):
        served = document["served"][dtype]
        difference, same, texts = served["difference"], served["same_answers"], served["texts"]
        exact = dtype == "float32"
        what = "the same answers, and " if exact else ""
        worst = math.inf if difference is None else difference
        checks.append(
            check_of(
                f"{dtype}, mixed batches beside text by text: {what}logits within {most:g} of the "
                "largest",
                f"{same} of {texts} answers the same, {worst:.1e}",
                worst <= most and (same == texts or not exact),
            )
        )
    accuracy = document["served"]["float32"]["accuracy"]
    claim = f"accuracy of at least {LEAST_ACCURACY:.0%} on held-out texts, where a guess has 50%"
    return [*checks, check_of(claim, f"{accuracy:.1%}", accuracy >= LEAST_ACCURACY)]


def _faster(document: Document) -> list[Check]:
    checks = []
    for name, label in (("in_turn", "one task after the other"), ("peft", "PEFT's, one by one")):
        found = ratio(document, "together", name)
        shown = "too few undisturbed steps" if found is None else f"{found.median:.2f} x the time"
        holds = found is not None and found.median < 1
        checks.append(check_of(f"one step of all tasks takes less time than {label}", shown, holds))
    return checks


def evaluate(document: Document) -> list[Check]:
    """All claims in the order of the run."""
    return [*_losses(document), *_served(document), *_faster(document)]
