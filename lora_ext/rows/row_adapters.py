"""Which adapters the rows of a forward have: the open blocks of `lora_ext.use_adapters`.

- The scope is a `contextvars.ContextVar`: the blocks that this thread or asyncio task has entered.
  An eager forward takes the innermost one that has its layer.
- A graph of torch.compile cannot read it. It takes the block that the layer's attribute
  `row_adapters` holds, on which it has guards, and an op of the graph raises an error where the
  scope has another one.
- What `torch.utils.checkpoint` repeats in a backward has the scope of its first run.
- Whatever else repeats a forward has a scope of which nothing is known: an error.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..torch_state import checkpoint_frame, checkpoint_function, graph_task, is_traced
from .row_index import RowIndex

_thread = threading.get_ident

# Attribute of the layers: the open block that was entered last in any context; `CLOSED` after a
# block in which gradients were recorded, else None.
_HELD = "row_adapters"
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_CONTEXTLIB = contextlib.contextmanager.__code__.co_filename
_IS_BOUND = "lora_ext_is_bound"
# PEFT's name for the base alone.
BASE_NAME = "__base__"


class RowAdapters(RowIndex):
    """The adapters of one block.

    Attributes:
        layers: those whose rows have the adapters of the block.
        others: modules of PEFT, whose own forwards get a name for each sample.
        is_pefts: whether it was given as PEFT's adapter_names; errors are then those of PEFT.
    """

    def __init__(
        self,
        names: Sequence[str],
        index: Tensor,
        layers: Sequence[nn.Module],
        others: Sequence[nn.Module] = (),
        slots: Tensor | None = None,
        repeats: int = 1,
        is_pefts: bool = False,
    ) -> None:
        super().__init__(names, index, slots, repeats)
        self.layers, self.others, self.is_pefts = layers, others, is_pefts
        self.modules = {id(module) for module in (*layers, *others)}
        self.is_open = False
        self.records_gradients = torch.is_grad_enabled()
        self.thread = _thread()
        # The name of an adapter that was removed in the meantime: another adapter may have its slot
        # or its name.
        self.gone: str | None = None
        # Whether PEFT's forwards in a graph get the names: not while another scope is repeated.
        self.is_in_graphs = True
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

    def in_graph(self, index: Tensor) -> Tensor:
        if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return index
        return _checked_in_graph(index)


class _Closed:
    """The value that layers hold after a block of which a backward may repeat forwards."""

    def __reduce__(self) -> Any:
        return type(None), ()


CLOSED = _Closed()
# All open blocks, in the order in which they were entered.
_OPEN: list[RowAdapters] = []
# Blocks as long as something holds them: a checkpointed part holds one after it was left.
_BLOCKS: weakref.WeakSet[RowAdapters] = weakref.WeakSet()


class _Scope(NamedTuple):
    """Attributes:
    blocks: the innermost is the last.
    task: the graph task of autograd in which the scope began, -1 outside of a backward.
    is_repeated: whether a forward is repeated: blocks count that were left since.
    """

    blocks: tuple[RowAdapters, ...] = ()
    task: int = -1
    is_repeated: bool = False

    def there(self) -> tuple[RowAdapters, ...]:
        """The blocks that count."""
        if self.is_repeated:
            return self.blocks
        return tuple(rows for rows in self.blocks if rows.is_open)

    def of(self, module: nn.Module) -> RowAdapters | None:
        """The innermost block that has a module."""
        for rows in reversed(self.blocks):
            if id(module) in rows.modules and (rows.is_open or self.is_repeated):
                return rows
        return None


_NO_SCOPE = _Scope()
_SCOPE: ContextVar[_Scope] = ContextVar("lora_ext_row_adapters", default=_NO_SCOPE)


def current_row_adapters(layer: Any) -> RowAdapters | None:
    """The block whose adapters the rows of a running forward have, None for the active ones.

    Raises:
        RuntimeError: it is not known: another thread has the block open, or a generator in another
            context or that is suspended; a backward repeats a forward in another way than
            `torch.utils.checkpoint`. Or the block has lost an adapter.
    """
    held = layer.row_adapters
    if held is None:
        return None
    if is_traced():
        if held is CLOSED:
            return None
        held.check_there()
        return held
    scope, task = _SCOPE.get(), graph_task()
    if task not in (-1, scope.task):
        raise RuntimeError(
            "lora_ext.use_adapters: expected to know the adapters of a forward that a backward "
            "repeats, but not torch.utils.checkpoint repeats it, or its first run was before the "
            "first block; use torch.utils.checkpoint, or enter the block in the function that is "
            "repeated"
        )
    rows = scope.of(layer)
    if _OPEN and not scope.is_repeated:
        _check_context(scope, rows, layer, held)
    if rows is not None:
        rows.check_there()
        rows.records_gradients = rows.records_gradients or torch.is_grad_enabled()
    return rows


def forget(layer: nn.Module, name: str) -> None:
    """Marks an adapter of the layer as removed in the blocks that use it."""
    for rows in list(_BLOCKS):
        if name in rows.names and id(layer) in rows.modules:
            rows.gone = name


@contextmanager
def entered(rows: RowAdapters) -> Iterator[None]:
    """Within the block its layers use the adapters of `rows`; blocks of one task are nested.

    Raises:
        RuntimeError: another thread has a block open on one of the layers; when the block is left:
            one that was entered later is still open.
    """
    before = _SCOPE.get()
    around = before.there()
    for other in _OPEN:
        if other.thread != rows.thread and other not in around and _overlap(other, rows):
            raise RuntimeError(
                "lora_ext.use_adapters: expected a model that no other thread is using, but "
                "another has a block open; give each thread a model of its own, or run them in turn"
            )
    scope = _Scope((*around, rows), graph_task(), before.is_repeated)
    rows.opener = _opener()
    _bind_checkpoints()
    _BLOCKS.add(rows)
    try:
        _OPEN.append(rows)
        rows.is_open = True
        _SCOPE.set(scope)
        _hold(rows.layers, rows)
        with _names_given(rows) if rows.others else nullcontext():
            yield
    finally:
        rows.is_open, rows.opener = False, None
        _OPEN.remove(rows)
        now = _SCOPE.get()
        later = now.blocks[now.blocks.index(rows) + 1 :] if rows in now.blocks else ()
        is_nested = not any(other.is_open and _overlap(other, rows) for other in later)
        left = now._replace(blocks=tuple(other for other in now.blocks if other is not rows))
        _SCOPE.set(before if now is scope else left)
        closed = CLOSED if rows.records_gradients or torch.is_grad_enabled() else None
        for layer in rows.layers:
            if layer.__dict__.get(_HELD) is rows:
                still = (other for other in reversed(_OPEN) if id(layer) in other.modules)
                _hold([layer], next(still, closed))
    if not is_nested:
        raise _not_nested("one is left before another that was entered later")


def _hold(layers: Sequence[nn.Module], rows: Any) -> None:
    for layer in layers:
        if rows is None:
            layer.__dict__.pop(_HELD, None)
        else:
            layer.__dict__[_HELD] = rows


def _overlap(one: RowAdapters, other: RowAdapters) -> bool:
    return not one.modules.isdisjoint(other.modules)


# ---- PEFT's own forwards ----


@contextmanager
def _names_given(rows: RowAdapters) -> Iterator[None]:
    """Within the block PEFT's own forwards get adapter_names in the same way as from PEFT."""
    with ExitStack() as stack:
        names = rows.sample_names(BASE_NAME) or []
        for module in rows.others:
            hook = partial(_add_adapter_names, names=names, rows=rows)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _add_adapter_names(
    module: Any, args: Any, kwargs: Any, names: list[str], rows: RowAdapters | None
) -> Any:
    if rows is None:  # the hook of a copy, which is in no block
        return None
    if not (rows.is_in_graphs if is_traced() else _SCOPE.get().of(module) is rows):
        return None
    repeats = rows.repeats
    if repeats > 1 and args and len(args[0]) == len(names) * repeats:
        names = [name for name in names for _ in range(repeats)]
    return args, {**kwargs, "adapter_names": names}


