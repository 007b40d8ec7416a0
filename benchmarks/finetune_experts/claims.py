"""What a run claims. Each claim says what was found, and holds or not; none is left out."""

from __future__ import annotations

from ..finetune.claims import MOST_DEVIATION, Check, accuracy_check, check_of
from ..finetune_many.claims import losses_check
from ..results import Document, peak_ratio, ratio
from .two_tasks import LABELS, passes

MOST_DIFFERENCE = 1e-4  # of the largest logit
LEAST_STEPS = 2  # so that a gradient is among what is compared
MOST_LEFT = 0.9  # of a task's first pass, in its last


def _losses(document: Document) -> Check:
    """PEFT's losses, as long as tokens have the same experts: then each step computes the same."""
    deviation, steps = document["deviation"], document["same_routes"]
    shown = "not finite" if deviation is None else f"{deviation:.1e}"
    return check_of(
        f"each step's loss within {MOST_DEVIATION:g} of PEFT's, relative, until a rounding gives a "
        "token another expert",
        f"largest deviation {shown} in the first {steps} of {document['settings']['steps']} steps",
        steps >= LEAST_STEPS and deviation is not None and deviation <= MOST_DEVIATION,
    )


def _two_tasks(document: Document) -> list[Check]:
    found = document["two_tasks"]
    checks = []
    for name, claim in (
        ("peft", "two tasks in one batch, without dropout: losses of PEFT's, one after the other"),
        ("dropout", "with dropout, given the same masks: losses of each task alone"),
    ):
        checks.append(losses_check(claim, found["differences"][name]))
    left = []
    for name in LABELS:
        means = [passes(found, name, place) for place in range(len(found["tasks"]))]
        left += [each[-1] / each[0] for each in means]
    faster = ratio(found, "ours_dropout", "peft")
    return [
        *checks,
        check_of(
            f"the losses of both tasks fall below {MOST_LEFT:g} of their first pass over the texts",
            f"to {max(left):.2f} or less",
            all(each < MOST_LEFT for each in left),
        ),
        check_of(
            "a step of both in one batch, with dropout, takes less time than PEFT's without",
            "too few undisturbed steps" if faster is None else f"{faster.median:.2f} x the time",
            faster is not None and faster.median < 1,
        ),
    ]


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
        _losses(document),
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
        *_two_tasks(document),
    ]
