"""A batch in which every sample has its own adapter, on whole models: a step and a forward."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lora_ext

from ..markdown import NOTHING, Column, mebibytes, milliseconds, quotient, table_of
from ..memory import peak_bytes
from ..results import Row, ratio
from ..shapes import DROPOUT
from ..timing import Plan, compared
from .cases import BATCH, Case, base_model, inputs
from .step import ALPHA, RANK

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


def own_model(case: Case, base: nn.Module, names: Sequence[str]) -> nn.Module:
    model = copy.deepcopy(base)
    paths = [path for path, module in model.named_modules() if case.is_target(path, module)]
    dtype = getattr(torch, case.dtype)
    config = lora_ext.LoRAConfig(paths, r=RANK, alpha=ALPHA, dropout=DROPOUT, adapter_dtype=dtype)
    for name in names:
        lora_ext.apply_lora(model, config, name)
    lora_ext.models.set_adapter(model, names)
    return model


def peft_model(case: Case, base: nn.Module, names: Sequence[str]) -> nn.Module:
    import peft

    paths = [path for path, module in base.named_modules() if case.is_target(path, module)]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=paths)
    options = {"autocast_adapter_dtype": False}
    model = peft.get_peft_model(copy.deepcopy(base), config, names[0], **options)
    for name in names[1:]:
        model.add_adapter(name, config, **options)
    model.base_model.set_adapter(list(names))
    return model.train()


def _of_batch(model: nn.Module, names: Sequence[str], how: str) -> Callable[[Tensor], Tensor]:
    """hidden = call(x), each sample with its own adapter, in one call of the model."""
    if how == "frozen":
        return lambda x: model(inputs_embeds=x).last_hidden_state
    if how == "ours":

        def ours(x: Tensor) -> Tensor:
            with lora_ext.use_adapters(model, names):
                return model(inputs_embeds=x).last_hidden_state

        return ours
    return lambda x: model(inputs_embeds=x, adapter_names=list(names)).last_hidden_state


def _in_turn(
    model: nn.Module, names: Sequence[str], choose: Callable[[str], object]
) -> Callable[[Tensor, Tensor], None]:
    """Steps of one sample, with its adapter active."""

    def steps(x: Tensor, grad: Tensor) -> None:
        for place, name in enumerate(names):
            choose(name)
            own = x[place : place + 1].detach().requires_grad_()
            model(inputs_embeds=own).last_hidden_state.backward(grad[place : place + 1])

    return steps


def _step(call: Callable[[Tensor, Tensor], object], leaves: Sequence[Tensor], pairs: Any) -> Call:
    rotation = itertools.cycle(pairs)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        call(*next(rotation))

    return step


def _forward(model: nn.Module, call: Callable[[Tensor], Tensor], pairs: Any) -> Call:
    rotation = itertools.cycle(pairs)

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            call(next(rotation)[0].detach())
        model.train()

    return forward


def measure(case: Case, plan: Plan, progress: Callable[[str], None]) -> Row:
    """Times and peaks of a step and of a forward, as plain JSON."""
    base = base_model(case)
    pairs = inputs(case, base, _COPIES)
    names = names_of(case)
    own, alone, theirs = (
        own_model(case, base, names),
        own_model(case, base, names),  # whose adapters take turns in being the one that is trained
        peft_model(case, base, names),
    )
    accelerated = lora_ext.accelerate(peft_model(case, base, names))
    models = {"frozen": base, "ours": own, "accelerated": accelerated, "peft": theirs}
    steps: dict[str, Call] = {}
    forwards: dict[str, Call] = {}
    for how, model in models.items():
        call = _of_batch(model, names, how)
        leaves = [p for p in model.parameters() if p.requires_grad] + [x for x, _ in pairs]
        forwards[how] = _forward(model, call, pairs)
        if how != "peft":  # which refuses to train a mixed batch
            steps[how] = _step(lambda x, grad, c=call: c(x).backward(grad), leaves, pairs)
    turns = {
        "in_turn": (theirs, theirs.base_model.set_adapter),
        "ours_in_turn": (alone, lambda name: lora_ext.models.set_adapter(alone, name)),
    }
    for how, (model, choose) in turns.items():
        leaves = [p for p in model.parameters() if p.requires_grad]
        steps[how] = _step(_in_turn(model, names, choose), leaves, pairs)
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
    present = [n for n in LABELS if n != "frozen" and any(n in row.get(key, {}) for row in rows)]
    columns: list[Column] = [("model, layers, base", lambda row: row["id"])]
    columns += [("frozen", lambda row: milliseconds(row[key]["frozen"]["ms"]))]
    columns += [
        (LABELS[name], lambda row, n=name: quotient(ratio(row, n, "frozen", key), spread=True))
        for name in present
    ]
    if key == "timing":

        def peak(row: Row, name: str) -> str:
            found = row["memory"].get(name)
            return mebibytes(found["peak"]) if found else NOTHING

        columns += [
            (f"peak: {LABELS[name]}", lambda row, n=name: peak(row, n))
            for name in ("frozen", *present)
        ]
    return table_of(rows, columns)
