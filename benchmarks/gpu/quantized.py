"""Weights in NF4: every bit of what is dequantised, and times beside a dense base's and others'.

The bits are bitsandbytes' own, or where that is missing those of its formula in torch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext.quantized.devices import has_kernels
from lora_ext.quantized.of_bitsandbytes import FourBitWeight

from .. import runner
from ..adapters.measure import Tensors, checked, conclude
from ..agreement import outputs
from ..problem import Problem, make_problem
from ..results import Row
from ..shapes import FORWARD, STEP, Cell
from ..timing import Plan
from ..variants import Unavailable, Variant, adapted

# Of normal quantiles, as Dettmers et al. 2023 have them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FLOOR = "dense"
LABELS = {FLOOR: FLOOR, "ours": "ours", "peft": "bitsandbytes and PEFT"}
_BLOCK, _SCALE_BLOCK = 64, 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizedCase:
    """A step of a layer with K = N = width, or, as a forward, its weight dequantised alone."""

    mode: str
    rows: int
    width: int
    device: str = "cuda"
    effort: float = 1.0

    @property
    def id(self) -> str:
        rows = f" {self.rows} rows" if self.mode == STEP else ""
        return f"{self.mode} NF4{rows} K=N={self.width}"

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}


def quantized_cases() -> list[QuantizedCase]:
    return [
        QuantizedCase(STEP, 2048, 8192),
        QuantizedCase(FORWARD, 1, 8192),
        QuantizedCase(STEP, 8192, 8192),
        QuantizedCase(FORWARD, 1, 4096),
        *(QuantizedCase(STEP, rows, 4096) for rows in (2048, 8192)),
    ]


def on_cpu(chosen: list[QuantizedCase]) -> list[QuantizedCase]:
    """The same set, small: to try the code without a GPU."""
    return [
        replace(each, rows=min(each.rows, 64), width=each.width // 32, device="cpu")
        for each in chosen
    ]


def in_four_bits(
    shape: tuple[int, ...], k: int, generator: torch.Generator, nested: bool = False
) -> tuple[Tensor, SimpleNamespace]:
    """Random codes of a weight, with scales that are quantised again or not, as bitsandbytes has
    them.

    k: of the products that it is for, which are to be of the size of x
    """
    device, blocks = generator.device, math.prod(shape) // _BLOCK
    drawn = {"generator": generator, "device": device}

    def floats(count: int) -> Tensor:
        return torch.rand(count, **drawn).mul_(2 * k**-0.5)

    def codes(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, **drawn)

    state = SimpleNamespace(shape=shape, dtype=torch.bfloat16, quant_type="nf4", nested=nested)
    state.code, state.blocksize = torch.tensor(NF4, device=device), _BLOCK
    state.absmax, state.offset, state.state2 = floats(blocks), None, None
    if nested:
        second = SimpleNamespace(code=floats(256), absmax=floats(-(-blocks // _SCALE_BLOCK)))
        second.blocksize, second.dtype, second.nested = _SCALE_BLOCK, torch.float32, False
        state.absmax, state.offset, state.state2 = codes(blocks), floats(1)[0], second
    return codes(math.prod(shape) // 2), state


def by_formula(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """The table, times the scales: a product and a sum, each rounded."""
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], 1).flatten().long()
    scale, nested = weight.codes.scale, weight.codes.nested
    if nested is not None:
        factor = nested.scale.repeat_interleave(_SCALE_BLOCK)[: scale.numel()]
        scale = nested.table[scale.long()] * factor
        scale = scale + nested.offset
    values = weight.codes.table[codes].view(-1, _BLOCK) * scale[:, None]
    return values.view(weight.shape).to(dtype)


def by_library(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """As bitsandbytes' own kernels write it.

    Raises:
        Unavailable: it is missing, or cannot on this device.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    try:
        importlib.import_module("bitsandbytes")  # whose op it is
        weight.codes.write_by_library(out)
    except Exception as error:  # whatever a library raises that was not built for this card
        raise Unavailable(f"bitsandbytes: {runner.text_of(error)}") from error
    return out


def _weight(width: int, device: str, nested: bool = True) -> FourBitWeight:
    generator = torch.Generator(device).manual_seed(width)
    return FourBitWeight(*in_four_bits((width, width), width, generator, nested))


def differing(width: int, device: str) -> list[str]:
    """Weights of which a bit differs."""
    found = []
    for nested in (False, True):
        weight = _weight(width, device, nested)
        for dtype in _DTYPES:
            try:
                name, expected = "bitsandbytes", by_library(weight, dtype)
            except Unavailable:
                name, expected = "the formula", by_formula(weight, dtype)
            count = int((weight.dequantize(dtype) != expected).sum())
            if count:
                found.append(f"{dtype}, nested {nested}: {count} values differ from {name}")
    return found


class _FrozenProduct(torch.autograd.Function):
    """x W^T as bitsandbytes multiplies: dequantised in each direction, nothing kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: FourBitWeight) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return F.linear(x, by_library(weight, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.matmul(by_library(ctx.weight, ctx.dtype)), None


def _by_peft(x: Tensor, weight: FourBitWeight, a: Tensor, b: Tensor, bias: None, s: float):
    return _FrozenProduct.apply(x, weight) + F.linear(F.linear(x, a), b) * s


def _ways(mode: str, problem: Problem, weight: FourBitWeight) -> dict[str, Callable[[], Variant]]:
    from lora_ext import lora_linear

    if mode == STEP:
        return {
            FLOOR: lambda: adapted(lora_linear, problem),
            "ours": lambda: adapted(lora_linear, problem, weight=weight),
            "peft": lambda: adapted(_by_peft, problem, weight=weight),
        }
    dense, out = problem.weight, torch.empty_like(problem.weight)
    return {
        FLOOR: lambda: Variant(lambda x: out.copy_(dense)),
        "ours": lambda: Variant(lambda x: weight.dequantize(dense.dtype, out)),
        "peft": lambda: Variant(lambda x: by_library(weight, dense.dtype)),
    }


def measure(case: QuantizedCase, plan: Plan, announce: runner.Announce = lambda what: None) -> Row:
    """As adapters.measure.measure; what is right is the dense weight, which the formula gives."""
    row: Row = {"case": case.as_dict(), "status": "ok"}
    row |= {"errors": {}, "notes": {}, "disagreements": {}}
    device, width = case.device, case.width
    if not has_kernels(torch.empty(0, device=device).device):
        return row | {"status": "error", "error": f"this build's kernels do not run on {device}"}
    cell = Cell(case.mode, "bfloat16", case.rows, width, width, bias=False, device=device)
    problem, weight = make_problem(cell), _weight(width, device)
    problem.weight = by_formula(weight, problem.dtype)
    builders = _ways(case.mode, problem, weight)
    expected = outputs(builders[FLOOR](), problem, case.mode)
    expected = {name: found.clone() for name, found in expected.items()}

    def made(name: str) -> tuple[Variant, Tensors, Tensors]:
        way = builders[name]()
        return way, outputs(way, problem, case.mode), expected

    ways = checked(list(builders), made, row, announce)
    announce("bits")
    if wrong := differing(width, device):
        row["disagreements"]["ours"] = wrong
    means = runner.means_for(device)
    runner.time_in_turn(case.mode, problem, ways, means, plan, row, announce)
    return conclude(row, ("ours",), FLOOR)
