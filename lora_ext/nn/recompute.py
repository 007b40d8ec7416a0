"""Remembers the adapters of forwards that activation checkpointing repeats in a backward.

`torch.utils.checkpoint` runs a part of the model again when its gradients are computed, usually
after the block of `lora_ext.use_adapters` was left, or within another block. So the first run
stores the block's adapters on an object that represents the part. With use_reentrant=True this is
the context of the autograd function, as for any other autograd function that runs a part in its
forward and again in its backward; with use_reentrant=False it is the frame of checkpoint.py. Both
live as long as the graph. The second run finds them on its call stack.
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
    """Stores the adapters on the checkpointed parts that are running for the first time.

    Such a run is recognised as follows: in the forward of an autograd function gradients are not
    recorded, although the block records them; with use_reentrant=False, hooks pack saved tensors.
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
    for frame in _stack():  # the enclosing parts, whose hooks are hidden
        if frame.f_code.co_name == "checkpoint" and frame.f_code.co_filename == _FILE:
            suspended = frame.f_locals.get("gen")
            outer = suspended and suspended.gi_frame and suspended.gi_frame.f_locals["new_frame"]
            if outer:
                setattr(outer, _NOTE, rows)


def adapters_of_repeated() -> Any:
    """The adapters of the forward that the running backward repeats, None for the active ones.

    Raises:
        RuntimeError: nothing was stored for it, or an adapter was removed in the meantime.
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
                remember(found)  # nested parts run for the first time
            return found
    raise RuntimeError(
        "lora_ext.use_adapters: expected to know the adapters of a forward that a backward "
        "repeats, but neither torch.utils.checkpoint repeats it nor an autograd function whose "
        "forward(ctx, ...) ran it before; use torch.utils.checkpoint, also with models that had "
        "such blocks before"
    )


def _context(frame: FrameType, method: str) -> Any:
    """The context of the autograd function whose method a frame runs, else None."""
    code = frame.f_code
    if code.co_name != method or not code.co_argcount or code.co_varnames[0] == "self":
        return None
    first = frame.f_locals.get(code.co_varnames[0])
    return first if isinstance(first, torch._C._FunctionBase) else None


def _has_setup(context: Any) -> bool:
    """Whether the function has setup_context: its forward has no context to store anything on."""
    base = torch.autograd.Function.setup_context
    return context._forward_cls.setup_context is not base


def _part_of_hooks() -> Any:
    """The frame of checkpoint.py whose hooks pack saved tensors now, or None."""
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