# ---- what a backward repeats ----


def _bind_checkpoints() -> None:
    """From now on what `torch.utils.checkpoint` repeats has the scope of its first run.

    Both kinds keep the function that they repeat; the older one also runs it first.
    """
    function, frame = checkpoint_function, checkpoint_frame
    if function is not None and not hasattr(function.forward, _IS_BOUND):
        forward = function.forward

        def forward_bound(ctx: Any, run: Any, *args: Any) -> Any:
            return forward(ctx, _bound(run, runs_first=True), *args)

        setattr(forward_bound, _IS_BOUND, True)
        function.forward = staticmethod(forward_bound)
    if frame is not None and not hasattr(frame.__init__, _IS_BOUND):
        init = frame.__init__

        def init_bound(self: Any, recompute: Any, *args: Any, **kwargs: Any) -> None:
            init(self, _bound(recompute, runs_first=False), *args, **kwargs)

        setattr(init_bound, _IS_BOUND, True)
        frame.__init__ = init_bound


def _bound(function: Callable[..., Any], runs_first: bool) -> Callable[..., Any]:
    """A function that a checkpoint repeats, in the scope of now.

    Args:
        runs_first: whether it also runs for the first time, where nothing is to be changed.
    """
    blocks = _SCOPE.get().there()

    def repeat(*args: Any, **kwargs: Any) -> Any:
        task = graph_task()
        if runs_first and task == -1:
            return function(*args, **kwargs)
        before = _SCOPE.get()
        _SCOPE.set(_Scope(blocks, task, is_repeated=True))
        try:
            with _held(blocks):
                return function(*args, **kwargs)
        finally:
            _SCOPE.set(before)

    return repeat


