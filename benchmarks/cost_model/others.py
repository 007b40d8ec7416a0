"""The launches of the frozen and merged layer, and of other packages."""

from __future__ import annotations

from .launch import BYTES, FLOAT, Launch, Shape, passes, product
from .rates import Machine


def merged_forward(machine: Machine, s: Shape) -> list[Launch]:
    """One product of the library."""
    return [product(machine, "base", s.m, s.n, s.k)]


def frozen_backward(machine: Machine, s: Shape) -> list[Launch]:
    """dX alone."""
    return [product(machine, "dX", s.m, s.k, s.n)]


def naive_forward(machine: Machine, s: Shape) -> list[Launch]:
    """Base, dropout, A, B, times s, plus."""
    launches = merged_forward(machine, s)
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * (2 * BYTES + 1)))
    return [
        *launches,
        product(machine, "x A^T", s.m, s.r, s.k),
        product(machine, "S B^T", s.m, s.n, s.r),
        passes("times s", s.m * s.n, 2),
        passes("plus", s.m * s.n, 3),
    ]


def naive_backward(machine: Machine, s: Shape) -> list[Launch]:
    """As autograd runs it."""
    launches = [
        passes("times s", s.m * s.n, 2),
        product(machine, "dB", s.n, s.r, s.m),
        product(machine, "dS", s.m, s.r, s.n),
        product(machine, "dA", s.r, s.k, s.m),
        product(machine, "dS A", s.m, s.k, s.r),
        *frozen_backward(machine, s),
        passes("plus", s.m * s.k, 3),
    ]
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * (2 * BYTES + 1)))
    return launches


def peft_default_forward(machine: Machine, s: Shape) -> list[Launch]:
    """Naive with float32 adapters: x and the update are float32."""
    launches = merged_forward(machine, s)
    launches.append(Launch("x to float32", s.m * s.k * (BYTES + FLOAT)))
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * (2 * FLOAT + 1)))
    return [
        *launches,
        Launch("x A^T", s.m * s.k * FLOAT),
        Launch("S B^T", s.m * s.n * FLOAT),
        passes("times s", s.m * s.n, 2, FLOAT),
        Launch("plus", s.m * s.n * (BYTES + 2 * FLOAT)),
        Launch("round", s.m * s.n * (FLOAT + BYTES)),
    ]


def peft_default_backward(machine: Machine, s: Shape) -> list[Launch]:
    """As autograd runs it."""
    launches = [
        Launch("dY to float32", s.m * s.n * (BYTES + FLOAT)),
        passes("times s", s.m * s.n, 2, FLOAT),
        Launch("dB", s.m * s.n * FLOAT),
        Launch("dS", s.m * s.n * FLOAT),
        Launch("dA", s.m * s.k * FLOAT),
        Launch("dS A", s.m * s.k * FLOAT),
        *frozen_backward(machine, s),
        Launch("round", s.m * s.k * (FLOAT + BYTES)),
        passes("plus", s.m * s.k, 3),
    ]
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * (2 * FLOAT + 1)))
    return launches


def unsloth_forward(machine: Machine, s: Shape) -> list[Launch]:
    """Base, x A^T, and addmm_ onto the base's result."""
    return [
        *merged_forward(machine, s),
        product(machine, "x A^T", s.m, s.r, s.k),
        product(machine, "addmm_", s.m, s.n, s.r, accumulate=True),
    ]


def unsloth_backward(machine: Machine, s: Shape) -> list[Launch]:
    """dY B once, S again, dB, dA, dX, addmm_ onto it."""
    return [
        product(machine, "dS", s.m, s.r, s.n),
        product(machine, "x A^T", s.m, s.r, s.k),
        product(machine, "dB", s.n, s.r, s.m),
        product(machine, "dA", s.r, s.k, s.m),
        *frozen_backward(machine, s),
        product(machine, "addmm_", s.m, s.k, s.r, accumulate=True),
    ]
