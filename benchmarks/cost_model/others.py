"""The launches of the frozen and merged layer, and of other packages."""

from __future__ import annotations

from lora_ext._C import Problem

from .launch import BYTES, FLOAT, Launch, passes, product
from .rates import Machine


def merged_forward(machine: Machine, p: Problem) -> list[Launch]:
    """One product of the library."""
    return [product(machine, "base", p.m, p.n, p.k)]


def frozen_backward(machine: Machine, p: Problem) -> list[Launch]:
    """dX alone."""
    return [product(machine, "dX", p.m, p.k, p.n)]


def naive_forward(machine: Machine, p: Problem) -> list[Launch]:
    """Base, dropout, A, B, times s, plus."""
    launches = merged_forward(machine, p)
    if p.dropout:
        launches.append(Launch("dropout", p.m * p.k * (2 * BYTES + 1)))
    return [
        *launches,
        product(machine, "x A^T", p.m, p.rank, p.k),
        product(machine, "S B^T", p.m, p.n, p.rank),
        passes("times s", p.m * p.n, 2),
        passes("plus", p.m * p.n, 3),
    ]


def naive_backward(machine: Machine, p: Problem) -> list[Launch]:
    """As autograd runs it."""
    launches = [
        passes("times s", p.m * p.n, 2),
        product(machine, "dB", p.n, p.rank, p.m),
        product(machine, "dS", p.m, p.rank, p.n),
        product(machine, "dA", p.rank, p.k, p.m),
        product(machine, "dS A", p.m, p.k, p.rank),
        *frozen_backward(machine, p),
        passes("plus", p.m * p.k, 3),
    ]
    if p.dropout:
        launches.append(Launch("dropout", p.m * p.k * (2 * BYTES + 1)))
    return launches


def peft_default_forward(machine: Machine, p: Problem) -> list[Launch]:
    """Naive with float32 adapters: x and the update are float32."""
    launches = merged_forward(machine, p)
    launches.append(Launch("x to float32", p.m * p.k * (BYTES + FLOAT)))
    if p.dropout:
        launches.append(Launch("dropout", p.m * p.k * (2 * FLOAT + 1)))
    return [
        *launches,
        Launch("x A^T", p.m * p.k * FLOAT),
        Launch("S B^T", p.m * p.n * FLOAT),
        passes("times s", p.m * p.n, 2, FLOAT),
        Launch("plus", p.m * p.n * (BYTES + 2 * FLOAT)),
        Launch("round", p.m * p.n * (FLOAT + BYTES)),
    ]


def peft_default_backward(machine: Machine, p: Problem) -> list[Launch]:
    """As autograd runs it."""
    launches = [
        Launch("dY to float32", p.m * p.n * (BYTES + FLOAT)),
        passes("times s", p.m * p.n, 2, FLOAT),
        Launch("dB", p.m * p.n * FLOAT),
        Launch("dS", p.m * p.n * FLOAT),
        Launch("dA", p.m * p.k * FLOAT),
        Launch("dS A", p.m * p.k * FLOAT),
        *frozen_backward(machine, p),
        Launch("round", p.m * p.k * (FLOAT + BYTES)),
        passes("plus", p.m * p.k, 3),
    ]
    if p.dropout:
        launches.append(Launch("dropout", p.m * p.k * (2 * FLOAT + 1)))
    return launches


def unsloth_forward(machine: Machine, p: Problem) -> list[Launch]:
    """Base, x A^T, and addmm_ onto the base's result."""
    return [
        *merged_forward(machine, p),
        product(machine, "x A^T", p.m, p.rank, p.k),
        product(machine, "addmm_", p.m, p.n, p.rank, accumulate=True),
    ]


def unsloth_backward(machine: Machine, p: Problem) -> list[Launch]:
    """dY B once, S again, dB, dA, dX, addmm_ onto it."""
    return [
        product(machine, "dS", p.m, p.rank, p.n),
        product(machine, "x A^T", p.m, p.rank, p.k),
        product(machine, "dB", p.n, p.rank, p.m),
        product(machine, "dA", p.rank, p.k, p.m),
        *frozen_backward(machine, p),
        product(machine, "addmm_", p.m, p.k, p.rank, accumulate=True),
    ]
