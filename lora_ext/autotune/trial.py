"""Times every route of one shape on a device, and finds the fastest."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import lora_ext._C as _C

from ..measure import fastest, interleaved_us
from .cache_file import Entry
from .shape import Shape

LIBRARY = "library"
_DROPOUT = 0.05
_SCALING = 2.0
# A route is preferred to the library if it takes at most this part of its time.
_MOST_TIME = 0.99

_forward = torch.ops.lora_ext.lora_forward.default
_backward = torch.ops.lora_ext.lora_backward.default


def candidates_for(card: _C.Card, shape: Shape, backward: bool) -> list[Entry]:
    """All routes and tiles that the card supports for a shape, without times; the library first."""
    tiles = _C.tiles_of(
        card, backward=backward, float_adapters=shape.float_adapters, dropout=shape.dropout
    )
    ways = [(LIBRARY, ""), ("hybrid", ""), *(("kernel", tile) for tile in tiles)]
    return [Entry(shape, backward, route, tile, {}) for route, tile in ways]


def kernels_for(card: _C.Card, shapes: Iterable[Shape], dtype: torch.dtype) -> list[_C.Kernels]:
    """The kernels that calls of these shapes can use, with any route and tile, each once."""
    found: dict[str, _C.Kernels] = {}
    for shape in shapes:
        problem = shape.problem
        problem.dtype = dtype
        for backward in (False, True):
            for candidate in candidates_for(card, shape, backward):
                plan = _C.plan_as_asked(
                    card,
                    problem,
                    backward=backward,
                    choice=candidate.route,
                    tile=candidate.tile,
                    use_pdl=_C.use_pdl(),
                )
                if plan.kernel:
                    each = _C.kernels_of(plan, problem, backward=backward)
                    found.setdefault(each.name, each)
    return list(found.values())


class Trial:
    """The tensors of one shape on a device, and its forward and backward as the op runs them."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int, to: torch.dtype = dtype, std: float = 1.0) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device).mul_(std).to(to)

        m, k, n, r = shape.rows, shape.in_features, shape.out_features, shape.rank
        adapters = torch.float32 if shape.float_adapters else dtype
        self.shape, self.device = shape, device
        self.x, self.grad = normal(m, k), normal(m, n)
        self.weight = normal(n, k, std=k**-0.5)
        self.lora_a = normal(r, k, to=adapters, std=k**-0.5)
        self.lora_b = normal(n, r, to=adapters, std=r**-0.5)
        self.dropout_p = _DROPOUT if shape.dropout else 0.0
        seed = torch.tensor(7, device=device) if shape.dropout else None
        dropout = (None, self.dropout_p, seed)
        self._operands = (self.x, self.weight, None, self.lora_a, self.lora_b, _SCALING, *dropout)
        self.s = _forward(*self._operands)[1]

    def run(self, backward: bool) -> object:
        """Runs one direction: (y, s), or the gradients of x, lora_a and lora_b."""
        if not backward:
            return _forward(*self._operands)
        return _backward(self.grad, self.s, [True, True, True, False], *self._operands)

    def explained(self, backward: bool) -> _C.Explained:
        """The plan that the op would use now."""
        explain = _C.explain_backward if backward else _C.explain_forward
        return explain(self.x, self.weight, self.lora_a, self.lora_b, self.dropout_p)


@contextmanager
def route_by_planner() -> Iterator[None]:
    """Within the block no route is set by the user; afterwards the caller gives the planner its
    entries again."""
    route = _C.cuda_route()
    _C.set_cuda_route("auto")
    try:
        yield
    finally:
        _C.set_cuda_route(route)


def _request(card: _C.Card, candidate: Entry) -> None:
    """Makes the planner choose a candidate for its shape."""
    _C.replace_autotune_cache(card.name, [candidate.for_planner("in a trial")])


def _runs_as_asked(explained: _C.Explained, candidate: Entry) -> bool:
    """Whether the call uses the candidate's route; it does not if the kernels fail their check."""
    plan = explained.plan
    if candidate.route == LIBRARY:
        return not plan.kernel
    same = plan.kernel and plan.hybrid == (candidate.route == "hybrid")
    return same and candidate.tile in ("", plan.tile) and explained.check == "passed"


def measure(trial: Trial, card: _C.Card, backward: bool) -> Entry:
    """Times every route of one direction, in a new order in each round.

    The library wins unless another is faster by 1 % in three rounds of four. Kernels that fail
    their check are not timed. Call it under `route_by_planner`.
    """
    run, timed = partial(trial.run, backward), {}
    for candidate in candidates_for(card, trial.shape, backward):
        _request(card, candidate)
        run()
        if _runs_as_asked(trial.explained(backward), candidate):
            timed[candidate.name] = candidate
    calls = dict.fromkeys(timed, run)
    times = interleaved_us(calls, trial.device, lambda name: _request(card, timed[name]), True)
    us = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return replace(timed[fastest(times, LIBRARY, _MOST_TIME)[0]], us=us)
