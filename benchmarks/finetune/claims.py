"""What a run claims. Each claim says what was found, and holds or not; none is left out."""

from __future__ import annotations

from typing import Any

from ..results import Document
from .data import NEAR
from .round_trip import TOLERANCE
from .trained_models import LABELS

Check = dict[str, Any]  # claim, found, holds

LEAST_TRAIN = 2000
LEAST_HELD_OUT = 400
LEAST_GAIN = 0.10  # of accuracy above the majority class
MOST_DEVIATION = 1e-3


def check_of(claim: str, found: str, holds: bool) -> Check:
    return {"claim": claim, "found": found, "holds": bool(holds)}


def _data(document: Document) -> list[Check]:
    data = document["data"]
    train, held_out = sum(data["train"].values()), sum(data["held_out"].values())
    shared, similarity = data["definitions_on_both_sides"], data["largest_similarity"]
    return [
        check_of(
            f"at least {LEAST_TRAIN} training and {LEAST_HELD_OUT} held-out texts",
            f"{train} and {held_out}",
            train >= LEAST_TRAIN and held_out >= LEAST_HELD_OUT,
        ),
        check_of(
            f"no definition on both sides, no similarity of {NEAR:g} or more between the sides",
            f"{shared} definitions, largest similarity {similarity:.3f}",
            shared == 0 and similarity < NEAR,
        ),
    ]


def accuracy_check(document: Document, name: str, lead: str = "") -> Check:
    """Whether a model is better than always answering the most frequent area."""
    majority, found = document["data"]["majority"], document["accuracy"][name]
    claim = f"{100 * LEAST_GAIN:g} points above the majority class ({majority:.1%}) on held-out"
    return check_of(f"{lead}{claim}", f"{found:.1%}", found >= majority + LEAST_GAIN)


def _accuracy(document: Document) -> list[Check]:
    names = [name for name in document["accuracy"] if name.startswith("ours")]
    return [accuracy_check(document, name, f"{LABELS[name]}: ") for name in names]


def loss_check(document: Document, lead: str = "") -> Check:
    """Whether the losses are those of PEFT's training. lead: the claim's first words."""
    deviation = document["deviation"]
    found = "not finite" if deviation is None else f"{deviation:.1e}"
    return check_of(
        f"{lead}each step's loss within {MOST_DEVIATION:g} of PEFT's, relative",
        f"largest deviation {found}",
        deviation is not None and deviation <= MOST_DEVIATION,
    )


def _agreement(document: Document) -> list[Check]:
    return [loss_check(document, "without dropout ")]


def _predictions(document: Document) -> list[Check]:
    trip = document["round_trip"]
    texts = trip["texts"]

    def same(name: str, claim: str) -> Check:
        difference, answers = trip[name]["difference"], trip[name]["same_answers"]
        shown = "not finite" if difference is None else f"{difference:.1e}"
        return check_of(
            f"{claim}: same answer to every held-out text, logits within {TOLERANCE:g} of the "
            "largest",
            f"{answers} of {texts} answers, {shown}",
            answers == texts and difference is not None and difference <= TOLERANCE,
        )

    identical = trip["reloaded"]["identical"]
    found = "identical" if identical else f"differ by {trip['reloaded']['difference']}"
    before = trip["unadapted"]["same_answers"]
    return [
        check_of(
            "saved and loaded into a new model: logits bit for bit those of the trained model",
            f"{found}; before loading {before} of {texts} answers are the same",
            identical and not trip["unadapted"]["identical"],
        ),
        same("merged", "merged"),
        same("peft", "the folder opened by PEFT"),
    ]


def evaluate(document: Document) -> list[Check]:
    """All claims in the order of the run."""
    parts = (_data, _agreement, _accuracy, _predictions)
    return [check for part in parts for check in part(document)]
