"""The stages that measure: their items, in order of importance, and what is done with each.

A measured item's row has an `entry` for the report, whose status is the row's.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import lora_ext
from lora_ext.autotune import Shape, read_cache
from lora_ext.device import indexed
from lora_ext.kernels.kernel_checks import check_kernels, every_kernel

from .. import machine, runner
from ..adapters.measure import measure as measure_case
from ..shapes import BACKWARD, FORWARD, Cell
from ..timing import Plan
from ..variants import Unavailable
from . import cases, ceilings, cells, mixture_ways, mixtures, profile, quantized
from .rows import Row

_PLAN = Plan(min_rounds=5, max_rounds=11, seconds=1.2, batch_ms=4.0, max_inner=20, warmup_ms=20.0)
_QUICK_PLAN = replace(_PLAN, min_rounds=3, max_rounds=5, seconds=0.4)

# Three times what the slowest takes: problem, checks, graphs, memory; then torch.compile's minute.
_CELL_S, _COMPILED_S, _MIXTURE_S = 60.0, 150.0, 90.0
_CHECK_S, _SHAPE_S, _CEILINGS_S, _PROFILE_S = 30.0, 30.0, 60.0, 120.0
_DEVICE_S = 60.0

# Packages that stages use where they are installed.
_USED = ("pytest", "hypothesis", "numpy", "peft", "loralib", "transformers", "safetensors")


class Kind(NamedTuple):
    """What is measured alike."""

    items: Callable[[Namespace], dict[str, Any]]
    measure: Callable[[Any, Namespace], Row]
    limit_s: Callable[[Any], float]


def _say(what: str) -> None:
    print(f"  {what}", flush=True)


def _measured(
    every: Callable[[], list[Any]],
    on_cpu: Callable[[list[Any]], list[Any]],
    most_quick: int,
    measure: Callable[..., Row],
    limit_s: Callable[[Any], float],
) -> Kind:
    """Cells, cases or mixtures: small ones without a GPU, the first ones of a quick run."""

    def items(options: Namespace) -> dict[str, Any]:
        chosen = on_cpu(every()) if options.device == "cpu" else every()
        return {one.id: one for one in chosen[: most_quick if options.quick else None]}

    def measured(one: Any, options: Namespace) -> Row:
        plan = (_QUICK_PLAN if options.quick else _PLAN).times(one.effort)
        plan = replace(plan, limit_s=limit_s(one) / 3)
        entry = measure(one, plan, announce=_say)
        status = {"error": "failed"}.get(entry["status"], entry["status"])
        found: Row = {"status": status, "entry": entry}
        if status == "wrong":
            found["error"] = f"disagrees: {entry['disagreements']}"
        return found | ({"error": entry["error"]} if "error" in entry else {})

    return Kind(items, measured, limit_s)


def _cell_s(cell: Cell) -> float:
    return _COMPILED_S if cell.compiled else _CELL_S


def _describe(name: str, options: Namespace) -> Row:
    """What the results are of; an error where the device cannot be used."""
    reason = machine.missing_device(options.device)
    if reason:
        return {"status": "failed", "error": reason}
    absent = [name for name in _USED if importlib.util.find_spec(name) is None]
    return {"machine": machine.describe(options.device), "absent": absent}


def _every_kernel(options: Namespace) -> dict[str, Any]:
    """All that the card can be asked for."""
    if options.device != "cuda":
        raise Unavailable("it needs a GPU")
    return {each.name: each for each in every_kernel(indexed(None))}


def _check(kernel: Any, options: Namespace) -> Row:
    """Its small case beside float64; here, since this process is made to be lost."""
    failed = check_kernels(kernels=[kernel], isolated=False).get(kernel.name, "")
    return {"status": "failed", "error": failed} if failed else {}


def _mixtures() -> list[mixtures.Mixture]:
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("the frozen layers are transformers'")
    return mixtures.mixtures()


def _shapes(options: Namespace) -> dict[str, Any]:
    """Of the headline's layers."""
    if options.device != "cuda":
        raise Unavailable("it needs a GPU")
    chosen = {
        (cell.rows, cell.in_features, cell.out_features, cell.rank, wide, cell.dropout_p > 0)
        for cell in cells.headline_cells()
        for wide in (False, True)
        if cell.mode in (FORWARD, BACKWARD) and cell.group != "call"
    }
    return {" ".join(map(str, shape)): Shape(*shape) for shape in sorted(chosen)}


def _tune(shape: Shape, options: Namespace) -> Row:
    """`lora_ext.warmup`; the file is one for `lora_ext.autotune.load_cache`."""
    path = options.rows.parent / "tuning" / "autotune.json"
    layer = lora_ext.LoRALinear(
        shape.in_features,
        shape.out_features,
        device="meta",  # sizes alone
        dtype=torch.bfloat16,
        r=shape.rank,
        lora_dropout=0.05 if shape.dropout else 0.0,
        adapter_dtype=torch.float32 if shape.float_adapters else torch.bfloat16,
    )
    found = lora_ext.warmup(layer, shape.rows, cache=path)
    if found.note:
        return {"status": "failed", "error": found.note}
    won = [entry.route != "library" for entry in read_cache(path).entries]
    return {"said": f"{sum(won)} of {len(won)} entries are not the library's"}


def _ceilings(name: str, options: Namespace) -> Row:
    found = ceilings.ceilings(options.device)
    return {**found, "said": f"{found['tflops']:.3g} TFLOP/s, {found['dram_gb_s']:.3g} GB/s"}


KINDS = {
    "device": Kind(lambda options: {"machine": "machine"}, _describe, lambda name: _DEVICE_S),
    "checks": Kind(_every_kernel, _check, lambda kernel: _CHECK_S),
    "ceilings": Kind(lambda options: {"all": "all"}, _ceilings, lambda name: _CEILINGS_S),
    "headline": _measured(cells.headline_cells, cells.on_cpu, 14, runner.run_cell, _cell_s),
    "wide": _measured(cells.wide_cells, cells.on_cpu, 14, runner.run_cell, _cell_s),
    "adapters": _measured(cases.many_cases, cases.on_cpu, 6, measure_case, lambda case: _CELL_S),
    "quantized": _measured(
        quantized.quantized_cases,
        quantized.on_cpu,
        2,
        quantized.measure,
        lambda case: _CELL_S,
    ),
    "mixtures": _measured(
        _mixtures,
        mixtures.on_cpu,
        4,
        mixture_ways.measure,
        lambda mixture: _MIXTURE_S,
    ),
    "profile": Kind(profile.items, profile.measure, lambda call: _PROFILE_S),
    "tuning": Kind(_shapes, _tune, lambda shape: _SHAPE_S),
}
