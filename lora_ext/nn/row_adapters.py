"""Which adapter each row of a batch has: what an open `lora_ext.use_adapters` gives its layers.

A block has distinct names and an int32 index into them, of samples ``[batch]`` or of tokens
``[batch, tokens]``. A layer asks for the index of its own rows: expanded to the leading dimensions
of its x and, where it lacks some of the adapters, counting those that it has. Each such tensor is
made once a block, and shared by all layers.

Each asyncio task has the blocks that it entered itself, by a `contextvars.ContextVar`: a layer
holds the block that was entered last, whoever did, and asks the context whose it is. A graph of
torch.compile, which cannot ask, takes what the layer holds.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from . import recompute
from .updates import is_traced

_current_graph_task = torch._C._current_graph_task_id
_thread = threading.get_ident

# Attribute of the layers: the block that was entered last and is open, `CLOSED`, or none.
_HELD = "row_adapters"
# The block that was entered last in this context; those around it are its `outer`.
_INNERMOST: ContextVar[RowAdapters | None] = ContextVar("lora_ext_row_adapters", default=None)
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_CONTEXTLIB = contextlib.contextmanager.__code__.co_filename
# By their ids, as long as anything holds them: a part that is checkpointed does after the block.
_BLOCKS: weakref.WeakValueDictionary[int, RowAdapters] = weakref.WeakValueDictionary()
# No adapter has this number: the op refuses it.
_NOBODY = 2**31 - 1


class RowAdapters:
    """The adapters of one block.

    Attributes:
        names: distinct names of adapters, which the index counts.
        index: int32 ``[batch]`` or ``[batch, tokens]``, -1 for the base alone.
        slots: the same with the slots of a pool in the place of names; None if the names are not
            all a pool's.
        repeats: how often the model may repeat each sample, as beam search does.
        is_pefts: whether it came as PEFT's adapter_names, whose errors are PEFT's own.
    """

    def __init__(
        self,
        names: Sequence[str],
        index: Tensor,
        slots: Tensor | None = None,
        repeats: int = 1,
        is_pefts: bool = False,
    ) -> None:
        self.names = tuple(names)
        self.index, self.slots = index, slots
        self.repeats = repeats
        self.is_pefts = is_pefts
        self.is_open = True
        self.thread = _thread()
        self.records_gradients = torch.is_grad_enabled()
        # Tokens of the x that came last in 3 dimensions, for layers whose x is flattened.
        self._tokens = 0
        self._made: dict[Any, Tensor] = {}
        # By the id of each layer that the block is for: what it held before.
        self.below: dict[int, Any] = {}
        # The block around it in its context, and whether other contexts have some beside it.
        self.outer: RowAdapters | None = None
        self.overlaps = False
        # A name whose adapter was removed since: another may have its place, or its name.
        self.gone: str | None = None
        # The generator that entered the block, if it was one.
        self.opener: FrameType | None = None

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy or a pickle of a layer is in no block

    def index_of(self, lead: torch.Size, device: torch.device, names: Sequence[str]) -> Tensor:
        """int32 ``[rows]``: for each row its place in `names`, or -1.

        Args:
            lead: the shape of x without its features.
            device: of x.
            names: those of this block that the layer has, in the block's order.

        Raises:
            ValueError: the rows are not those of the block's samples.
        """
        if is_traced():
            return self._chosen(self._expanded(self.index, lead, device), names)
        if len(lead) > 1:
            self._tokens = lead[1]
        key = (lead, device, None if len(names) == len(self.names) else tuple(names), self._tokens)
        found = self._made.get(key)
        if found is None:
            found = self._chosen(self._expanded(self.index, lead, device), names)
            self._made[key] = found
        return found

    def slots_of(self, lead: torch.Size, device: torch.device) -> Tensor:
        """int32 ``[rows]``: for each row its slot of the pool, or -1; errors as in `index_of`."""
        assert self.slots is not None
        if is_traced():
            return self._expanded(self.slots, lead, device)
        if len(lead) > 1:
            self._tokens = lead[1]
        key = (lead, device, "slots", self._tokens)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._expanded(self.slots, lead, device)
        return found

    def scaling_of(self, scalings: tuple[Any, ...], device: torch.device) -> Any:
        """float32 ``[adapters]``, made once for the same numbers; under a compiler the numbers."""
        if any(isinstance(scaling, Tensor) for scaling in scalings):
            return torch.stack(
                [torch.as_tensor(s, dtype=torch.float32, device=device).view(()) for s in scalings]
            )
        if is_traced():
            return scalings
        key = (scalings, device)
        found = self._made.get(key)
        if found is None:
            found = torch.tensor(scalings, dtype=torch.float32, device=device)
            self._made[key] = found
        return found

    def sample_names(self, nobody: str) -> list[str] | None:
        """A name for each sample; None where tokens of one sample may differ."""
        if self.index.dim() != 1:
            return None
        return [nobody if i < 0 else self.names[i] for i in self.index.tolist()]

    def check_there(self) -> None:
        """Raises RuntimeError if one of the adapters was removed since the block was entered."""
        if self.gone is not None:
            raise RuntimeError(
                f"lora_ext.use_adapters: expected the adapters with which the block was entered, "
                f"but {self.gone!r} was removed since; remove an adapter after the blocks and the "
                "backwards that use it"
            )

    def _chosen(self, index: Tensor, names: Sequence[str]) -> Tensor:
        """The index counting `names` in the place of all."""
        if len(names) == len(self.names):
            return index
        places = {name: place for place, name in enumerate(names)}
        count = len(self.names)
        table = [_NOBODY, -1, *(places.get(name, -1) for name in self.names), _NOBODY]
        numbers = torch.tensor(table, dtype=torch.int32, device=index.device)
        return numbers[(index + 2).clamp(0, count + 2)]

    def _expanded(self, index: Tensor, lead: torch.Size, device: torch.device) -> Tensor:
        """The index with one element for each of the rows ``lead``."""
        index = index.to(device)
        if len(lead) == 1:
            lead = self._unflattened(index, lead)
        if len(lead) == 0:
            raise self._mismatch(lead)
        index = self._repeated(index, lead)
        if index.dim() == 2:
            if lead[1] == 1:
                index = index[:, -1:]  # a step after the prompt: each sample goes on with its last
            elif lead[1] != index.shape[1]:
                raise self._mismatch(lead)
        return index.reshape(*index.shape, *(1 for _ in lead[index.dim() :])).expand(lead).flatten()

    def _unflattened(self, index: Tensor, lead: torch.Size) -> torch.Size:
        """The samples, or samples and tokens, of x ``[rows, in]``."""
        batches = {index.shape[0], index.shape[0] * self.repeats}
        tokens = 0 if is_traced() else self._tokens
        if index.dim() == 1 and lead[0] in batches:
            return lead
        if index.dim() == 2:
            tokens = tokens or index.shape[1]
        for batch in batches:
            if tokens and batch * tokens == lead[0]:
                return torch.Size((batch, tokens))
        raise self._mismatch(lead)

    def _repeated(self, index: Tensor, lead: torch.Size) -> Tensor:
        if lead[0] == index.shape[0]:
            return index
        if lead[0] == index.shape[0] * self.repeats:
            return index.repeat_interleave(self.repeats, 0)
        raise self._mismatch(lead)

    def _mismatch(self, lead: torch.Size) -> ValueError:
        batch, rest = self.index.shape[0], list(self.index.shape[1:])
        samples = lead[0] if len(lead) else 0
        wanted = f"[{batch}, tokens, in]"
        if rest:
            wanted = f"[{batch}, {rest[0]}, in], or [{batch}, 1, in] for a step after it"
        hint = "; samples come first, in the order of the names"
        if batch and samples > batch and samples % batch == 0:
            hint = _hint_of_more(samples, batch, "a row of the index" if rest else "a name", lead)
        elif rest and len(lead) > 1 and samples in (batch, batch * self.repeats):
            hint = "; give an index for these tokens, or one for each sample"
        return ValueError(
            f"lora_ext.use_adapters: expected x of shape {wanted}, for an index of shape "
            f"{list(self.index.shape)}, but a layer got [{', '.join(map(str, lead))}, in]{hint}"
        )


def _hint_of_more(samples: int, batch: int, own: str, lead: torch.Size) -> str:
    """What to do about x with a multiple of the block's samples, or of other rows."""
    hint = (
        f"; give {own} for each of the {samples} samples, in their order: a batch of torch.cat("
        '[uncond, cond]), as in classifier-free guidance, wants the names twice, ["a", "b", "a", '
        '"b"]'
    )
    if len(lead) == 1:
        # Rows of a vision tower: their number says nothing, and differs from layer to layer.
        return (
            f"{hint}. Where the {samples} rows are no samples, such as the patches of all images, "
            "none can have an adapter of its own: target other layers"
        )
    return (
        f"{hint}. Only where each sample is repeated beside itself, as generate does for num_beams "
        f"and num_return_sequences: [a, a, b, b], give use_adapters(..., "
        f"repeats={samples // batch})"
    )


