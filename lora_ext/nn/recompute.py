"""Forwards that activation checkpointing repeats in a backward, and the adapters that they had.

`torch.utils.checkpoint` runs a part of the model again when its gradients are wanted, which is
mostly after the block of `lora_ext.use_adapters` is left, or in another one. So the first run notes
the block's adapters on what stands for the part: the context of the autograd function with
use_reentrant=True, as of any other that runs a part in its forward and again in its backward; the
frame of checkpoint.py with use_reentrant=False. Both live as long as the graph. The second run
finds them on the stack that called it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils import checkpoint

_NOTE = "lora_ext_row_adapters"
_FILE = checkpoint.__file__
_autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
_top_hooks = _autograd._top_saved_tensors_default_hooks


def remember(rows: Any) -> None:
    """Notes the adapters on the checkpointed parts that are running for the first time.

    In the forward of an autograd function a first run records no gradients, although the block
    does; under use_reentrant=False hooks pack what is saved.
    """
    if not torch.is_grad_enabled():
        for frame in _stack():
            part = _context(frame, "forward")
            if part is not None:
                setattr(part, _NOTE, rows)
        return
    part = _part_of_hooks()
    if part is None or getattr(part, _NOTE, None) is rows:
        return
    setattr(part, _NOTE, rows)
    for frame in _stack():  # those around it, whose hooks are hidden
        if frame.f_code.co_name == "checkpoint" and frame.f_code.co_filename == _FILE:
            suspended = frame.f_locals.get("gen")
            outer = suspended and suspended.gi_frame and suspended.gi_frame.f_locals["new_frame"]
            if outer:
                setattr(outer, _NOTE, rows)


def adapters_of_repeated() -> Any:
    """The adapters of the forward that the running backward repeats, None for the active ones.

    Raises:
        RuntimeError: nothing is known of it, or an adapter has been removed since.
    """
    for frame in _stack():
        part = _context(frame, "backward")
        if part is not None and _has_setup(part):
            break
        if frame.f_code.co_name == "unpack_hook" and frame.f_code.co_filename == _FILE:
            part = frame.f_locals["frame"]
        if part is not None:
            found = getattr(part, _NOTE, None)
            if found is not None:
                found.check_there()
                remember(found)  # parts within this one run for the first time
            return found
    raise RuntimeError(
        "lora_ext.use_adapters: expected to know the adapters of a forward that a backward "
        "repeats, but neither torch.utils.checkpoint repeats it nor an autograd function whose "
        "forward(ctx, ...) ran it before; use torch.utils.checkpoint, also with models that had "
        "such blocks before"
    )


def _context(frame: FrameType, method: str) -> Any:
    """The context of an autograd function whose method a frame runs, else None."""
    code = frame.f_code
    if code.co_name != method or not code.co_argcount or code.co_varnames[0] == "self":
        return None
    first = frame.f_locals.get(code.co_varnames[0])
    return first if isinstance(first, torch._C._FunctionBase) else None


def _has_setup(context: Any) -> bool:
    """Whether the function's forward had no context, on which to note something."""
    base = torch.autograd.Function.setup_context
    return context._forward_cls.setup_context is not base


def _part_of_hooks() -> Any:
    """The frame of checkpoint.py whose hooks pack what is saved now, if there is one."""
    hooks = _top_hooks(False)
    if hooks is None:
        return None
    code = getattr(hooks[0], "__code__", None)
    if code is None or code.co_filename != _FILE or "frame" not in code.co_freevars:
        return None
    return hooks[0].__closure__[code.co_freevars.index("frame")].cell_contents


def _stack() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
