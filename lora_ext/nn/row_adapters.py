"""The open blocks of `lora_ext.use_adapters`, and which of them applies to a layer.

Each asyncio task has the blocks that it entered itself, in a `contextvars.ContextVar`. A layer
holds the block that was entered last, by any task, and checks in the context which one applies. A
graph of torch.compile cannot read the context and uses the block that the layer holds.
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

from ..torch_state import is_traced
from . import recompute
from .row_index import RowIndex

_current_graph_task = torch._C._current_graph_task_id
_thread = threading.get_ident

# Attribute of the layers: the open block that was entered last, `CLOSED`, or absent.
_HELD = "row_adapters"
# The block that was entered last in this context; its `outer` is the enclosing block.
_INNERMOST: ContextVar[RowAdapters | None] = ContextVar("lora_ext_row_adapters", default=None)
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_CONTEXTLIB = contextlib.contextmanager.__code__.co_filename
# Blocks by id, as long as something holds them: a checkpointed part holds one after it was left.
_BLOCKS: weakref.WeakValueDictionary[int, RowAdapters] = weakref.WeakValueDictionary()


class RowAdapters(RowIndex):
    """The adapters of one block, as long as it is open.

    Attributes:
        is_pefts: whether it was given as PEFT's adapter_names; errors are then those of PEFT.
    """

    def __init__(
        self,
        names: Sequence[str],
        index: Tensor,
        slots: Tensor | None = None,
        repeats: int = 1,
        is_pefts: bool = False,
    ) -> None:
        super().__init__(names, index, slots, repeats)
        self.is_pefts = is_pefts
        self.is_open = True
        self.thread = _thread()
        self.records_gradients = torch.is_grad_enabled()
        # id of each layer of the block -> the block that the layer held before.
        self.below: dict[int, Any] = {}
        # The enclosing block in its context, and whether other contexts also have open blocks.
        self.outer: RowAdapters | None = None
        self.overlaps = False
        # The name of an adapter that was removed in the meantime: another adapter may have its slot
        # or its name.
        self.gone: str | None = None
        # The generator that entered the block, if it was one.
        self.opener: FrameType | None = None

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy or a pickle of a layer is not in a block

    def check_there(self) -> None:
        """Raises RuntimeError if an adapter was removed after the block was entered."""
        if self.gone is not None:
            raise RuntimeError(
                f"lora_ext.use_adapters: expected the adapters with which the block was entered, "
                f"but {self.gone!r} was removed since; remove an adapter after the blocks and the "
                "backwards that use it"
            )


class _Closed:
    """The value that layers hold after a block in which gradients were recorded."""

    is_open = False

    def __reduce__(self) -> Any:
        return type(None), ()


CLOSED = _Closed()


def current_row_adapters(layer: Any) -> RowAdapters | None:
    """The adapters that apply to the running forward of a layer.

    A forward that activation checkpointing repeats has the adapters of the original forward,
    whichever block is open now.

    Args:
        layer: a layer that holds a block or `CLOSED`.

    Raises:
        RuntimeError: the block belongs to another thread or, in a generator, to another context, or
            is not the innermost one where the forward is called, or has lost an adapter, or a
            backward repeats a forward for which nothing was stored.
    """
    held = layer.row_adapters
    if is_traced():
        if not held.is_open:
            return None
        if not held.overlaps:
            held.check_there()
            return held
        torch._dynamo.graph_break(  # a graph cannot read the context
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
    """Marks an adapter of the layer as removed in the blocks that use it."""
    for reference in _BLOCKS.valuerefs():
        rows = reference()
        if rows is not None and name in rows.names and id(layer) in rows.below:
            rows.gone = name


def of_context(layer: nn.Module) -> RowAdapters | None:
    """The block that applies to a layer in this context."""
    return _open(_INNERMOST.get(), layer)


def _open(rows: RowAdapters | None, layer: nn.Module) -> RowAdapters | None:
    """The innermost of a block and its enclosing blocks that is open for a layer."""
    while rows is not None and not (rows.is_open and id(layer) in rows.below):
        rows = rows.outer
    return rows


@contextmanager
def given_to(
    layers: Sequence[nn.Module], rows: RowAdapters, others: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Within the block the layers use the adapters of `rows`; blocks of one task are nested.

    Args:
        others: modules for which `of_context` also finds the block.

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
    """Removes a block from this context; False if a nested one is still open for its layers."""
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
    """Raises RuntimeError in a generator that continues in another context than the one in which it
    opened a block: before Python 3.12 asyncio.wait_for makes a context for each step."""
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
    """The frame of the generator whose `with` statement enters a block, skipping context
    managers."""
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
    """Sets the layer's block to the open one that was entered last."""
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