class _Closed:
    """What layers hold after a block in which gradients were recorded."""

    is_open = False

    def __reduce__(self) -> Any:
        return type(None), ()


CLOSED = _Closed()


def in_force(layer: Any) -> RowAdapters | None:
    """The adapters that count for the forward of a layer that is running.

    A forward that activation checkpointing repeats has those of the forward that it repeats,
    whatever is open by now.

    Args:
        layer: that holds something.

    Raises:
        RuntimeError: the block belongs to another thread or, in a generator, to another context, or
            is not the innermost one where the forward is called, or has lost an adapter, or a
            backward repeats a forward of which nothing is known.
    """
    held = layer.row_adapters
    if is_traced():
        if not held.is_open:
            return None
        if not held.overlaps:
            held.check_there()
            return held
        torch._dynamo.graph_break(  # a graph cannot ask the context
            "blocks of lora_ext.use_adapters overlap, each of another task; without fullgraph=True "
            "each task has its own adapters"
        )
    if _current_graph_task() != -1:
        return recompute.adapters_of_repeated()
    if held.is_open and held.thread != _thread():
        raise RuntimeError(
            "lora_ext.use_adapters: expected a forward in the thread that opened the block, but "
            "another thread runs the model; give each thread a model of its own, or run them in "
            "turn"
        )
    rows = of_context(layer)
    if held is not rows:
        _check_context(held, layer)
    if rows is None:
        return None
    if rows.opener is not None and _open(rows.outer, layer) and not _is_running(rows.opener):
        raise _not_nested("a forward is called while a generator that is suspended has one open")
    rows.check_there()
    if rows.records_gradients:
        recompute.remember(rows)
    return rows


