"""`batch_invariant`: whether a row of a call has the same bits in a batch of any size.

A library chooses its kernels by the number of rows, and so do our routes. So y and dX are computed
in blocks that all have `ROW_BLOCK` rows (csrc/op/route/equal_blocks.h).
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

# A few rows cost as much as so many, and of many rows each so many read the weight once: more would
# be slow for a token, fewer for a text.
ROW_BLOCK = 32

_is_compiling = torch.compiler.is_compiling


class _Process:
    """What holds outside of blocks."""

    mode = False


class _Block(NamedTuple):
    mode: bool
    outer: _Block | None


_innermost: ContextVar[_Block | None] = ContextVar("lora_ext_batch_invariant", default=None)
# torch.compile cannot read a ContextVar, but guards what it reads here.
_thread = threading.local()


class batch_invariant:
    """Gives each row of y and dX the bits that it has in a batch of any other size.

        with lora_ext.batch_invariant():       # for this task and thread, nested in any depth
            scores = model(prompts)            # backward may come later
        lora_ext.batch_invariant(True)         # for the process, outside of blocks
        lora_ext.batch_invariant(False)

    Without it a row's last bits may depend on how many rows come with it, as they do with
    ``F.linear``: what is decoded is not bit for bit what is scored. Within, `lora_linear` and the
    layers on it multiply blocks of 32 rows, the last one filled up with zeros, so that every row
    meets the same products. dX follows the forward, whenever and in whatever thread it comes.
    Gradients of factors and biases are sums over all rows, and as without it.

    It takes one adapter or several active ones on a dense weight on the CPU, in every dtype. Packed
    weights are not used. Other layers of a model, such as its attention, base layers without
    adapters and merged ones, are torch's, and as invariant as torch makes them.

    Args:
        mode: True or False sets it for the process at once; of a ``with`` statement it is the
            block's alone.

    Raises:
        NotImplementedError: at a call of what it does not take: an adapter for each row, a
            quantised weight, `lora_update`, experts, embeddings, DoRA, CUDA; or where torch's
            products do not multiply the rows of one block alike, which is tried once for each
            shape and dtype.
        TypeError: mode is no bool.
    """

    def __init__(self, mode: bool | None = None) -> None:
        if not (mode is None or isinstance(mode, bool)):
            raise TypeError(
                f"lora_ext.batch_invariant: expected True or False, but got {mode!r}; with "
                "lora_ext.batch_invariant(): ... needs none"
            )
        self._mode = True if mode is None else mode
        self._before = None
        if mode is not None:
            self._before, _Process.mode = _Process.mode, mode

    def __enter__(self) -> None:
        if self._before is not None:  # it was no call, but the block's mode
            _Process.mode, self._before = self._before, None
        _innermost.set(_Block(self._mode, _innermost.get()))
        _open_in_thread().append(self._mode)
        _thread.mode = self._mode

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block = _innermost.get()
        _innermost.set(block and block.outer)
        opened = _open_in_thread()  # by other tasks, too
        if self._mode in opened:
            del opened[len(opened) - 1 - opened[::-1].index(self._mode)]
        _thread.mode = opened[-1] if opened else None


def _open_in_thread() -> list[bool]:
    if not hasattr(_thread, "opened"):
        _thread.opened = []
    return _thread.opened


def is_on() -> bool:
    """Whether calls are to be batch-invariant, here and now."""
    if _is_compiling():
        mode = getattr(_thread, "mode", None)
    else:
        block = _innermost.get()
        mode = None if block is None else block.mode
    return _Process.mode if mode is None else mode


def row_block(x: Tensor) -> int:
    """The op's row_block for a call of one adapter on a dense weight: 0 where it is off."""
    if not is_on():
        return 0
    if x.device.type not in ("cpu", "meta"):
        refuse(f"a tensor on {x.device}")
    return ROW_BLOCK


def invariance_note() -> str:
    """What `lora_ext.explain` adds to the reason of a call."""
    return f"; batch-invariant, in blocks of {ROW_BLOCK} rows" if is_on() else ""


def refuse(what: str) -> None:
    """Raises NotImplementedError where it is on; what: that it does not take."""
    if is_on():
        raise NotImplementedError(
            "lora_ext.batch_invariant: expected adapters of all rows on a dense weight on the CPU, "
            f"but got {what}, where a row's bits may depend on the number of rows; make this call "
            "outside of the block, or in one of batch_invariant(False)"
        )
