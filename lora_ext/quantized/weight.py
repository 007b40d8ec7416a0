"""A frozen weight that is not stored as floating values, and a layer of one as a call's base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_state import compute_dtype, is_autocast
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


@contextmanager
def dense(weight: QuantizedWeight, x: Tensor) -> Iterator[Tensor]:
    """Within a block, the weight as a tensor in the dtype of x, the input of the call.

        with dense(weight, x) as matrix:
            y = x @ matrix.t()

    The tensor is a workspace that is overwritten later: it must not be used after the block.
    """

    if not weight.writes(x.dtype):
        yield weight.dequantize(x.dtype)
    else:
        with workspace.lent(weight.shape, x) as out:
            yield weight.dequantize(x.dtype, out)


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


class QuantizedBase(NamedTuple):
    """The base of one call.

    Attributes:
        weight: the weight that x is multiplied by.
        bias: ``[out]`` or None.
        dtype: the dtype of the product; x is cast to it.
        y_dtype: the dtype of the y that the layer returns.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    dtype: torch.dtype
    y_dtype: torch.dtype

    @property
    def call_bias(self) -> Tensor | None:
        """The bias for the op, in the product's dtype or float32."""
        bias = self.bias
        if bias is None or bias.dtype in (self.dtype, torch.float32):
            return bias
        return bias.to(self.dtype)

    @property
    def note(self) -> str:
        """The note for `lora_ext.explain`."""
        mib = self.workspace_bytes() / 2**20
        return f"{self.weight.format}, dequantised into {mib:.3g} MiB"

    def workspace_bytes(self) -> int:
        """Bytes of the dequantised weight."""
        return self.weight.workspace_bytes(self.dtype)


def stored_base(
    weight: QuantizedWeight, bias: Tensor | None, x: Tensor | None, reason: str
) -> QuantizedBase | str:
    """The base of a product that never casts the weight to x's dtype; `reason` if x's differs."""
    dtype = weight.dtype
    if x is not None:
        if x.dtype != dtype and not is_autocast(x):
            return reason
        dtype = compute_dtype(x)
    return QuantizedBase(weight, bias, dtype, dtype)
