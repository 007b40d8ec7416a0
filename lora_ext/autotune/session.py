"""`lora_ext.warmup`: checks and times kernels once, before later calls."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import lora_ext._C as _C

from ..device import NO_KERNELS, indexed
from ..dtypes import HALVES
from ..kernels.kernel_checks import check_kernels
from ..packing import DECODE_AND_TRAINING, Packing, pack_weights
from . import own_products
from .cache_file import Cache, Entry, write_cache
from .planner_cache import empty_cache, named_cache, use, user_cache, user_file
from .shape import Shape, shapes_of
from .trial import Trial, kernels_for, measure, route_by_planner

Say = Callable[[str], object]


@dataclass(frozen=True, repr=False)
class Warmup:
    """The results of `warmup`; str() gives a readable text.

    Attributes:
        entries: the fastest route of each shape, forward and backward separately, with its times.
        timed: how many of them are new.
        failed: a line for each set of kernels that failed its check; they are not used.
        path: the cache file; None if nothing was timed or read.
        note: why nothing was checked or timed, or what was omitted; "" otherwise.
        packing: for a model on the CPU, which weights were packed.
        own_products: for quantised layers whose library multiplies without dequantising, a line for
            each kind and number of rows: that product or the op. Kept in this process only.
    """

    entries: tuple[Entry, ...] = ()
    timed: int = 0
    failed: tuple[str, ...] = ()
    path: Path | None = None
    note: str = ""
    packing: Packing | None = None
    own_products: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """One line, for lists and interactive use."""
        if self.packing is not None:
            return f"Warmup({self.packing!r})"
        what = f"{len(self.entries)} entries, {self.timed} new, {len(self.failed)} failed checks"
        return f"Warmup({self.note if self.note and not self.entries else what})"

    def __str__(self) -> str:
        if self.packing is not None:
            return str(self.packing)
        lines = [str(entry) for entry in self.entries]
        lines += [f"failed: {line}" for line in self.failed]
        lines += self.own_products
        if self.path is not None:
            lines.append(f"{self.timed} of {len(self.entries)} entries are new, in {self.path}")
        return "\n".join([*lines, self.note] if self.note else lines)


def warmup(
    model: nn.Module,
    rows: int | Iterable[int] = DECODE_AND_TRAINING,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    cache: str | Path | None = None,
    pack_budget: int | None = None,
    progress: bool | Say = True,
) -> Warmup:
    """Checks the kernels that a model's layers can use, and measures which are fastest here.

        lora_ext.warmup(model, rows=(1, 4096))      # once

    On a CPU it times each kind of frozen weight, for forward and, if any parameter is trained,
    backward: by torch's product and by panels in its original layout, and in oneDNN's packed one.
    Panels other than by the rule, and a packed copy, are taken if they are faster by at least 5 %,
    in three rounds of four. A call uses the measurement whose number of rows is nearest to its own;
    those of panels hold for all weights of this kind in the process. `PackedWeight` describes when
    a pack is dropped. On a GPU:

    The kernels of every route of `lora_linear` (hybrid, and our own with each tile) are compared
    with float64 on small cases, in a child process; then the routes are timed on this card for each
    layer and number of rows, forward and backward separately. The library's route is kept unless
    another one is faster by 1 % in three rounds of four.
    The fastest routes are stored in the user's autotune cache, for this card, torch, driver and
    build: the planner uses them from now on, also in later processes, and `explain` reports
    "measured on this card". Shapes in the cache are not timed again, and kernels that this process
    has checked are not checked again. Layers with 4-bit weights of bitsandbytes are also timed with
    its own product.

    Nothing is timed under ``torch.use_deterministic_algorithms``, where the cache is not used: then
    kernels are only checked. Routes differ in rounding, so a new entry can change the last bits of
    a result. The state of torch's random generators does not change. Do not call it while a CUDA
    graph is captured, but before.

    Args:
        model: with LoRA layers of this package or of PEFT.
        rows: batch times sequence length of later calls, one number or several. An entry is used
            from half to twice its rows.
        device: a CUDA device, or "cpu"; default: the model's, if that is CUDA, else the current
            CUDA device, else the CPU.
        dtype: of x and weight, bfloat16 or float16, which share their entries; default: bfloat16.
        cache: a file to use instead of the user's cache; it is created if it does not exist, and
            shapes in it are not timed again. Ranks that read it with
            `lora_ext.autotune.load_cache` choose the same routes.
        pack_budget: bytes that packed copies may take on a CPU, a copy of the weight for each
            direction; None: a quarter of the available memory.
        progress: whether to print what is timed to stderr, or a function that is called with each
            line.

    Returns:
        The entries and the checks that failed. Without CUDA kernels or a GPU the result is empty,
        and its note gives the reason.

    Raises:
        ValueError: the model has no LoRA linear, rows are not valid, or the budget is negative.
        TypeError: a model or dtype of another kind.
        CacheError: the file ``cache`` is corrupt, or not for this card and build; a ValueError.
        OSError: the file ``cache`` cannot be written (the user's: only a warning); the entries are
            in use in this process.
    """
    say = _printed if progress is True else progress or (lambda line: None)
    shapes = shapes_of(model, rows)
    counts = {shape.rows for shape in shapes}
    if dtype not in (None, *HALVES):
        raise TypeError(f"lora_ext.warmup: expected bfloat16 or float16, but got {dtype}")
    if _is_for_cpu(model, device):
        return Warmup(packing=pack_weights(model, counts, budget=pack_budget, say=say))
    device = _device_of(model) if device is None else torch.device(device)
    card = _card_of(device)
    if isinstance(card, str):
        nothing = f"there is nothing to warm up: {card}"
        say(nothing)
        return Warmup(note=nothing)
    device = indexed(device)
    path = user_file(card.name) if cache is None else Path(cache)
    if cache is None:
        known = user_cache(path)
    else:
        known = named_cache(path, card.name) if path.exists() else None
    known = known or empty_cache(card.name)
    session = _Session(device, card, dtype or torch.bfloat16, known, path, say)
    note, own = "", []
    if torch.are_deterministic_algorithms_enabled():
        note = "nothing is timed under torch.use_deterministic_algorithms"
    kernels = kernels_for(card, shapes, session.dtype)
    failed = check_kernels(device, kernels, begins=lambda name: say(f"checking {name}"))
    for name, why in failed.items():
        say(f"{name} failed: {why}")
    try:
        if not note:
            session.time(shapes)
            own = own_products.measure(model, counts, device, say)
    finally:
        use(session.cache, path)
    if session.unwritten is not None:
        if cache is not None:
            raise session.unwritten
        warnings.warn(
            f"lora_ext.warmup: the new entries are in use, but not saved: {session.unwritten}",
            stacklevel=2,
        )
    wanted = set(shapes)
    return Warmup(
        tuple(entry for entry in session.cache.entries if entry.shape in wanted),
        session.timed,
        tuple(f"{name}: {why}" for name, why in failed.items()),
        path if session.cache.entries else None,
        "; ".join(filter(None, (note, *session.left_out))),
        own_products=tuple(own),
    )


def _printed(line: str) -> None:
    print(f"lora_ext.warmup: {line}", file=sys.stderr, flush=True)


def _device_of(model: nn.Module) -> torch.device | None:
    """The device of a model, if it is on CUDA."""
    return next((each.device for each in model.parameters() if each.is_cuda), None)


def _is_for_cpu(model: nn.Module, device: torch.device | str | None) -> bool:
    """Whether weights are to be packed. A model on the CPU of a machine with a GPU is assumed to be
    moved to the GPU later."""
    if device is not None:
        return torch.device(device).type == "cpu"
    has_gpu = _C.with_cuda and torch.cuda.is_available()
    return not has_gpu and all(parameter.is_cpu for parameter in model.parameters())


def _card_of(device: torch.device | None) -> _C.Card | str:
    """The card of a device, None: of the current one; or why nothing can be warmed up."""
    if not _C.with_cuda:
        return NO_KERNELS
    if device is None and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    card = _C.cuda_card(indexed(device))
    if card.error:
        return f"CUDA cannot use the device: {card.error}"
    return card if card.arch >= 80 else "the kernels need a GPU of compute capability 8.0 or later"


@dataclass
class _Session:
    """One call of `warmup` and its growing cache."""

    device: torch.device
    card: _C.Card
    dtype: torch.dtype
    cache: Cache
    path: Path
    say: Say
    timed: int = 0
    left_out: list[str] = field(default_factory=list)
    unwritten: OSError | None = None

    def time(self, shapes: Iterable[Shape]) -> None:
        """Times the shapes that the cache does not have, and writes its file after each shape."""
        known = {entry.key for entry in self.cache.entries}
        todo = [shape for shape in shapes if {(shape, False), (shape, True)} - known]
        with route_by_planner(), torch.no_grad():
            for number, shape in enumerate(todo, 1):
                try:
                    trial, entries = Trial(shape, self.device, self.dtype), []
                    for backward in (False, True):
                        entries.append(measure(trial, self.card, backward))
                        self.say(f"{number} of {len(todo)}: {entries[-1]}")
                    self.cache = self.cache.with_entries(entries)
                    self.timed += len(entries)
                    write_cache(self.cache, self.path)
                except torch.OutOfMemoryError:
                    self.left_out.append(f"{shape} does not fit into the free memory")
                except OSError as error:
                    self.unwritten = error
