"""`python -m benchmarks.gpu.quantized`: weights in 4 bits on the card, right and how fast.

First every bit of what the kernel writes, beside bitsandbytes' own, or where that is missing beside
its formula in torch. Then times: of dequantising alone, and of a step, forward and backward, of the
layer on a dense base, on an NF4 base, and as bitsandbytes and PEFT compute it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_ext
from lora_ext.quantized.devices import has_kernels
from lora_ext.quantized.of_bitsandbytes import FourBitWeight

from ..timing import Function
from .command_line import conclude, device_of, medians_ms

# Of normal quantiles, as Dettmers et al. 2023 have them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BLOCK, _SCALE_BLOCK, _RANK, _SCALING = 64, 256, 16, 2.0
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, K of what is compared; K = N and rows of what is timed.
_COMPARED = {"cuda": [(4096, 4096), (14336, 4096), (333, 64)], "cpu": [(96, 128), (33, 64)]}
_TIMED = {
    "cuda": [(8192, 2048), (8192, 8192), (4096, 2048), (4096, 8192)],
    "cpu": [(256, 64)],
}


def quantized(n: int, k: int, device: str, nested: bool) -> FourBitWeight:
    """A weight of random codes, with scales that are quantised again or not."""
    generator = torch.Generator().manual_seed(n + k)
    blocks = n * k // _BLOCK

    def floats(count: int) -> Tensor:
        return torch.rand(count, generator=generator).to(device)

    def codes(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), generator=generator).to(torch.uint8).to(device)

    state = SimpleNamespace(shape=(n, k), dtype=torch.bfloat16, quant_type="nf4", nested=nested)
    state.code, state.blocksize = torch.tensor(NF4, device=device), _BLOCK
    state.absmax, state.offset, state.state2 = floats(blocks), None, None
    if nested:
        second = SimpleNamespace(code=floats(256), absmax=floats(-(-blocks // _SCALE_BLOCK)))
        second.blocksize, second.dtype, second.nested = _SCALE_BLOCK, torch.float32, False
        state.absmax, state.offset, state.state2 = codes(blocks), floats(1)[0], second
    return FourBitWeight(codes(n * k // 2), state)


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
    """As bitsandbytes' own kernels write it."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    importlib.import_module("bitsandbytes")  # whose op it is
    weight.codes.write_by_library(out)
    return out


Dequantize = Callable[[FourBitWeight, torch.dtype], Tensor]


def reference(device: str) -> tuple[str, Dequantize]:
    """What to compare with, and its name: bitsandbytes if it is there and works on the device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        print("bitsandbytes is missing: compared with its formula, not timed")
        return "the formula", by_formula
    try:
        by_library(quantized(64, 64, device, nested=True), torch.bfloat16)
    except Exception as error:  # whatever a library raises that was not built for this card
        why = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        print(f"bitsandbytes cannot write it here ({why}): compared with its formula, not timed")
        return "the formula", by_formula
    return "bitsandbytes", by_library


def differing(device: str, expected_by: Dequantize) -> list[str]:
    """Weights of which a bit differs."""
    found = []
    for n, k in _COMPARED[device]:
        for nested in (False, True):
            weight = quantized(n, k, device, nested)
            for dtype in _DTYPES:
                got, expected = weight.dequantize(dtype), expected_by(weight, dtype)
                if not torch.equal(got, expected):
                    count = int((got != expected).sum())
                    found.append(f"[{n}, {k}] {dtype}, nested {nested}: {count} values differ")
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


@dataclass(frozen=True)
class Problem:
    """Operands of a step, bfloat16."""

    x: Tensor
    grad: Tensor
    weight: FourBitWeight
    lora_a: Tensor
    lora_b: Tensor

    def step(self, forward: Callable[[], Tensor]) -> Function:
        def run() -> None:
            for leaf in (self.x, self.lora_a, self.lora_b):
                leaf.grad = None
            forward().backward(self.grad)

        return run

    def by_peft(self) -> Tensor:
        base = _FrozenProduct.apply(self.x, self.weight)
        return base + F.linear(F.linear(self.x, self.lora_a), self.lora_b) * _SCALING


def problem(width: int, rows: int, device: str) -> Problem:
    def made(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * 0.02).to(torch.bfloat16)

    x, a, b = (made(*s).requires_grad_() for s in ((rows, width), (_RANK, width), (width, _RANK)))
    return Problem(x, made(rows, width), quantized(width, width, device, nested=True), a, b)


def functions(width: int, rows: int, device: str, library: bool) -> dict[str, Function]:
    """What is timed, by name."""
    one = problem(width, rows, device)
    factors = (one.lora_a, one.lora_b)
    dense = one.weight.dequantize(torch.bfloat16)
    out = torch.empty_like(dense)
    found: dict[str, Function] = {
        "dequantise": lambda: one.weight.dequantize(torch.bfloat16, out),
        "step, dense": one.step(
            lambda: lora_ext.lora_linear(one.x, dense, *factors, scaling=_SCALING)
        ),
        "step, NF4": one.step(
            lambda: lora_ext.lora_linear(one.x, one.weight, *factors, scaling=_SCALING)
        ),
    }
    if library:
        found["dequantise by bitsandbytes"] = lambda: by_library(one.weight, torch.bfloat16)
        found["step, bitsandbytes and PEFT"] = one.step(one.by_peft)
    return found


def timed(device: str, library: bool) -> str:
    """Prints medians, and returns the last line; at one size calls take turns."""
    said = ""
    for width, rows in _TIMED[device]:
        every = functions(width, rows, device, library)
        for function in every.values():
            function()
        times = medians_ms(every, device, 3)
        cells = [f"{name} {1e3 * ms:.0f} us" for name, ms in times.items()]
        said = f"K=N={width}, {rows} rows: {', '.join(cells)}"
        print(said, flush=True)
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a bit differs."""
    device = device_of("quantized", __doc__, arguments)
    there = torch.device(f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device)
    if not has_kernels(there):
        print(f"this build's kernels do not run on {there}")
        return 1
    name, expected_by = reference(device)
    wrong = differing(device, expected_by)
    times = timed(device, expected_by is by_library)
    count = 2 * len(_DTYPES) * len(_COMPARED[device])
    return conclude(wrong, f"{len(wrong)} of {count} weights in NF4 differ from {name}; {times}")


if __name__ == "__main__":
    sys.exit(main())
