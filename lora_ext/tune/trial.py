"""Times every route of a shape on a device, and keeps the fastest."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import _C
from ..device import indexed
from ..functional import draw_seed
from .shape import Shape
from .table import Entry, Table, write_table
from .tables import install, load_tables, table_at, table_path, user_folder

LIBRARY = "library"
_DROPOUT = 0.05
_SCALING = 2.0
_ROUNDS = 25
_WARM_UP = 3
# A route takes the library's place if it wins by this much in three rounds of four.
_LEAST_GAIN = 0.01

_forward = torch.ops.lora_ext.lora_linear_forward.default
_backward = torch.ops.lora_ext.lora_linear_backward.default

Times = dict[str, list[float]]  # candidate -> microseconds of each round


@dataclass(frozen=True)
class Candidate:
    """A route, with "kernel" also its tile."""

    route: str
    tile: str = ""

    @property
    def name(self) -> str:
        """As it stands in a table."""
        return f"{self.route} {self.tile}".strip()


def candidates_for(card: _C.Card, shape: Shape, backward: bool) -> list[Candidate]:
    """All that the card can do for a shape; the library first."""
    tiles = _C.tiles_of(
        card, backward=backward, float_adapters=shape.float_adapters, dropout=shape.dropout
    )
    kernels = [Candidate("kernel", tile) for tile in tiles]
    return [Candidate(LIBRARY), Candidate("hybrid"), *kernels]


class Trial:
    """The tensors of one shape on a device, and its forward and backward as the op runs them."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int, to: torch.dtype = dtype, std: float = 1.0) -> Tensor:
            return (torch.randn(*sizes, generator=generator) * std).to(device, to)

        m, k, n, r = shape.rows, shape.in_features, shape.out_features, shape.rank
        adapters = torch.float32 if shape.float_adapters else dtype
        self.shape = shape
        self.device = device
        self.x, self.grad = normal(m, k), normal(m, n)
        self.weight = normal(n, k, std=k**-0.5)
        self.lora_a = normal(r, k, to=adapters, std=k**-0.5)
        self.lora_b = normal(n, r, to=adapters, std=r**-0.5)
        self.dropout_p = _DROPOUT if shape.dropout else 0.0
        self.seed = draw_seed(device) if shape.dropout else None
        self.s = self.forward()[1]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Y and S."""
        operands = (self.x, self.weight, self.lora_a, self.lora_b, None)
        return _forward(*operands, _SCALING, self.dropout_p, self.seed, 0, 0, False, None)

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of x, lora_a and lora_b."""
        operands = (self.grad, self.x, self.weight, self.lora_a, self.lora_b, self.s)
        mask = [True, True, True, False]
        return _backward(*operands, _SCALING, self.dropout_p, self.seed, 0, 0, False, None, mask)

    def plan(self, backward: bool) -> _C.Explained:
        """What the op would do now."""
        explain = _C.explain_backward if backward else _C.explain_forward
        return explain(self.x, self.weight, self.lora_a, self.lora_b, self.dropout_p)


@contextmanager
def _planner_listens(card: _C.Card) -> Iterator[None]:
    """No route set by the user; afterwards the planner knows what the tables on disk say."""
    route = _C.cuda_route()
    _C.set_cuda_route("auto")
    try:
        yield
    finally:
        _C.set_cuda_route(route)
        _C.replace_winners(card.name, [])
        load_tables()


def _request(card: _C.Card, shape: Shape, backward: bool, candidate: Candidate) -> None:
    """Makes the planner take a candidate for the shape."""
    entry = Entry(shape, backward, candidate.route, candidate.tile, {})
    _C.replace_winners(card.name, [entry.winner("in a trial")])


def _runs_as_asked(trial: Trial, backward: bool, candidate: Candidate) -> bool:
    """Whether the call takes the candidate's route; kernels that fail their check do not."""
    explained = trial.plan(backward)
    plan = explained.plan
    if candidate.route == LIBRARY:
        return not plan.kernel
    same = plan.kernel and plan.hybrid == (candidate.route == "hybrid")
    return same and candidate.tile in ("", plan.tile) and explained.check == "passed"


