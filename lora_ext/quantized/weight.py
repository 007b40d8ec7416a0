"""A frozen weight that is stored in another form than floating values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from . import workspace


class QuantizedWeight(ABC):
    """What a quantised layer keeps of its weight, and how it becomes ``[out, in]``.

    `lora_linear` takes one in the weight's place: it writes the weight into a workspace, multiplies
    by it, and does so again in backward. Nothing of full size is kept.

    Attributes:
        format: the name of the form, for people.
        shape: ``(out, in)``.
        device: where it is.
        dtype: in which its library dequantises it where nobody says another.
    """

    format: str
    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight ``[out, in]`` in a dtype, rounded once, as its library computes it.

        Args:
            dtype: float32, bfloat16 or float16.
            out: contiguous ``[out, in]`` of the dtype, which may be written and returned; only
                where `writes` says so.
        """

    def tensors(self) -> Sequence[Tensor]:
        """What `dequantize` reads. Backward refuses a weight of which one was changed in place
        since forward; by default none is watched."""
        return ()

    def writes(self, dtype: torch.dtype) -> bool:
        """Whether `dequantize` writes into `out`; else it returns a tensor of its own."""
        return False

    @property
    def requires_grad(self) -> bool:
        """False: quantised weights are frozen."""
        return False

    def workspace_bytes(self, dtype: torch.dtype) -> int:
        """What a layer needs beside its saved tensors while it runs."""
        return self.shape[0] * self.shape[1] * dtype.itemsize

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.format}, {self.device})"


class dense:
    """The weight as a tensor of the dtype of x, on which the call is, within a block.

        with dense(weight, x) as matrix:
            y = x @ matrix.t()

    The tensor is a workspace that others write to afterwards: it must not outlive the block.
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
    """How often what a weight is read from had been changed in place, at some time.

    What autograd knows of a tensor that is saved for backward; a quantised weight is none.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        # Tensors of inference mode count no changes; a graph that is traced has checks of its own.
        found = () if torch.compiler.is_compiling() else weight.tensors()
        self.found = [(tensor, tensor._version) for tensor in found if not tensor.is_inference()]

    def check(self) -> None:
        """Raises RuntimeError if one was changed since."""
        if any(tensor._version != version for tensor, version in self.found):
            raise RuntimeError(
                "lora_ext.lora_linear: expected in backward the quantised weight of forward, but "
                "it was changed in place between forward and backward; change it after backward, "
                "or run forward again"
            )
