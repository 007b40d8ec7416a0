"""A frozen stack of matrices, such as the experts of a mixture, that is not stored as floating
values: its matrices are dequantised one at a time, or by slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..dtypes import HALVES
from . import workspace
from .codes import Codes
from .weight import dense

# The most that a slice of several matrices takes, dequantised.
SLICE_BYTES = 1 << 28


class QuantizedStack:
    """Matrices ``[E, out, in]`` in their stored form, in the place of a tensor of this shape.

    Attributes:
        codes: the stored form.
        is_transposed: whether a stored matrix is ``[in, out]``.
        format: the name of the form, for messages.
        sizes: E, and the rows and columns of each matrix, as they are stored.
        device: its device.
        dtype: the dtype of the dequantised matrices.
        shares: whether slices are in the memory that all layers share. A stack of a traced program
            has none to share: torch.compile may run that with a CUDA graph's memory, in which
            nothing but results may live on.
    """

    requires_grad = False

    def __init__(self, codes: Codes, is_transposed: bool = False, shares: bool = True) -> None:
        self.codes, self.is_transposed, self.shares = codes, is_transposed, shares
        self.sizes: tuple[int, int, int] = codes.shape
        self.format, self.device, self.dtype = codes.format, codes.device, codes.dtype

    def stored(self, number: int) -> Codes:
        """One matrix, as it is stored; no other matrix is read."""
        return self.codes.part(number)

    def tensors(self) -> list[Tensor]:
        """Those that the matrices are read from, as of a `QuantizedWeight`."""
        return self.codes.flat()[0]

    @contextmanager
    def matrix(self, number: int, x: Tensor) -> Iterator[Tensor]:
        """Within a block, one matrix ``[out, in]`` in the dtype of x, which it is multiplied with.

        The tensor is a workspace that is overwritten later: it must not be used after the block.
        """
        with dense(self.stored(number), x) as values:
            yield values.t() if self.is_transposed else values

    def slices(self, x: Tensor, offs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """All matrices, a slice after the other: (the number of its first, the matrices
        ``[count, out, in]`` in the dtype of x), in a workspace that the next one overwrites.

        One launch dequantises a slice, and the host reads nothing: matrix e is that of the rows
        from offs[e - 1] to offs[e], int32, and need not be written if there are none. All slices
        have the same number of matrices but the last.
        """
        count = self.slice_size
        with workspace.lent((count, *self.sizes[1:]), x, self.shares) as buffer:
            for first in range(0, len(self), count):
                part = self.codes.parts(first, min(count, len(self) - first))
                part.own_rows = {"offs": offs, "first": first, "experts": part.shape[0]}
                values = part.dequantize(x.dtype, buffer[: part.shape[0]])
                yield first, values.transpose(1, 2) if self.is_transposed else values

    @property
    def has_slices(self) -> bool:
        """Whether the kernels that multiply by slices take them."""
        return self.dtype in HALVES and self.codes.is_by_kernel()

    @property
    def slice_size(self) -> int:
        """Matrices of a slice: at least one, and as alike as whole numbers can be."""
        most = max(1, SLICE_BYTES // max(1, self.matrix_bytes))
        return math.ceil(len(self) / max(1, math.ceil(len(self) / most)))

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one dequantised matrix."""
        return self.sizes[1] * self.sizes[2] * self.dtype.itemsize

    # Of a tensor.

    @property
    def shape(self) -> tuple[int, int, int]:
        count, rows, columns = self.sizes
        return (count, columns, rows) if self.is_transposed else self.sizes

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    def __len__(self) -> int:
        return self.sizes[0]

    def transpose(self, first: int, second: int) -> QuantizedStack:
        """The same stack of transposed matrices."""
        assert {first, second} == {1, 2}
        return QuantizedStack(self.codes, not self.is_transposed, self.shares)

    def new_empty(self, *sizes: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*sizes, dtype=dtype or self.dtype, device=self.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.format}, {self.device})"


_kept: Any = WeakIdKeyDictionary()


def kept(holder: Any, name: str, key: tuple, make: Callable[[], Any]) -> Any:
    """What `make` returned for a name of the holder while the key is the same: a forward asks a
    dozen times, and checking tensors takes 15 us. Neither what `make` returns nor the key may refer
    to the holder, and the holder must not be a parameter: torch does not move a parameter of a
    tensor subclass that has a weak reference."""
    of_holder = _kept.setdefault(holder, {})
    found = of_holder.get(name)
    if found is None or not _is_same(found[0], key):
        found = of_holder[name] = (key, make())
    return found[1]


def _is_same(first: tuple, second: tuple) -> bool:
    """Equality of properties, and identity of tensors."""
    return len(first) == len(second) and all(
        a is b if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True)
    )
