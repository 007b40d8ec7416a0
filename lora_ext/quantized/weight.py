"""A frozen weight that is not stored as floating values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import workspace


class QuantizedWeight(ABC):
    """The weight of a quantised layer in its stored form, and its conversion to ``[out, in]``.

    `lora_linear` accepts one instead of the weight: it writes the weight into a workspace,
    multiplies by it, and does so again in backward. No tensor of full size is kept.

    Attributes:
        format: the name of the form, for messages.
        shape: ``(out, in)``.
        device: its device.
        dtype: the default dtype in which its library dequantises it.
    """

    format: str
    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight ``[out, in]`` in `dtype`, rounded once, as its library computes it.

        Args:
            dtype: float32, bfloat16 or float16.
            out: contiguous ``[out, in]`` in `dtype`, which may be written and returned; to be
                passed only if `writes` is true.
        """

    def tensors(self) -> Sequence[Tensor]:
        """The tensors that `dequantize` reads. Backward raises an error if one of them was changed
        in place after forward; by default there are none to check."""
        return ()

    def writes(self, dtype: torch.dtype) -> bool:
        """Whether `dequantize` writes into `out`; otherwise it returns a new tensor."""
        return False

    @property
    def requires_grad(self) -> bool:
        """False: quantised weights are frozen."""
        return False

    def workspace_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that a layer needs besides its saved tensors while it runs."""
        return self.shape[0] * self.shape[1] * dtype.itemsize

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.format}, {self.device})"


class WrittenWeight(QuantizedWeight):
    """A weight that is written into a tensor.

    Attributes:
        is_cast: whether its library rounds it to `dtype` before it is cast to another one.
    """

    is_cast = False

    def writes(self, dtype: torch.dtype) -> bool:
        return dtype == self.dtype or not self.is_cast

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if not self.writes(dtype):
            return self.dequantize(self.dtype).to(dtype)
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        if self.device.type != "meta" and out.numel():  # scales may be on another device than meta
            self._write(out)
        return out

    @abstractmethod
    def _write(self, out: Tensor) -> None:
        """Writes W into out, contiguous ``[out, in]`` of some elements."""


class dense:
    """Within a block, the weight as a tensor in the dtype of x, the input of the call.

        with dense(weight, x) as matrix:
            y = x @ matrix.t()

    The tensor is a workspace that is overwritten later: it must not be used after the block.
    """

    def __init__(self, weight: QuantizedWeight, x: Tensor) -> None:
        self.weight, self.x = weight, x
        self.buffer: Tensor | None = None

    def __enter__(self) -> Tensor:
        weight, x = self.weight, self.x
        if not weight.writes(x.dtype):
            return weight.dequantize(x.dtype)
        if not workspace.is_shared(x):
            return weight.dequantize(x.dtype, x.new_empty(weight.shape))
        rows, cols = weight.shape
        self.buffer = workspace.take(rows * cols, x)
        try:
            return weight.dequantize(x.dtype, self.buffer[: rows * cols].view(rows, cols))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        if self.buffer is not None:
            workspace.give(self.buffer)
            self.buffer = None


class Versions:
    """The version counters, at some time, of the tensors from which a weight is read.

    autograd records them for a tensor that is saved for backward; a quantised weight is no tensor.
    """

    def __init__(self, weight: Any) -> None:  # or a QuantizedStack
        # Inference tensors have no version counter; a traced graph has its own checks.
        found = () if torch.compiler.is_compiling() else weight.tensors()
        self.found = [(tensor, tensor._version) for tensor in found if not tensor.is_inference()]

    def check(self) -> None:
        """Raises RuntimeError if one was changed since then."""
        if any(tensor._version != version for tensor, version in self.found):
            raise RuntimeError(
                "lora_ext: expected in backward the quantised weight of forward, but it was "
                "changed in place between forward and backward; change it after backward, or run "
                "forward again"
            )
