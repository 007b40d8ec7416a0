"""Memory for one dequantised weight at a time: one tensor for each device, stream and dtype, which
all layers share and the largest of them sizes.

It stays, since mapping and clearing the pages of a fresh one takes a CPU as long as writing the
weight. A thread that finds it in use gets another, of which the larger is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_kept: dict[Any, Tensor] = {}


def is_shared(x: Tensor) -> bool:
    """Whether a call on x can use the shared memory: not where it is traced, whose graph has memory
    of its own, nor on meta, which needs none, nor while a CUDA graph is captured, which must not
    see it replaced."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def take(count: int, x: Tensor) -> Tensor:
    """A flat tensor of at least `count` elements of x's dtype, the caller's until `give`."""
    # popped, not read: whoever comes meanwhile finds none
    found = _kept.pop(_key(x), None)
    if found is not None and found.numel() >= count:
        return found
    del found
    with torch.inference_mode(False):
        return torch.empty(count, dtype=x.dtype, device=x.device)


def give(buffer: Tensor) -> None:
    """Back to those that are shared."""
    key = _key(buffer)
    other = _kept.get(key)
    if other is None or other.numel() < buffer.numel():
        _kept[key] = buffer


def nbytes(device: torch.device | str | None = None) -> int:
    """Bytes that are kept, on a device or on all."""
    device = None if device is None else torch.device(device)
    return sum(b.nbytes for b in list(_kept.values()) if device is None or b.device == device)


def release() -> None:
    """Frees what is kept; the next layer allocates it anew."""
    _kept.clear()


def _key(tensor: Tensor) -> Any:
    device = tensor.device
    # Work on a stream is in order, so that a weight is read before the next one is written.
    stream = torch.cuda.current_stream(device).cuda_stream if tensor.is_cuda else 0
    return device, stream, tensor.dtype
