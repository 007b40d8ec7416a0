"""Steps and forwards of a model, or of a layer, on inputs that rotate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

RANK, ALPHA = 16, 32
Pairs = Iterable[tuple[Tensor, Tensor]]  # (embedded tokens, gradient of the output)


def hidden(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """call(x): the last hidden state of a model of transformers."""
    return lambda x: model(inputs_embeds=x).last_hidden_state


def step_of(
    model: nn.Module, pairs: Pairs, call: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], None]:
    """Forward and backward on the next input; gradients are dropped before each step.

    call: of the model; by default `hidden`
    """
    call = call or hidden(model)
    rotation = itertools.cycle(pairs)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        x, grad = next(rotation)
        for leaf in (x, *trained):
            leaf.grad = None
        call(x).backward(grad)

    return step


def forward_of(
    model: nn.Module, pairs: Pairs, call: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], None]:
    """A forward for inference on the next input; the model is in eval mode within it."""
    call = call or hidden(model)
    rotation = itertools.cycle(pairs)

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            call(next(rotation)[0].detach())
        model.train()

    return forward
