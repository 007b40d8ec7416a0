"""Training in turns: every variant takes a step on a batch before the next batch comes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..memory import peak_bytes
from ..timing import CpuMeter, Timing
from .classifier import Batch
from .trained_models import TrainedModel

MAX_WAIT = 0.03  # a step whose threads waited for a core for a larger fraction is not counted
_REPORTS = 8  # lines of progress

Result = TypeVar("Result")


@dataclass
class Curve:
    """What a variant's training was like; step i is entry i of each list."""

    losses: list[float] = field(default_factory=list)
    passes: Timing = field(default_factory=lambda: Timing(1, 0.0))  # forward and backward
    updates: Timing = field(default_factory=lambda: Timing(1, 0.0))  # AdamW


def forward_backward(variant: TrainedModel, batch: Batch) -> Tensor:
    """The loss []; leaves the gradients in the parameters."""
    loss = cross_entropy(variant.model(batch.ids, batch.mask), batch.labels)
    loss.backward()
    return loss.detach()


def timed(timing: Timing, meter: CpuMeter, function: Callable[[], Result]) -> Result:
    """The result of a call, whose time is kept unless other processes disturbed it."""
    results: list[Result] = []
    sample = meter(lambda: results.append(function()), 1)
    clean = sample.wait <= MAX_WAIT
    timing.samples.append(sample.ms if clean else None)
    if not clean:
        timing.dropped.append(sample.ms)
    return results[0]


def train(
    variants: Mapping[str, TrainedModel],
    batches: Sequence[Batch],
    say: Callable[[str], None],
    seed: int = 0,
) -> dict[str, Curve]:
    """One step of each variant on each batch, in a new order each time; the rate falls to zero.

    Forward with backward, and the update, are timed apart. All variants draw their dropout from
    the same seed at the same step.
    """
    curves = {name: Curve() for name in variants}
    rates = {name: variant.optimizer.param_groups[0]["lr"] for name, variant in variants.items()}
    order, meter = random.Random(seed), CpuMeter()
    marks = {round(i * len(batches) / _REPORTS) for i in range(1, _REPORTS + 1)}
    for step, batch in enumerate(batches):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            variant, curve = variants[name], curves[name]
            variant.optimizer.param_groups[0]["lr"] = rates[name] * (1 - step / len(batches))
            torch.manual_seed(seed + step)
            loss = timed(curve.passes, meter, partial(forward_backward, variant, batch))
            timed(curve.updates, meter, variant.optimizer.step)
            variant.optimizer.zero_grad()
            curve.losses.append(loss.item())
        if step + 1 in marks:
            shown = ", ".join(f"{name} {recent_loss(c.losses):.3f}" for name, c in curves.items())
            say(f"step {step + 1} of {len(batches)}: loss {shown}")
    return curves


def recent_loss(losses: Sequence[float], steps: int = 20) -> float:
    """Mean of the last losses."""
    last = losses[-steps:]
    return sum(last) / len(last)


def largest_deviation(losses: Sequence[float], reference: Sequence[float]) -> float:
    """max over the steps of |loss - reference| / |reference|; infinite if one is no number."""
    if len(losses) != len(reference):
        raise ValueError(
            f"benchmarks.finetune: expected curves of one length, but got {len(losses)} and "
            f"{len(reference)} steps"
        )
    found = [abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)]
    return max(value if value == value else float("inf") for value in found)


@torch.no_grad()
def predict(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Logits [texts, classes] in evaluation mode."""
    was_training = model.training
    model.eval()
    logits = torch.cat([model(batch.ids, batch.mask) for batch in batches])
    model.train(was_training)
    return logits


def accuracy(logits: Tensor, batches: Sequence[Batch]) -> float:
    """Fraction of texts whose largest logit is their label's."""
    labels = torch.cat([batch.labels for batch in batches])
    return (logits.argmax(1) == labels).double().mean().item()


def step_memories(variants: Mapping[str, TrainedModel], batch: Batch) -> dict[str, dict[str, int]]:
    """Peak bytes of forward and backward above what is live before, gradients included."""
    found = {}
    for name, variant in variants.items():
        step, clear = partial(forward_backward, variant, batch), variant.optimizer.zero_grad
        found[name] = {"peak": peak_bytes(step, prepare=clear)}
        clear()
    return found
