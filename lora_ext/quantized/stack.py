"""A frozen stack of matrices, such as the experts of a mixture, that is not stored as floating
values: its matrices are dequantised one at a time."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .weight import QuantizedWeight, dense


class FlatStack(NamedTuple):
    """A stack as the arguments of an op of torch.library.

    Attributes:
        tensors: those that it is read from.
        numbers: sizes and the like.
        dtype: that of its matrices.
    """

    tensors: list[Tensor]
    numbers: list[int]
    dtype: torch.dtype


class QuantizedStack(ABC):
    """Matrices ``[E, out, in]`` in their stored form, in the place of a tensor of this shape.

    Attributes:
        format: the name of the form, for messages.
        sizes: E, and the rows and columns of each matrix, as they are stored.
        device: its device.
        dtype: the dtype of the dequantised matrices.
        is_transposed: whether a stored matrix is ``[in, out]``.
    """

    format: str
    sizes: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    is_transposed = False
    requires_grad = False

    @abstractmethod
    def stored(self, number: int) -> QuantizedWeight:
        """One matrix, as it is stored; no other matrix is read."""

    @abstractmethod
    def flat(self) -> FlatStack:
        """What `from_flat` makes the same stack of."""

    @classmethod
    @abstractmethod
    def from_flat(
        cls, tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
    ) -> QuantizedStack:
        """The stack of what `flat` returned."""

    def tensors(self) -> list[Tensor]:
        """Those that the matrices are read from, as of a `QuantizedWeight`."""
        return self.flat().tensors

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
        other = copy.copy(self)
        other.is_transposed = not self.is_transposed
        return other

    def new_empty(self, *sizes: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*sizes, dtype=dtype or self.dtype, device=self.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.format}, {self.device})"


def is_same(first: tuple, second: tuple) -> bool:
    """Equality of the properties that a stack was made of, and identity of tensors."""
    return len(first) == len(second) and all(
        a is b if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True)
    )
