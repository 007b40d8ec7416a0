"""One timed call of a variant: forward, backward alone, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from .shapes import BACKWARD, STEP
from .variants import Variant

Call = Callable[[], object]


class Operands(Protocol):
    """What calls are made with."""

    inputs: list[Tensor]

    def rotation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (x, upstream gradient) pairs."""
        ...


def call_of(variant: Variant, operands: Operands, mode: str) -> Call:
    """A function that computes once; each call takes the next input of the rotation.

    A forward is meant to be called under no_grad.
    """
    if mode == BACKWARD:
        return _backward(variant, operands)
    return (_step if mode == STEP else _forward)(variant, operands)


def _forward(variant: Variant, operands: Operands) -> Call:
    pairs = operands.rotation()
    call = variant.call

    def forward() -> Tensor:
        with variant:
            return call(next(pairs)[0])

    return forward


def _step(variant: Variant, operands: Operands) -> Call:
    pairs = operands.rotation()

    def step() -> None:
        x, grad = next(pairs)
        for leaf in (x, *variant.adapters):
            leaf.grad = None
        with variant:
            variant.call(x).backward(grad)

    return step


def _backward(variant: Variant, operands: Operands) -> Call:
    """The outputs are made by the first round of calls, outside every measurement."""
    pairs = operands.rotation()
    outputs: dict[int, Tensor] = {}

    def backward() -> None:
        x, grad = next(pairs)
        with variant:
            if id(x) not in outputs:
                outputs[id(x)] = variant.call(x)
            torch.autograd.grad(outputs[id(x)], (x, *variant.adapters), grad, retain_graph=True)

    def warm_up() -> None:
        for _ in operands.inputs:
            backward()

    warm_up()
    return backward
