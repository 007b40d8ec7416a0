"""A batch in which every sample has its own adapter, on whole models: a step and a forward."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

import lora_ext

from ..markdown import Column, floor_column, peak_columns, present, ratio_columns, table_of
from ..memory import peak_bytes
from ..results import Row
from ..timing import Plan, compared
from .calls import Pairs, forward_of, hidden, step_of, with_adapters
from .cases import BATCH, Case, base_model, inputs
from .step import words_of

LABELS = {
    "frozen": "frozen",
    "ours": "ours",
    "accelerated": "PEFT, accelerated",
    "peft": "PEFT",
    "in_turn": "PEFT, one after the other",
    "ours_in_turn": "ours, one after the other",
}
_COPIES = 3

Call = Callable[[], None]


def names_of(case: Case) -> list[str]:
    """An adapter for each sample."""
    return [f"adapter_{place}" for place in range(BATCH[case.model])]


def _of_batch(model: nn.Module, names: Sequence[str], how: str) -> Callable[[Tensor], Tensor]:
    """hidden = call(x), each sample with its own adapter, in one call of the model."""
    if how == "frozen":
        return hidden(model)
    if how == "ours":

        def ours(x: Tensor) -> Tensor:
            with lora_ext.use_adapters(model, names):
                return hidden(model)(x)

        return ours
    return lambda x: model(inputs_embeds=x, adapter_names=list(names)).last_hidden_state


def _in_turn(
    model: nn.Module, names: Sequence[str], choose: Callable[[str], object], pairs: Pairs
) -> Call:
    """Steps of one sample, with its adapter active."""
    rotation = itertools.cycle(pairs)
    trained = [p for p in model.parameters() if p.requires_grad]

    def steps() -> None:
        x, grad = next(rotation)
        for leaf in trained:
            leaf.grad = None
        for place, name in enumerate(names):
            choose(name)
            own = x[place : place + 1].detach().requires_grad_()
            hidden(model)(own).backward(grad[place : place + 1])

    return steps


def measure(case: Case, plan: Plan, progress: Callable[[str], None]) -> Row:
    """Times and peaks of a step and of a forward, as plain JSON."""
    base = base_model(case)
    pairs = inputs(case, base, _COPIES)
    names = names_of(case)
    words = words_of(case, base)
    own, alone, theirs, accelerated = (  # of the second, adapters take turns in being trained
        with_adapters(copy.deepcopy(base), variant, names, **words).train()
        for variant in ("ours", "ours", "peft", "peft_accelerated")
    )
    models = {"frozen": base, "ours": own, "accelerated": accelerated, "peft": theirs}
    steps: dict[str, Call] = {}
    forwards: dict[str, Call] = {}
    for how, model in models.items():
        call = _of_batch(model, names, how)
        forwards[how] = forward_of(model, pairs, call)
        if how != "peft":  # which refuses to train a mixed batch
            steps[how] = step_of(model, pairs, call)
    turns = {
        "in_turn": (theirs, theirs.base_model.set_adapter),
        "ours_in_turn": (alone, lambda name: lora_ext.set_adapter(alone, name)),
    }
    for how, (model, choose) in turns.items():
        steps[how] = _in_turn(model, names, choose, pairs)
    result: Row = {"id": f"{case.id}, {len(names)} adapters", "memory": {}}
    for how, step in steps.items():
        progress(f"{result['id']}: {LABELS[how]}")
        step()
        result["memory"][how] = {"peak": peak_bytes(step)}
    progress(f"{result['id']}: a step")
    result["timing"] = compared(steps, plan)
    progress(f"{result['id']}: a forward")
    result["forward"] = compared(forwards, plan)
    return result


def table(rows: Sequence[Row], key: str) -> str:
    """Times of one of "timing" and "forward" over frozen; of steps their peaks, too."""
    labels = present(rows, LABELS, key)
    others = {name: label for name, label in labels.items() if name != "frozen"}
    columns: list[Column] = [("model, layers, base", lambda row: row["id"])]
    columns += [floor_column("frozen", key), *ratio_columns(others, "frozen", key)]
    if key == "timing":
        columns += peak_columns({name: f"peak: {label}" for name, label in labels.items()})
    return table_of(rows, columns)