@contextmanager
def _held(blocks: Sequence[RowAdapters]) -> Iterator[None]:
    """Within the block graphs and PEFT's own forwards, too, use these blocks and no open ones."""
    others = tuple(_OPEN)
    if blocks == others:
        yield
        return
    before = [
        (layer, layer.__dict__.get(_HELD)) for rows in (*others, *blocks) for layer in rows.layers
    ]
    known = [(rows, rows.is_in_graphs) for rows in (*others, *blocks)]
    try:
        for rows in others:
            _hold(rows.layers, CLOSED)
            rows.is_in_graphs = False
        with ExitStack() as stack:
            for rows in blocks:
                _hold(rows.layers, rows)
                rows.is_in_graphs = True
                if rows.others and not rows.is_open:
                    stack.enter_context(_names_given(rows))
            yield
    finally:
        for layer, held in reversed(before):
            _hold([layer], held)
        for rows, is_in_graphs in known:
            rows.is_in_graphs = is_in_graphs


# ---- what runs in another context ----


@torch.library.custom_op("lora_ext::rows_of_block", mutates_args=())
def _checked_in_graph(index: Tensor) -> Tensor:
    """A copy of a block's index; RuntimeError if the graph runs where the block is not in scope."""
    capturing = index.is_cuda and torch.cuda.is_current_stream_capturing()  # of a copy
    if graph_task() == -1 and not capturing:
        known = (own for rows in _SCOPE.get().there() for own in (rows.index, rows.slots))
        if all(own is None or own.data_ptr() != index.data_ptr() for own in known):
            raise RuntimeError(
                "lora_ext.use_adapters: expected a compiled model in the task or thread whose "
                "block was entered last, but another one runs it; enter and leave the block around "
                "each forward, with no await between, or do not compile the model"
            )
    return index.clone()


@_checked_in_graph.register_fake
def _(index: Tensor) -> Tensor:
    return torch.empty_like(index)


def _check_context(
    scope: _Scope, rows: RowAdapters | None, layer: nn.Module, held: RowAdapters | _Closed
) -> None:
    """Raises RuntimeError where other blocks are open than a forward's, and it may want theirs.

    A generator that has opened a block may go on in another context (before Python 3.12
    asyncio.wait_for makes one for each step), or be suspended: its frame then has no caller.
    """
    if rows is None and isinstance(held, RowAdapters) and held.thread != _thread():
        raise RuntimeError(  # also in a replica of nn.DataParallel
            "lora_ext.use_adapters: expected a forward in the thread that opened the block, but "
            "another thread runs the model; give each thread a model of its own, or run them in "
            "turn"
        )
    for other in _OPEN:
        if other.opener is None or other.opener.f_back is None or other in scope.blocks:
            continue
        if id(layer) in other.modules and other.thread == _thread():
            raise _not_nested("a generator goes on in another task or context than its block's")
    if rows is not None and rows.opener is not None and rows.opener.f_back is None:
        blocks = scope.blocks[: scope.blocks.index(rows)]
        if scope._replace(blocks=blocks).of(layer) is not None:
            raise _not_nested("a forward is called while a suspended generator has one open")


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


def _not_nested(what: str) -> RuntimeError:
    return RuntimeError(
        f"lora_ext.use_adapters: expected blocks of one task that are nested, but {what}; in "
        "generators that take turns, open the block around each forward, or run each generator in "
        "an asyncio task of its own"
    )
