"""bitsandbytes' 4-bit layers that train on a CPU after an evaluation.

A forward in eval mode on a CPU with AVX512_BF16 lays a `Linear4bit`'s weight out in panels, for a
product that has no gradient for x; nothing puts it back for training, and scales are rounded to
bfloat16. A hook on each layer puts both back.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

# What the panels' order replaces in a QuantState.
_SCALES = ("absmax", "nested", "offset", "state2")


def before_forward(layer: Any, args: tuple) -> None:
    """The hook: a forward that trains, or needs a gradient of x, reads the weight as quantised."""
    weight = layer._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    if state is None or not getattr(state, "packing_format_for_cpu", False):
        if state is not None and not layer.training:
            state.before_panels = {name: getattr(state, name, None) for name in _SCALES}
        return
    needs_gradient = torch.is_grad_enabled() and getattr(args[0], "requires_grad", False)
    if layer.training or needs_gradient:
        from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
            _convert_weight_packed_for_cpu_inverse,
        )

        found = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        weight.data, weight.quant_state = found
        for name, value in getattr(state, "before_panels", {}).items():
            setattr(weight.quant_state, name, value)
        layer.quant_state = weight.quant_state


def put_back_for_training(model: nn.Module, remove: bool = False) -> None:
    """Sets the hook, once, on all 4-bit layers of a model, with adapters or without."""
    library: Any = sys.modules.get("bitsandbytes.nn")  # there is no such layer before its import
    if library is None:
        return
    for layer in model.modules():
        if not isinstance(layer, library.Linear4bit):
            continue
        hooks = layer._forward_pre_hooks
        found = [key for key, hook in hooks.items() if hook is before_forward]
        if remove:
            for key in found:
                del hooks[key]
        elif not found:
            layer.register_forward_pre_hook(before_forward)


def has_others(hooks: Any) -> bool:
    """Whether a layer's hooks before forward are more than this one."""
    return any(hook is not before_forward for hook in hooks.values())
