"""The launches of this package's routes, as the planner predicts them."""

from __future__ import annotations

from lora_ext import _C

from .launch import Launch
from .rates import Machine


def forward(route: str, machine: Machine, problem: _C.Problem) -> list[Launch]:
    """Of the forward by a route, or with "auto" by the planner's choice."""
    plan = _C.plan_forward(machine.planned, problem, route)
    return _launches(machine, problem, plan, False)


def backward(route: str, machine: Machine, problem: _C.Problem) -> list[Launch]:
    """Of the backward with all gradients."""
    plan = _C.plan_backward(machine.planned, problem, route)
    return _launches(machine, problem, plan, True)


def _launches(machine: Machine, problem: _C.Problem, plan: _C.Plan, backward: bool) -> list[Launch]:
    found = _C.predicted_launches(machine.planned, problem, plan, backward)
    return [Launch(each.name, each.bytes, each.flop, each.times) for each in found]
