"""`python -m benchmarks.gpu.decode`: few rows on the card, right and how fast.

First results of 1 to 64 rows beside float64, of one adapter and of one for each row, and their bits
again in replays of a graph. Then times of graphs' replays: of the base product alone, of the layer
by the kernel that reads the weight once (`lora_decode`), by the library route, and as PEFT has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_ext

from ..cuda_timing import captured
from ..timing import Function
from .command_line import conclude, device_of, medians_ms

_RANK, _SCALING = 16, 2.0
# Rows, K, N of what is compared; and K = N, rows of what is timed.
_COMPARED = {
    "cuda": [(m, 1096, 2056) for m in (1, 3, 8, 9, 16, 31, 64)] + [(8, 4096, 4096)],
    "cpu": [(1, 72, 96), (9, 96, 72)],
}
_TIMED = {"cuda": [(w, m) for w in (4096, 8192) for m in (1, 8, 64)], "cpu": [(128, 4)]}
_REPLAYS = {"cuda": 200, "cpu": 3}


@dataclass(frozen=True)
class Problem:
    """Operands of a forward: a pool of adapters, of which all rows have the first, or each its own
    and every fifth none."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor  # [G, r, K]
    lora_b: Tensor  # [G, N, r]
    index: Tensor

    def one(self) -> Tensor:
        return lora_ext.lora_linear(
            self.x, self.weight, self.lora_a[0], self.lora_b[0], scaling=_SCALING
        )

    def each(self) -> Tensor:
        return lora_ext.lora_linear(
            self.x, self.weight, self.lora_a, self.lora_b, scaling=_SCALING, index=self.index
        )

    def peft(self) -> Tensor:
        base = F.linear(self.x, self.weight)
        a, b = self.lora_a[0].to(self.x.dtype), self.lora_b[0].to(self.x.dtype)
        return base + F.linear(F.linear(self.x, a), b) * _SCALING

    def expected(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """In float64, and the size of the products that each element sums."""
        x, weight = self.x.double(), self.weight.double()
        y, size = F.linear(x, weight), F.linear(x.abs(), weight.abs())
        for row, adapter in enumerate(index.tolist()):
            if adapter < 0:
                continue
            a, b = self.lora_a[adapter].double(), self.lora_b[adapter].double()
            y[row] += F.linear(F.linear(x[row], a), b) * _SCALING
            size[row] += F.linear(F.linear(x[row].abs(), a.abs()), b.abs()) * _SCALING
        return y, size


def problem(
    rows: int, k: int, n: int, device: str, dtype: torch.dtype, adapters: torch.dtype
) -> Problem:
    generator = torch.Generator().manual_seed(rows + k)

    def normal(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.1).to(device, to)

    pool = max(2, rows)
    index = torch.arange(rows, dtype=torch.int32)
    index[4::5] = -1
    return Problem(
        normal(rows, k, to=dtype),
        normal(n, k, to=dtype),
        normal(pool, _RANK, k, to=adapters),
        normal(pool, n, _RANK, to=adapters),
        index.to(device),
    )


def compared(device: str) -> Iterator[tuple[str, Callable[[], Tensor], Tensor, Tensor]]:
    """A name, a call, and what it must come to, within what."""
    for rows, k, n in _COMPARED[device]:
        for dtype in (torch.bfloat16, torch.float16):
            for adapters in (dtype, torch.float32):
                made = problem(rows, k, n, device, dtype, adapters)
                unit = torch.finfo(dtype).eps
                first = torch.zeros_like(made.index)
                calls = (("one adapter", made.one, first), ("one each", made.each, made.index))
                for how, call, index in calls:
                    expected, size = made.expected(index)
                    # One rounding of Y; T's, of some of the products; float32 sums.
                    allowed = unit * expected.abs() + (unit / 4 + k * 2.0**-22) * size
                    yield f"{rows} rows {dtype} {adapters} {how}", call, expected, allowed


def wrong(device: str) -> list[str]:
    """Calls that are off, or whose bits another call, or a replay, does not repeat."""
    found = []
    for name, call, expected, allowed in compared(device):
        y = call()
        off = (y.double() - expected).abs() > allowed
        if bool(off.any()):
            found.append(f"{name}: {int(off.sum())} of {off.numel()} elements are off")
            continue
        results = [y]

        def keep(call: Callable[[], Tensor] = call, results: list[Tensor] = results) -> None:
            results[0] = call()

        again = captured(lambda keep=keep: keep) if device == "cuda" else keep
        first = y.clone()
        for _ in range(_REPLAYS[device]):
            again()
            if not torch.equal(results[0], first):
                found.append(f"{name}: a replay has other bits")
                break
    return found


def functions(made: Problem) -> dict[str, Function]:
    """What is timed, by name; routes are chosen when a call is made or captured."""

    def on(route: str, call: Callable[[], Tensor]) -> Function:
        def run() -> None:
            if not lora_ext.build_info()["cuda"]:
                call()
                return
            lora_ext.kernels.set_cuda_route(route)
            try:
                call()
            finally:
                lora_ext.kernels.set_cuda_route("auto")

        return run

    return {
        "base alone": lambda: F.linear(made.x, made.weight),
        "one adapter": on("kernel", made.one),
        "one each": on("kernel", made.each),
        "library route": on("library", made.one),
        "PEFT": lambda: made.peft(),
    }


def timed(device: str) -> str:
    """Prints medians over the base product alone, and returns the last line."""
    said = ""
    for width, rows in _TIMED[device]:
        made = problem(rows, width, width, device, torch.bfloat16, torch.bfloat16)
        every = functions(made)
        for function in every.values():
            function()
        if device == "cuda":
            every = {
                name: captured(lambda function=function: function)
                for name, function in every.items()
            }
        others = medians_ms(every, device, 20)
        base = others.pop("base alone")
        cells = [f"base alone {1e3 * base:.1f} us"]
        cells += [f"{name} {ms / base:.2f}" for name, ms in others.items()]
        said = f"K=N={width}, {rows} rows: {', '.join(cells)}"
        print(said, flush=True)
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a result is off or its bits are not repeated."""
    device = device_of("decode", __doc__, arguments)
    if device == "cuda":
        lora_ext.kernels.set_cuda_route("kernel")
    found = wrong(device)
    if device == "cuda":
        lora_ext.kernels.set_cuda_route("auto")
    times = timed(device)
    count = 8 * len(_COMPARED[device])
    return conclude(found, f"{len(found)} of {count} calls of few rows are wrong; {times}")


if __name__ == "__main__":
    sys.exit(main())