def _timer(device: torch.device) -> Callable[[Callable[[], object]], Callable[[], float]]:
    """times(call) runs it once, and returns how to read its microseconds later.

    On CUDA, everything in the L2 cache is evicted first, as it is in a model's pass between two
    calls of the same layer. That also keeps the device busy while the host prepares the call.
    """
    if device.type != "cuda":

        def on_host(call: Callable[[], object]) -> Callable[[], float]:
            start = time.perf_counter_ns()
            call()
            elapsed = (time.perf_counter_ns() - start) / 1e3
            return lambda: elapsed

        return on_host
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    evicting = torch.empty(size, dtype=torch.uint8, device=device)

    def on_device(call: Callable[[], object]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        evicting.zero_()
        start.record()
        call()
        end.record()
        return lambda: 1e3 * start.elapsed_time(end)

    return on_device


def _times_of(
    trial: Trial, card: _C.Card, backward: bool, candidates: Sequence[Candidate], rounds: int
) -> Times:
    """Microseconds of each candidate that runs here, one a round, in a new order each round."""
    call = trial.backward if backward else trial.forward
    timed = []
    for candidate in candidates:
        _request(card, trial.shape, backward, candidate)
        for _ in range(_WARM_UP):
            call()
        if _runs_as_asked(trial, backward, candidate):
            timed.append(candidate)
    times_call = _timer(trial.device)
    readers: dict[str, list[Callable[[], float]]] = {c.name: [] for c in timed}
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(timed)
        for candidate in timed:
            _request(card, trial.shape, backward, candidate)
            readers[candidate.name].append(times_call(call))
    if trial.device.type == "cuda":
        torch.cuda.synchronize(trial.device)
    return {name: [read() for read in reads] for name, reads in readers.items()}


def _fastest(times: Times) -> str:
    """The winner: the library, unless another is faster by a margin in three rounds of four."""
    best = min(times, key=lambda name: statistics.median(times[name]))
    ratios = sorted(a / b for a, b in zip(times[best], times[LIBRARY], strict=True))
    clearly = ratios[(3 * len(ratios)) // 4] <= 1.0 - _LEAST_GAIN
    return best if clearly else LIBRARY


def _entry(shape: Shape, backward: bool, candidates: Sequence[Candidate], times: Times) -> Entry:
    winner = next(c for c in candidates if c.name == _fastest(times))
    us = {name: _summary(sorted(values)) for name, values in times.items()}
    return Entry(shape, backward, winner.route, winner.tile, us)


def _summary(ordered: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    p25, p75 = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return round(statistics.median(ordered), 3), round(p25, 3), round(p75, 3)


def tune(
    shapes: Sequence[Shape],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    path: Path | None = None,
    rounds: int = _ROUNDS,
    measured: Callable[[Entry], object] = lambda entry: None,
    until: float = float("inf"),
) -> Table:
    """Times every route of each shape, forward and backward apart, and keeps the fastest.

    The library route stays where no other is faster by 1 % in three rounds of four. The file is
    written after each shape, so that an interrupt loses one shape at most. Afterwards the planner
    goes by the table in this process, too.

    Args:
        shapes: what to time, each a few hundredths of a second; see `shapes_of`.
        device: a CUDA device; default: the current one.
        dtype: of x and weight: bfloat16 or float16, which share their entries.
        path: the table's file; default: the user's, in `user_folder()`.
        rounds: times each route is timed.
        measured: called with each new entry.
        until: no further shape begins at this `time.monotonic()`.

    Returns:
        The whole table, with what the file already had for other shapes.

    Raises:
        RuntimeError: the build has no CUDA kernels, or there is no such device.
        TypeError: a dtype that the kernels do not compute.
        OSError: the file cannot be written; what was measured is in use in this process.
    """
    if not _C.with_cuda:
        raise RuntimeError(
            "lora_ext.tune: this build has no CUDA kernels to choose from;"
            " lora_ext.build_info() says why"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"lora_ext.tune: expected bfloat16 or float16, but got {dtype}")
    device = indexed(device)
    card = _C.cuda_card(device)
    path = path or table_path(user_folder(), device)
    table = table_at(path, card.name)
    failed: OSError | None = None
    with _planner_listens(card), torch.no_grad():
        for shape in shapes:
            if time.monotonic() >= until:
                break
            table = table.with_entries(
                _measure(Trial(shape, device, dtype), card, rounds, measured)
            )
            try:
                write_table(table, path)
            except OSError as error:
                failed = error
    install([*load_tables(), table])
    if failed is not None:
        raise failed
    return table


def _measure(
    trial: Trial, card: _C.Card, rounds: int, measured: Callable[[Entry], object]
) -> list[Entry]:
    entries = []
    for backward in (False, True):
        candidates = candidates_for(card, trial.shape, backward)
        times = _times_of(trial, card, backward, candidates, rounds)
        entries.append(_entry(trial.shape, backward, candidates, times))
        measured(entries[-1])
    return entries
