"""What one call of a LoRA layer costs beside its products: Python and dispatch, on tiny tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lora_ext

from ..timing import Plan, compared

_ROWS, _WIDTH, _RANK = 2, 8, 2


def measure(plan: Plan) -> dict[str, Any]:
    """Milliseconds of a forward by PEFT's layer, the accelerated one, and the ops of each alone."""
    import peft

    result: dict[str, Any] = {}
    for dropout in (0.0, 0.05):
        config = peft.LoraConfig(r=_RANK, lora_dropout=dropout, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(_WIDTH, _WIDTH)), config)
        theirs = model.base_model.model[0]
        ours = lora_ext.accelerate(copy.deepcopy(model)).base_model.model[0]
        x = torch.randn(_ROWS, _WIDTH)
        a, b = (table["default"].weight for table in (theirs.lora_A, theirs.lora_B))
        weight, bias = theirs.base_layer.weight, theirs.base_layer.bias

        def bare_peft(x=x, a=a, b=b, weight=weight, bias=bias, dropout=dropout) -> None:
            dropped = F.dropout(x, dropout) if dropout else x
            _ = F.linear(x, weight, bias) + F.linear(F.linear(dropped, a), b) * 1.0

        def bare_ours(x=x, a=a, b=b, weight=weight, bias=bias, dropout=dropout) -> None:
            lora_ext.lora_linear(x, weight, a, b, bias, 1.0, dropout)

        functions: dict[str, Callable[[], Any]] = {
            "peft": lambda layer=theirs, x=x: layer(x),
            "accelerated": lambda layer=ours, x=x: layer(x),
            "peft's ops": bare_peft,
            "our op": bare_ours,
        }
        result[f"{dropout:g}"] = compared(functions, plan)
    return result


def overheads(times: dict[str, Any]) -> tuple[float, float]:
    """(PEFT's, ours) in microseconds: a call less the ops that it makes."""
    us = {name: 1000 * summary["ms"] for name, summary in times.items()}
    return us["peft"] - us["peft's ops"], us["accelerated"] - us["our op"]
