"""PEFT's linear layers on the fused op, over nn.Linear and transformers' Conv1D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn

from ..functional import lora_linear
from ..nn.kernel_path import kernel_path
from ..nn.updates import HALVES, Update, added, obstacle, stacked, with_biases
from . import dora
from .quick import quick_forward
from .reasons import (
    ADDED,
    BASE,
    FUSED,
    PEFT,
    active_names,
    adapter_reason,
    adapters_state,
    base_obstacle,
    dtype_obstacle,
    input_reason,
)


class Linear(peft_layers.Linear):
    """`peft.tuners.lora.Linear` with another forward and nothing else.

        y = base(x) + sum over active adapters of scaling * ((drop(x) A^T) B^T + bias)

    Parameters, state dict, merging and switching are PEFT's. `lora_ext.accelerate` gives a layer
    this class, `lora_ext.decelerate` takes it back.

    Shape:
        x ``[..., in_features]`` to y ``[..., out_features]`` in the dtype that the base returns.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs):
            y = quick_forward(self, x)
            if y is not None:
                return y
            plan = plan_of(self, x)
            if plan.path == FUSED:
                return fused(self, x, plan)
            if plan.is_dora:
                return dora.linear(self, x, plan.updates[0])
            if plan.path == ADDED:
                return called(self, x, plan)
        # By name: in a bound method that outlives `decelerate`, self is of PEFT's class.
        return peft_layers.Linear.forward(self, x, *args, **kwargs)

    def path(self, rows: int | None = None) -> tuple[str, str]:
        """How the next forward on an x in the base's dtype is computed, and why."""
        return path_of(self, rows)


class LinearPlan(NamedTuple):
    """What one forward does."""

    path: str
    reason: str
    updates: Sequence[Update] = ()
    is_dora: bool = False


def plan_of(layer: Any, x: Tensor | None) -> LinearPlan:
    """The plan for x, or for an x in the base's dtype if it is None."""
    state = adapters_state(layer)
    if state is not None:
        return LinearPlan(*state)
    tables = layer._modules
    names = active_names(layer, tables["lora_A"]._modules)
    if not names:
        return LinearPlan(BASE, "none of the active adapters is in this layer")
    reason = "" if x is None else input_reason(layer, x)
    for name in names:
        reason = reason or adapter_reason(layer, name)
    if reason:
        return LinearPlan(PEFT, reason)
    updates = [update_of(layer, name) for name in names]
    base = tables["base_layer"]
    kept = base_obstacle(base) or _call_obstacle(base, x, updates)
    if layer.lora_variant and any(name in layer.lora_variant for name in names):
        one_dimension = x is not None and x.dim() == 1  # to which PEFT adds another
        reason = dora.reason(layer, names) or kept or ("DoRA on one row" if one_dimension else "")
        if reason:
            return LinearPlan(PEFT, reason)
        return LinearPlan(ADDED, "DoRA: added to torch's base product", updates, True)
    return LinearPlan(ADDED if kept else FUSED, kept, updates)


def _call_obstacle(base: Any, x: Tensor | None, updates: Sequence[Update]) -> str:
    """Why base and updates are not one call of the op, or ""."""
    weight = base.weight
    if weight.requires_grad and torch.is_grad_enabled():
        return "the base weight is trained"
    if weight.dtype in HALVES and any(update.bias is not None for update in updates):
        # The op would round the sum of both biases, and sum dy over a float32 copy of it.
        return "a lora_bias on a half base"
    reason = "" if x is None else dtype_obstacle(x, weight, updates[0].lora_a.dtype)
    return reason or obstacle(updates, weight.dtype)


def update_of(layer: Any, name: str) -> Update:
    """What one adapter of a PEFT layer adds."""
    tables = layer._modules
    lora_b = tables["lora_B"]._modules[name]
    dropout = tables["lora_dropout"]._modules[name]
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    lora_a = tables["lora_A"]._modules[name].weight
    return Update(name, lora_a, lora_b.weight, lora_b.bias, layer.scaling[name], p)


def fused(layer: Any, x: Tensor, plan: LinearPlan) -> Tensor:
    """One call of the op."""
    base = layer._modules["base_layer"]
    lora_a, lora_b, scaling = stacked(plan.updates, x)
    bias = with_biases(base.bias, plan.updates)
    dropout_p = plan.updates[0].dropout
    return lora_linear(x, matrix_of(base), lora_a, lora_b, bias, scaling, dropout_p)


def called(layer: Any, x: Tensor, plan: LinearPlan) -> Tensor:
    """The base called as it is, and the updates onto its y."""
    return added(layer._modules["base_layer"](x), x, plan.updates)


def matrix_of(base: Any) -> Tensor:
    """The base's weight as ``[out, in]``."""
    weight = base.weight
    return weight if type(base) is nn.Linear else weight.t()


def path_of(layer: Any, rows: int | None) -> tuple[str, str]:
    """(path, reason) for `explain`, with the kernels that a fused call takes."""
    plan = plan_of(layer, None)
    if plan.path != FUSED:
        return plan.path, plan.reason
    return kernel_path(matrix_of(layer._modules["base_layer"]), plan.updates, rows)
