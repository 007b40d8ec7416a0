"""`python -m benchmarks.gpu.pool_stress`: a pool's captured graph stays right while it is changed.

The graph is captured while the pool is empty. Before each replay an adapter is added, replaced,
removed or written to, or rows are given to others; each replay is compared with a loop over the
adapters that are there, in float32.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_ext
from lora_ext import AdapterPool, LoraConfig, lora_linear

from ..agreement import TOLERANCE, error_of
from ..cuda_timing import captured
from .command_line import conclude, device_of

_CAPACITY, _MAX_RANK = 8, 16
_REPLAYS = {"cuda": 200, "cpu": 40}
# Rows, K, N: of a decoding batch, and of a training one.
_SIZES = {"cuda": [(32, 2048, 2048), (1000, 1024, 2048)], "cpu": [(12, 24, 40)]}
_DTYPES = (torch.bfloat16, torch.float32)  # of the factors
# The library route reads an index on the host: it cannot be captured.
_ROUTES = {"cuda": ("kernel", "hybrid"), "cpu": ("",)}


@dataclass
class Served:
    """A pool over two layers that read the same x, and what a graph of them reads and writes."""

    pool: AdapterPool
    x: Tensor  # [M, K]
    index: Tensor  # int32 [M], slots; -1 and free ones have the base alone
    outputs: dict[str, Tensor] = field(default_factory=dict)  # path -> [M, N]

    def forward(self) -> None:
        """What a pool's layers compute."""
        for path, layer in self.pool.layers.items():
            lora_a, lora_b, scaling, ranks = layer.pool.updates
            words = {"index": self.index, "ranks": ranks}
            operands = (self.x, layer.weight, lora_a, lora_b, layer.bias, scaling)
            self.outputs[path] = lora_linear(*operands, **words)

    def loop(self) -> dict[str, Tensor]:
        """The same in torch's products, one adapter after the other."""
        found = {}
        for path, layer in self.pool.layers.items():
            bias = None if layer.bias is None else layer.bias.float()
            y = F.linear(self.x.float(), layer.weight.float(), bias)
            for name, spec in ((n, self.pool.specs(n).get(path)) for n in self.pool):
                if spec is not None:
                    tensors = self.pool.tensors(name)
                    a, b = (tensors[f"{path}.{key}"].float() for key in ("lora_a", "lora_b"))
                    own = (self.index == self.pool.slot(name))[:, None]
                    y += own * spec.scaling * (self.x.float() @ a.t() @ b.t())
            found[path] = y
        return found


def served(device: str, sizes: Sequence[int], dtype: torch.dtype) -> Served:
    """An empty pool on bfloat16 layers."""
    rows, k, n = sizes
    model = nn.ModuleDict({"first": nn.Linear(k, n), "second": nn.Linear(k, n // 2, bias=False)})
    pool = AdapterPool(model.to(device, torch.bfloat16), _CAPACITY, _MAX_RANK, adapter_dtype=dtype)
    x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
    return Served(pool, x, _slots(rows).to(device))


def _slots(rows: int) -> Tensor:
    return torch.randint(-1, _CAPACITY, (rows,), dtype=torch.int32)


def change(one: Served, dice: random.Random) -> str:
    """Makes one change; returns what it was."""
    pool = one.pool
    possible = ["rows"] if len(pool) == _CAPACITY else ["rows", "add"]
    what = dice.choice([*possible, *(["replace", "write", "remove"] if len(pool) else [])])
    if what == "rows":
        one.index.copy_(_slots(len(one.index)))
        return what
    if what == "add":
        name = next(each for each in map(str, range(_CAPACITY)) if each not in pool)
    else:
        name = dice.choice(pool.names)
    if what == "remove":
        pool.delete_adapter(name)
        return f"{what} {name}"
    if what != "write":
        paths = dice.choice([["first"], ["second"], ["first", "second"]])
        config = LoraConfig(paths, r=dice.randint(1, _MAX_RANK), lora_alpha=dice.randint(1, 20))
        getattr(pool, f"{what}_adapter")(name, config)
    for parameter in pool.parameters(name):
        parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return f"{what} {name}"


@torch.no_grad()
def differing(device: str, sizes: Sequence[int], dtype: torch.dtype, count: int) -> list[str]:
    """What of so many replays (calls, without CUDA) is not the loop's, and after which change."""
    torch.manual_seed(0)
    dice = random.Random(0)
    one = served(device, sizes, dtype)
    again = captured(lambda: one.forward) if device == "cuda" else one.forward
    wrong = []
    for turn in range(count):
        what = change(one, dice)
        # Memory that is freed and used again: what the graph reads must be the graph's own.
        scratch = torch.full((1 << (10 + turn % 8),), float("nan"), device=device)
        del scratch
        again()
        for path, expected in one.loop().items():
            error = error_of(one.outputs[path], expected)
            if not error.within(TOLERANCE[torch.bfloat16]):
                wrong.append(f"replay {turn}, {path}, after {what}: rms error {error.rms:.1e}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a replay differs from the loop."""
    device = device_of("pool_stress", __doc__, arguments)
    wrong, total = [], 0
    for route in _ROUTES[device]:
        if route:
            lora_ext.kernels.set_cuda_route(route)
        for sizes in _SIZES[device]:
            for dtype in _DTYPES:
                print(f"{route or 'cpu'} {sizes}, factors of {dtype} ...", flush=True)
                wrong += differing(device, sizes, dtype, _REPLAYS[device])
                total += 2 * _REPLAYS[device]  # each of two layers
    said = f"{len(wrong)} of {total} outputs of replays differ from a loop over the adapters"
    return conclude(wrong, said)


if __name__ == "__main__":
    sys.exit(main())
