"""Memory for one dequantised weight at a time: one tensor for each device, stream and dtype. All
layers share it, and it has the size of the largest layer.

It is kept, since mapping and clearing the pages of a new one takes a CPU as long as writing the
weight. A thread that finds it in use gets another one; the larger of the two is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_state import is_captured

_kept: dict[Any, Tensor] = {}


def is_shared(x: Tensor) -> bool:
    """Whether a call on x can use the shared memory: not if it is traced, since a graph has its own
    memory, nor on meta, which needs none, nor while a CUDA graph is captured, since the memory may
    be replaced later."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or x.is_meta:
        return False
    return not is_captured(x)


@contextmanager
def lent(shape: Sequence[int], x: Tensor, shares: bool = True) -> Iterator[Tensor]:
    """Within a block, a contiguous tensor of the shape and of x's dtype, shared where it can be."""
    if not (shares and is_shared(x)):
        yield x.new_empty(shape)
        return
    count = prod(shape)
    buffer = take(count, x)
    try:
        yield buffer[:count].view(shape)
    finally:
        give(buffer)


def take(count: int, x: Tensor) -> Tensor:
    """A flat tensor of at least `count` elements of x's dtype, owned by the caller until `give`."""
    # pop, so that other threads do not find it meanwhile
    found = _kept.pop(_key(x), None)
    if found is not None and found.numel() >= count:
        return found
    del found
    with torch.inference_mode(False):
        return torch.empty(count, dtype=x.dtype, device=x.device)


def give(buffer: Tensor) -> None:
    """Returns a tensor to the shared ones."""
    key = _key(buffer)
    other = _kept.get(key)
    if other is None or other.numel() < buffer.numel():
        _kept[key] = buffer


def nbytes(device: torch.device | str | None = None) -> int:
    """Bytes that are kept, on a device or on all."""
    device = None if device is None else torch.device(device)
    return sum(b.nbytes for b in list(_kept.values()) if device is None or b.device == device)


def release() -> None:
    """Frees the memory that is kept; the next layer allocates it again."""
    _kept.clear()


def _key(tensor: Tensor) -> Any:
    device = tensor.device
    # Work on a stream runs in order, so a weight is read before the next one is written.
    stream = torch.cuda.current_stream(device).cuda_stream if tensor.is_cuda else 0
    return device, stream, tensor.dtype
