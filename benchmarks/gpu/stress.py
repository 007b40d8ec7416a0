"""`python -m benchmarks.gpu.stress`: the same bits, from replays and from streams side by side.

Each worker has inputs of its own and allocates and frees memory between its steps, so that an
intermediate that is read after its memory went to another stream would show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

import lora_ext

from ..cuda_timing import captured
from .command_line import device_of

_WORKERS = 4
_STEPS = {"cuda": 100, "cpu": 10}
_REPLAYS = {"cuda": 1000, "cpu": 20}
# Rows, K, N, r. Rank 16 has dS of the one pass over dY; rank 40, on Hopper, S and dS of the large
# products' own grids.
_SIZES = {"cuda": [(1024, 1024, 2048, 16), (4096, 2048, 2048, 40)], "cpu": [(48, 64, 96, 8)]}

# Of y, dx, dlora_a, dlora_b: what comes of our kernels alone. torch's products may choose their
# split by the stream's workspace, and owe nobody equal bits.
OURS = {"": range(4), "kernel": range(4), "hybrid": range(2, 4), "library": range(0)}

ROUTES = {"cuda": ("kernel", "hybrid", "library"), "cpu": ("",)}

Step = Callable[[], tuple[Tensor, ...]]


def step_of(device: str, seed: int, sizes: Sequence[int]) -> Step:
    """A training step on tensors of its own, of M, K, N, r; returns y and the gradients."""
    generator = torch.Generator().manual_seed(seed)
    rows, k, n, rank = sizes

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, torch.bfloat16)

    x, weight = normal(rows, k).requires_grad_(), normal(n, k)
    leaves = (x, normal(rank, k).requires_grad_(), normal(n, rank).requires_grad_())
    grad = normal(rows, n)

    def step() -> tuple[Tensor, ...]:
        y = lora_ext.lora_linear(leaves[0], weight, leaves[1], leaves[2], None, 2.0)
        return (y.detach(), *torch.autograd.grad(y, leaves, grad))

    return step


def chosen_of(
    make: Callable[[str, int], Step], places: Sequence[int], device: str, seed: int
) -> Step:
    """A step that returns some of its tensors."""
    step = make(device, seed)

    def chosen() -> tuple[Tensor, ...]:
        found = step()
        return tuple(found[place] for place in places)

    return chosen


def differing(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether any two tensors differ in a bit."""
    return not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def replays(device: str, count: int, make: Callable[[str, int], Step]) -> int:
    """How many of so many replays of one step (calls, without CUDA) give other bits."""
    step = make(device, 0)
    expected = [t.clone() for t in step()]
    results: list[tuple[Tensor, ...]] = [()]

    def keep() -> None:
        results[0] = step()

    again = captured(lambda: keep) if device == "cuda" else keep
    wrong = 0
    for _ in range(count):
        again()
        wrong += differing(results[0], expected)
    return wrong


def side_by_side(device: str, count: int, make: Callable[[str, int], Step]) -> int:
    """How many steps give other bits than alone, of so many in each of a few threads."""
    steps = [make(device, seed) for seed in range(_WORKERS)]
    expected = [[t.clone() for t in step()] for step in steps]

    def work(number: int) -> int:
        wrong = 0
        stream = torch.cuda.Stream() if device == "cuda" else None
        with torch.cuda.stream(stream):
            for turn in range(count):
                scratch = torch.full((1 << (10 + turn % 8),), float("nan"), device=device)
                del scratch
                wrong += differing(steps[number](), expected[number])
        return wrong

    if device == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(_WORKERS) as pool:
        return sum(pool.map(work, range(_WORKERS)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a bit differs."""
    device = device_of("stress", __doc__, arguments)
    wrong = 0
    cases = [(route, sizes) for route in ROUTES[device] for sizes in _SIZES[device]]
    for route, sizes in cases:
        print(f"{route or 'cpu'} {sizes} ...", flush=True)
        if route:
            lora_ext.kernels.set_cuda_route(route)
        make = partial(chosen_of, partial(step_of, sizes=sizes), OURS[route] or range(4))
        found = (
            replays(device, _REPLAYS[device], make),
            side_by_side(device, _STEPS[device], make),
        )
        text = f"{found[0]} replays, {found[1]} steps side by side differ"
        if OURS[route]:
            wrong += sum(found)
        else:
            text += " (for information: none of our kernels)"
        print(text, flush=True)
    total = sum(bool(OURS[route]) for route, _ in cases)
    total *= _REPLAYS[device] + _WORKERS * _STEPS[device]
    print(f"{wrong} of {total} differ from the first in a bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
