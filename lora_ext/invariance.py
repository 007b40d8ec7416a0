"""`batch_invariant`: makes the bits of a row the same in a batch of any size.

Libraries choose their kernels by the number of rows, and so do our routes. So y and dX are computed
by panels, whose kernels treat all rows alike (csrc/cpu/fused_product.cpp), or, without panels,
in blocks that all have `ROW_BLOCK` rows (csrc/op/route/equal_blocks.cpp).
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch

# Fewer rows cost as much as this number, and the weight is read once for each block of this number
# of rows: a larger block would be slow for a single token, a smaller one for a long text.
ROW_BLOCK = 32

_is_compiling = torch.compiler.is_compiling


class _Process:
    """The mode outside of `with` blocks."""

    mode = False


class _Block:
    """A `with` block that is open.

    Attributes:
        mode: inside of it.
        where: the thread and task that opened it.
        opened: the blocks of that thread, of which it is one.
        is_closed: whether it was closed elsewhere: by the task that closes an asynchronous
            generator which was left, whose context is a copy.
    """

    __slots__ = ("is_closed", "mode", "opened", "where")

    def __init__(self, mode: bool, opened: list[_Block]) -> None:
        self.mode, self.opened, self.where, self.is_closed = mode, opened, _here(), False


def _here() -> tuple[int, object]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("lora_ext_batch_invariant", default=())
# torch.compile cannot read a ContextVar, but it guards on this object.
_thread = threading.local()


class batch_invariant:
    """Gives each row of y and dX the bits that it has in a batch of any other size.

        with lora_ext.batch_invariant():       # for this task and thread, nested in any depth
            scores = model(prompts)            # backward may come later
        lora_ext.batch_invariant(True)         # for the process, outside of blocks
        lora_ext.batch_invariant(False)

    Without it the last bits of a row may depend on the number of rows in the batch, as with
    ``F.linear``: decoding and scoring then do not give the same bits. Within the block, every row
    of `lora_linear` and of the layers that use it goes through the same products: by panels, or in
    blocks of 32 rows, the last one padded with zeros. In a batch with an adapter for each row it
    has the bits of a call with its adapter alone. dX has the mode of its forward, at any time and
    in any thread. Gradients of factors and biases are sums over all rows, the same as
    without it.

    It supports dense and quantised weights on the CPU, in every dtype, and an adapter for each row
    and experts where the products are by panels (not in float64, nor in half types with AMX).
    Packed weights are not used, nor a library's own products with quantised ones. Other layers of a
    model, such as its attention, base layers without adapters and merged ones, are computed by
    torch, and are as invariant as torch makes them.

    Args:
        mode: True or False sets it for the process at once; in a ``with`` statement it holds for
            the block only.

    Raises:
        NotImplementedError: at a call that it does not support: `lora_update`, embeddings, DoRA,
            CUDA; an adapter for each row, or experts, where there are no panels; or if torch's
            products are needed and do not multiply all rows of a block alike, filled up with zeros
            to multiples of 16, 32 or 64 columns or not, which is tested once for each shape and
            dtype.
        TypeError: mode is not a bool.
    """

    def __init__(self, mode: bool | None = None) -> None:
        if not (mode is None or isinstance(mode, bool)):
            raise TypeError(
                f"lora_ext.batch_invariant: expected True or False, but got {mode!r}; with "
                "lora_ext.batch_invariant(): ... needs none"
            )
        self._mode = True if mode is None else mode
        self._before = None
        self._entered: list[_Block] = []
        if mode is not None:
            self._before, _Process.mode = _Process.mode, mode

    def __enter__(self) -> None:
        if self._before is not None:  # used as a block, so the call's setting is undone
            _Process.mode, self._before = self._before, None
        opened = _open_in_thread()
        block = _Block(self._mode, opened)
        self._entered.append(block)
        _blocks.set((*_blocks.get(), block))
        opened.append(block)
        _thread.mode = self._mode

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        blocks = _blocks.get()
        own = (block for block in reversed(self._entered) if block in blocks)
        block = next(own, self._entered[-1])
        self._entered.remove(block)
        block.is_closed = block.where != _here()
        _blocks.set(tuple(each for each in blocks if each is not block))
        block.opened.remove(block)
        opened = _open_in_thread()  # also of other tasks
        _thread.mode = opened[-1].mode if opened else None


def _open_in_thread() -> list[_Block]:
    if not hasattr(_thread, "opened"):
        _thread.opened = []
    return _thread.opened


def is_on() -> bool:
    """Whether calls are to be batch-invariant, here and now."""
    if _is_compiling():
        mode = getattr(_thread, "mode", None)
    else:
        blocks = _blocks.get()
        mode = None
        if blocks:
            mode = next((each.mode for each in reversed(blocks) if not each.is_closed), None)
    return _Process.mode if mode is None else mode


def row_block(weight: Any) -> int:
    """The op's row_block for a call on this weight; 0 if the mode is off."""
    if not is_on():
        return 0
    if weight.device.type not in ("cpu", "meta"):
        refuse(f"a tensor on {weight.device}")
    return ROW_BLOCK


def invariance_note() -> str:
    """The note that `lora_ext.explain` adds to the reason of a call."""
    return "; batch-invariant" if is_on() else ""


def refuse(what: str) -> None:
    """Raises NotImplementedError if the mode is on; what: the call that it does not support."""
    if is_on():
        raise NotImplementedError(
            "lora_ext.batch_invariant: expected a weight on the CPU, dense or quantised, "
            f"but got {what}, where a row's bits may depend on the number of rows; make this call "
            "outside of the block, or in one of batch_invariant(False)"
        )
