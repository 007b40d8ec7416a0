"""Held-out texts of all tasks served in one batch, and one text after the other."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lora_ext

from ..finetune import round_trip
from ..finetune.classifier import Batch, batch_of
from ..finetune.training import accuracy
from .tasks import Task
from .tenants import Tenants, name_of

TEXTS = 12  # of each task
SERVED_TOGETHER = 32


@dataclass(frozen=True)
class Requests:
    """Texts of different tasks, in a random order.

    Attributes:
        batches: of `SERVED_TOGETHER` texts.
        owners: of each batch, the task of each text.
        singles: the same texts, each in a batch of one.
    """

    batches: list[Batch]
    owners: list[list[int]]
    singles: list[Batch]


def requests_of(
    tasks: Sequence[Task], tokenizer: Callable[..., dict[str, Tensor]], texts: int = TEXTS
) -> Requests:
    """The first held-out texts of each task, mixed."""
    asked = [(place, text) for place, task in enumerate(tasks) for text in task.held_out[:texts]]
    random.Random(2).shuffle(asked)
    parts = [asked[i : i + SERVED_TOGETHER] for i in range(0, len(asked), SERVED_TOGETHER)]
    return Requests(
        [batch_of([text for _, text in part], tokenizer) for part in parts],
        [[place for place, _ in part] for part in parts],
        [batch_of([text], tokenizer) for _, text in asked],
    )


def _headed(tenants: Tenants, pooled: Tensor, owners: Sequence[int]) -> Tensor:
    rows = [tenants.heads[place](row) for place, row in zip(owners, pooled, strict=True)]
    return torch.stack(rows)


@torch.no_grad()
def serve_together(tenants: Tenants, requests: Requests) -> Tensor:
    """Logits ``[texts, 2]``."""
    tenants.model.eval()
    found = []
    for batch, owners in zip(requests.batches, requests.owners, strict=True):
        with lora_ext.use_adapters(tenants.model, [name_of(place) for place in owners]):
            pooled = tenants.pooled(batch.ids, batch.mask)
        found.append(_headed(tenants, pooled, owners))
    tenants.model.train()
    return torch.cat(found)


@torch.no_grad()
def serve_one_by_one(tenants: Tenants, requests: Requests) -> Tensor:
    """The same, each text alone with its adapter active."""
    tenants.model.eval()
    owners = [place for part in requests.owners for place in part]
    found = []
    for place, batch in zip(owners, requests.singles, strict=True):
        tenants.activate(name_of(place))
        found.append(_headed(tenants, tenants.pooled(batch.ids, batch.mask), [place]))
    tenants.model.train()
    return torch.cat(found)


def in_bfloat16(tenants: Tenants) -> Tenants:
    """A copy whose encoder is bfloat16; adapters and heads stay float32."""
    model: Any = copy.deepcopy(tenants.model)
    for key, parameter in model.named_parameters():
        if "lora_" not in key:
            parameter.data = parameter.data.bfloat16()

    def activate(name: str) -> None:
        lora_ext.set_adapter(model, name)

    return Tenants(model, tenants.heads, [], [], activate)


def compared(found: Tensor, wanted: Tensor, requests: Requests) -> dict[str, Any]:
    """How the logits differ, and how many of them are right."""
    right = {"texts": len(found), "accuracy": accuracy(found, requests.batches)}
    return right | round_trip.compared(found, wanted)
