"""Bases in the forms of bitsandbytes: what takes the place of linear layers, and single layers."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.quantized import workspace

from ..markdown import Column, floor_column, ratio_columns, table_of
from ..results import Row
from ..shapes import DROPOUT
from ..timing import Plan, compared
from .calls import Pairs, step_of, with_adapters

FORMS = {"nf4": "NF4, scales quantised", "int8": "LLM.int8"}
_WIDTHS, _ROWS = (1024, 4096), (1, 16, 512, 2048)
_COPIES = 3
_COLUMNS = {"peft": "PEFT", "accelerated": "accelerated"}


def is_available() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantized_linear(weight: Tensor, bias: Tensor | None, form: str) -> nn.Module:
    """A frozen layer of `FORMS` with this weight ``[out, in]``.

    Its products are in the weight's dtype.
    """
    # On each call it says that it rounds x to float16, in eval mode.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    import bitsandbytes

    out_features, in_features = weight.shape
    sizes = (in_features, out_features, bias is not None)
    if form == "nf4":
        words = {"quant_type": "nf4", "compute_dtype": weight.dtype}
        layer = bitsandbytes.nn.Linear4bit(*sizes, **words)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    state = {"weight": weight.detach().contiguous()}
    layer.load_state_dict(state if bias is None else {**state, "bias": bias.detach()})
    if bias is not None:
        layer.bias.data = layer.bias.data.to(weight.dtype)
    return nn.Sequential(layer).to("cpu")[0].requires_grad_(False)


def quantize(model: nn.Module, form: str, is_target: Callable[[str, nn.Module], bool]) -> nn.Module:
    """The model with its targets, nn.Linear and Conv1D, in a form of `FORMS`."""
    targets = [(path, m) for path, m in model.named_modules() if is_target(path, m)]
    for path, module in targets:
        parent, _, name = path.rpartition(".")
        weight: Any = module.weight if isinstance(module, nn.Linear) else module.weight.t()
        bias: Any = module.bias
        setattr(model.get_submodule(parent), name, quantized_linear(weight, bias, form))
    mark(model, form)
    return model


def mark(model: Any, form: str) -> None:
    """By which PEFT knows what it has before it."""
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = form == "nf4", form == "int8"


def _layers(width: int, form: str) -> dict[str, nn.Module]:
    """The base alone, PEFT's layer over it with bfloat16 adapters, and the same accelerated."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        weight = torch.randn(width, width, dtype=torch.bfloat16) / width**0.5
        holder = nn.Sequential(quantized_linear(weight, None, form))
        mark(holder, form)
        return holder

    def adapted() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = with_adapters(base(), "peft", lora_dropout=DROPOUT, target_modules=["0"])
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape).mul(0.02).to(torch.bfloat16)
        return model

    return {"base": base(), "peft": adapted(), "accelerated": lora_ext.accelerate(adapted())}


def measure_layers(plan: Plan, progress: Callable[[str], None]) -> list[Row]:
    """Steps in training mode and forwards in eval mode of single layers, as plain JSON."""
    found = []
    for form, width in itertools.product(FORMS, _WIDTHS):
        for rows in _ROWS:
            progress(f"{form}, {width} x {width}, {rows} rows")
            row: Row = {"id": f"{form}, {width} x {width}", "rows": rows}
            pairs = _inputs(width, rows)
            # In eval bitsandbytes may change its weight for good: each has layers of its own.
            for key, call_of in (("timing", _step_of), ("forward", _forward_of)):
                layers = _layers(width, form)
                calls = {name: call_of(layer, pairs) for name, layer in layers.items()}
                for call in calls.values():
                    call()
                row[key] = compared(calls, plan)
            found.append(row)
    workspace.release()
    return found


def _inputs(width: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(rows, width, generator=generator).to(torch.bfloat16)  # noqa: E731
    return [(draw().requires_grad_(), draw()) for _ in range(_COPIES)]


def _step_of(layer: nn.Module, pairs: Pairs) -> Callable[[], None]:
    return step_of(layer.train(), pairs, layer)


def _forward_of(layer: nn.Module, pairs: Pairs) -> Callable[[], None]:
    rotation = itertools.cycle(pairs)
    layer.eval()

    def forward() -> None:
        with torch.no_grad():
            layer(next(rotation)[0].detach())

    return forward


def table(rows: Sequence[Row]) -> str:
    """Times over the base's, and accelerated over PEFT's."""
    columns: list[Column] = [
        ("layer", lambda row: row["id"]),
        ("rows", lambda row: str(row["rows"])),
    ]
    for key, what in (("timing", "step"), ("forward", "forward in eval")):
        columns.append((f"{what}: base", floor_column("base", key)[1]))
        columns += ratio_columns(_COLUMNS, "base", key)
        columns += ratio_columns({"accelerated": "accelerated / PEFT"}, "peft", key)
    return table_of(rows, columns)
