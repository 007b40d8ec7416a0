"""One timed call of a variant: forward, backward alone, or both."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .problem import Problem
from .shapes import BACKWARD, STEP
from .variants import Variant

Call = Callable[[], object]


def call_of(variant: Variant, problem: Problem, mode: str) -> Call:
    """A function that computes once; each call takes the next input of the rotation.

    A forward is meant to be called under no_grad.
    """
    if mode == BACKWARD:
        return _backward(variant, problem)
    return (_step if mode == STEP else _forward)(variant, problem)


def _forward(variant: Variant, problem: Problem) -> Call:
    pairs = problem.rotation()
    call = variant.call

    def forward() -> torch.Tensor:
        with variant:
            return call(next(pairs)[0])

    return forward


def _step(variant: Variant, problem: Problem) -> Call:
    pairs = problem.rotation()

    def step() -> None:
        x, grad = next(pairs)
        for leaf in (x, *variant.adapters):
            leaf.grad = None
        with variant:
            variant.call(x).backward(grad)

    return step


def _backward(variant: Variant, problem: Problem) -> Call:
    """The outputs are made by the first round of calls, outside every measurement."""
    pairs = problem.rotation()
    outputs: dict[int, torch.Tensor] = {}

    def backward() -> None:
        x, grad = next(pairs)
        with variant:
            if id(x) not in outputs:
                outputs[id(x)] = variant.call(x)
            torch.autograd.grad(outputs[id(x)], (x, *variant.adapters), grad, retain_graph=True)

    def warm_up() -> None:
        for _ in problem.inputs:
            backward()

    warm_up()
    return backward
