"""The models that are compared, each with an adapter and a head for every task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_ext

from ..finetune.classifier import mean_of_tokens
from ..finetune.trained_models import TARGETS

RANKS = (4, 8, 16)  # of the tasks in turn
RATES = (1e-3, 2e-3)  # AdamW's, of the tasks in turn
CLIP = 1.0  # largest norm of an adapter's gradients
SEED = 0


@dataclass
class Tenants:
    """One frozen encoder with an adapter for each task.

    Attributes:
        model: the encoder, of "ours" or in PEFT's wrapper.
        heads: of the tasks, H to 2.
        parameters: of each task, its adapter's and its head's.
        optimizers: one for each task.
        activate: makes one adapter the only active one.
    """

    model: Any
    heads: nn.ModuleList
    parameters: list[list[nn.Parameter]]
    optimizers: list[torch.optim.Optimizer]
    activate: Callable[[str], object]

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        return mean_of_tokens(self.model, ids, mask)


def rank_of(place: int) -> int:
    return RANKS[place % len(RANKS)]


def rate_of(place: int) -> float:
    return RATES[place % len(RATES)]


def name_of(place: int) -> str:
    return f"task{place}"


def make_tenants(
    encoder: nn.Module,
    width: int,
    count: int,
    kind: str,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    stacks: Sequence[str] = (),
) -> Tenants:
    """A copy of the encoder with `count` adapters; of either kind with the same values.

    Args:
        width: of its hidden states.
        kind: "ours" or "peft".
        targets: names of the linear layers with adapters.
        stacks: names of the experts' weights with adapters.
    """
    encoder = copy.deepcopy(encoder)
    names = [name_of(place) for place in range(count)]
    if kind == "ours":
        for place, name in enumerate(names):
            rank = rank_of(place)
            config = lora_ext.LoraConfig(
                [*targets, *stacks], r=rank, lora_alpha=2 * rank, lora_dropout=dropout
            )
            lora_ext.apply_lora(encoder, config, name)
        lora_ext.set_adapter(encoder, names)
        model = encoder

        def activate(name: str) -> None:
            lora_ext.set_adapter(encoder, name)
    else:
        model = _with_peft(encoder, names, dropout, targets, stacks)
        activate = model.base_model.set_adapter
    model.train()
    torch.manual_seed(SEED)
    heads = nn.ModuleList([nn.Linear(width, 2) for _ in names])
    adapters = [_start_alike(model, name) for name in names]
    parameters = [[*own, *head.parameters()] for own, head in zip(adapters, heads, strict=True)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(own, lr=rate_of(place)) for place, own in enumerate(parameters)
    ]
    return Tenants(model, heads, parameters, optimizers, activate)


def _with_peft(
    encoder: nn.Module,
    names: Sequence[str],
    dropout: float,
    targets: Sequence[str],
    stacks: Sequence[str],
) -> Any:
    from peft import LoraConfig, get_peft_model

    def config(place: int) -> LoraConfig:
        rank = rank_of(place)
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=dropout,
            target_modules=list(targets),
            target_parameters=list(stacks) or None,
        )

    model: Any = get_peft_model(encoder, config(0), names[0])
    for place, name in enumerate(names[1:], 1):
        model.add_adapter(name, config(place))
    model.base_model.set_adapter(list(names))
    return model


@torch.no_grad()
def _start_alike(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The adapter's parameters in the order of the layers, A random and B zero."""
    generator = torch.Generator().manual_seed(SEED + int(name.removeprefix("task")))
    found = []
    for key, parameter in model.named_parameters():
        if name in key.split("."):
            if "lora_a." in key.lower():
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.zero_()
            found.append(parameter)
    return found