def forget(layer: nn.Module, name: str) -> None:
    """Says that an adapter of the layer is removed: blocks that use it have lost it."""
    for reference in _BLOCKS.valuerefs():
        rows = reference()
        if rows is not None and name in rows.names and id(layer) in rows.below:
            rows.gone = name


def of_context(layer: nn.Module) -> RowAdapters | None:
    """The block that counts for a layer in this context."""
    return _open(_INNERMOST.get(), layer)


def _open(rows: RowAdapters | None, layer: nn.Module) -> RowAdapters | None:
    """Of a block and those around it the innermost that is open for a layer."""
    while rows is not None and not (rows.is_open and id(layer) in rows.below):
        rows = rows.outer
    return rows


@contextmanager
def given_to(
    layers: Sequence[nn.Module], rows: RowAdapters, others: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Within the block the layers use the adapters of `rows`; blocks of one task are nested.

    Args:
        others: modules for which `of_context` finds the block, too.

    Raises:
        RuntimeError: another thread has a block open on one of the layers; when the block is left:
            one that was entered later is still open.
    """
    for layer in layers:
        held = layer.__dict__.get(_HELD)
        if held is not None and held.is_open and held.thread != rows.thread:
            raise RuntimeError(
                "lora_ext.use_adapters: expected a model that no other thread is using, but "
                "another has a block open; give each thread a model of its own, or run them in turn"
            )
        rows.below[id(layer)] = held
        if held is not None and held.is_open and held is not of_context(layer):
            rows.overlaps = True
    rows.below |= {id(module): None for module in others}
    rows.outer, rows.opener = _INNERMOST.get(), _opener()
    _BLOCKS[id(rows)] = rows
    try:
        for layer in layers:
            layer.__dict__[_HELD] = rows
        _INNERMOST.set(rows)
        yield
    finally:
        is_innermost = _leave(rows)
        rows.is_open, rows.opener = False, None
        rows.records_gradients = rows.records_gradients or torch.is_grad_enabled()
        for layer in layers:
            _give_back(layer)
    if not is_innermost:
        raise _not_nested("one is left before another that was entered later")


def _leave(rows: RowAdapters) -> bool:
    """Takes a block from those of this context; False if one within it is open for its layers."""
    inner = _INNERMOST.get()
    if inner is rows:
        _INNERMOST.set(rows.outer)
        return True
    overlaps = False
    while inner is not None and inner is not rows:
        overlaps |= inner.is_open and not rows.below.keys().isdisjoint(inner.below)
        inner = inner.outer
    return inner is None or not overlaps  # None: it was entered in another context


def _check_context(held: Any, layer: nn.Module) -> None:
    """Raises RuntimeError within a generator that goes on in another context than that in which it
    opened a block: asyncio.wait_for makes one for each step, before Python 3.12."""
    known = set()
    rows = _INNERMOST.get()
    while rows is not None:
        known.add(id(rows))
        rows = rows.outer
    lost = set()
    while isinstance(held, RowAdapters):
        if held.is_open and held.opener is not None and id(held) not in known:
            lost.add(id(held.opener))
        held = held.below.get(id(layer))
    frame: FrameType | None = sys._getframe(1) if lost else None
    while frame is not None:
        if id(frame) in lost:
            raise _not_nested("a generator goes on in another task or context than its block's")
        frame = frame.f_back


def _opener() -> FrameType | None:
    """The generator with whose `with` statement a block is entered, past context managers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code, caller = frame.f_code, frame.f_back
        is_generator = bool(code.co_flags & _GENERATOR)
        is_managed = is_generator and caller and caller.f_code.co_filename == _CONTEXTLIB
        if not is_managed and code.co_filename != _CONTEXTLIB:
            return frame if is_generator else None
        frame = caller
    return None


def _is_running(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def _not_nested(what: str) -> RuntimeError:
    return RuntimeError(
        f"lora_ext.use_adapters: expected blocks of one task that are nested, but {what}; in "
        "generators that take turns, open the block around each forward, or run each generator in "
        "an asyncio task of its own"
    )


def _give_back(layer: nn.Module) -> None:
    """Leaves the layer with the block that was entered last of those that are open."""
    held = layer.__dict__.get(_HELD)
    leaves_graphs = False
    while isinstance(held, RowAdapters) and not held.is_open:
        leaves_graphs = leaves_graphs or held.records_gradients
        held = held.below.get(id(layer))
    if held is None and leaves_graphs:
        held = CLOSED
    if held is None:
        layer.__dict__.pop(_HELD, None)
    else:
        layer.__dict__[_HELD] = held
