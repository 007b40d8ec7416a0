"""A frozen stack of matrices, such as the experts of a mixture, that is not stored as floating
values: its matrices are dequantised one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .codes import Codes
from .weight import dense


class QuantizedStack:
    """Matrices ``[E, out, in]`` in their stored form, in the place of a tensor of this shape.

    Attributes:
        codes: the stored form.
        is_transposed: whether a stored matrix is ``[in, out]``.
        format: the name of the form, for messages.
        sizes: E, and the rows and columns of each matrix, as they are stored.
        device: its device.
        dtype: the dtype of the dequantised matrices.
    """

    requires_grad = False

    def __init__(self, codes: Codes, is_transposed: bool = False) -> None:
        self.codes, self.is_transposed = codes, is_transposed
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
        return QuantizedStack(self.codes, not self.is_transposed)

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
