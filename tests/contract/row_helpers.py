"""A step of a model whose rows have adapters of their own, and the loop over the adapters that it
has to equal: each adapter alone, on its own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from helpers import F64, max_error
from torch import Tensor

import lora_ext
from contract.subject import Subject

Names = Sequence[str | None]
Step = dict[str, Tensor]


def batch(subject: Subject, count: int = 6, dtype: torch.dtype = F64) -> Tensor:
    """x of `count` samples: ``[count, 5, in]``, pixels, or ids ``[count, tokens]``."""
    if subject.name == "net":
        return subject.x(count)
    if subject.name == "conv2d":
        return subject.x(15 * count, dtype)
    return subject.x(5 * count, dtype).unflatten(0, (count, 5))


def gradient_of(y: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
    """A dy that depends on y's shape alone."""
    values = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    return values.to(rounded_to or y.dtype).to(y.dtype)


def found_of(subject: Subject, y: Tensor, dx: Tensor | None) -> Step:
    """y, dx and the gradients by name."""
    found = {"y": y.detach(), "dx": dx}
    found |= {name: parameter.grad for name, parameter in subject.model.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def differentiated(subject: Subject, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Step:
    subject.model.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = forward(x)
    y.backward(gradient_of(y))
    return found_of(subject, y, x.grad)


def run(subject: Subject, names: Names, x: Tensor, index: Tensor | None = None) -> Step:
    """A step within `use_adapters`. index: ``[batch]`` or ``[batch, tokens]``, as its own."""

    def forward(x):
        with lora_ext.use_adapters(subject.model, names, index):
            return subject.model(x)

    return differentiated(subject, x, forward)


def run_alone(
    subject: Subject,
    names: Names,
    x: Tensor,
    index: Tensor | None = None,
    rounded_to: torch.dtype | None = None,
) -> Step:
    """For each name a step of its own rows with that adapter alone; without a name none is active.

    Adapters without rows have no gradient. rounded_to: the dtype that dy has in the other step
    """
    subject.model.zero_grad()
    places, numbers = _numbers(names, index)
    # A token is a sample of one.
    parts = x if numbers.dim() == 1 else x.flatten(0, 1).unsqueeze(1)
    parts = parts.detach().clone().requires_grad_(x.is_floating_point())
    active = subject.active()
    y = grad = None
    for number in numbers.unique().tolist():
        subject.set_adapter([] if number < 0 else [places[number]])
        own = (numbers.flatten() == number).nonzero().flatten()
        part = subject.model(parts[own])
        if y is None or grad is None:
            y = part.new_empty(len(parts), *part.shape[1:])
            grad = gradient_of(y, rounded_to)
        y[own] = part.detach()
        if part.requires_grad:
            part.backward(grad[own])
    assert y is not None
    dx = None if parts.grad is None else parts.grad.view_as(x)
    lead = (*numbers.shape, *y.shape[numbers.dim() :])
    found = found_of(subject, y.view(lead), dx)
    subject.set_adapter(max(active, key=len))
    return found


def _numbers(names: Names, index: Tensor | None) -> tuple[list[Any], Tensor]:
    if index is not None:
        return list(names), index
    places = [name for name in dict.fromkeys(names) if name is not None]
    return places, torch.tensor([-1 if n is None else places.index(n) for n in names])


def assert_equal_steps(found: Step, wanted: Step, tolerance: float) -> None:
    """As near as the tolerance times the largest value; a gradient that one step alone has is zero:
    of an adapter that was named and has no rows."""
    assert wanted.keys() <= found.keys()
    for name, value in found.items():
        if name not in wanted:
            assert not value.any(), name
            continue
        assert value.dtype == wanted[name].dtype and value.shape == wanted[name].shape, name
        limit = tolerance * max(1.0, wanted[name].abs().max().item())
        torch.testing.assert_close(
            value, wanted[name], rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_errors_at_most_twice(found: Step, theirs: Step, exact: Step, floor: float) -> None:
    """floor: a share of the largest value."""
    assert theirs.keys() == exact.keys() <= found.keys()
    for name, wanted in exact.items():
        assert found[name].dtype == theirs[name].dtype, name
        error, limit = (max_error(step[name], wanted) for step in (found, theirs))
        assert error <= 2 * limit + floor * wanted.abs().max().item(), name
