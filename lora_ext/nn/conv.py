"""LoRAConv2d: a 1x1 convolution with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..call import Call, Decision
from ..call.apply import Slots, Update
from ..rows.row_adapters import RowAdapters
from .fused import FusedLoRALayer


class LoRAConv2d(FusedLoRALayer, nn.Conv2d):
    """A 1x1 convolution, which is a linear layer over channels, with adapters.

        y[:, :, i, j] = W x[:, :, i s, j s] + bias + the low-rank update        s: the stride

    lora_a is ``[r, in_channels]`` and lora_b ``[out_channels, r]``; PEFT stores the same numbers
    with two more dimensions of size 1. It is fastest on channels_last input, which needs no copy;
    the output is channels_last.

    The constructor takes nn.Conv2d's arguments and adds no adapter; use `add_adapter`.

    Raises:
        ValueError: the arguments are not those of a 1x1 convolution with one group and no padding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_kernel(self)
        self._init_lora()

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        super()._check_base(base)
        cls._check_kernel(base)

    @staticmethod
    def _check_kernel(conv: nn.Module) -> None:
        reason = unsupported_reason(conv)
        if reason:
            raise ValueError(f"lora_ext.nn.LoRAConv2d: {reason}")

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def base_forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.base_operands())

    def linear_forward(self, x: Tensor) -> Tensor:
        return super().base_forward(x)

    def example(self, rows: int | None, block: RowAdapters | None) -> Tensor:
        return super().example(rows, block).movedim(-1, -2).unsqueeze(-1)

    def _decide_with(self, updates: Sequence[Update] | Slots, call: Call) -> Decision:
        x, rows = call.x, call.rows
        if x.dim() not in (3, 4):
            raise RuntimeError(
                "lora_ext.nn.LoRAConv2d: expected x of shape [batch, channels, height, width] or "
                f"[channels, height, width], but got {list(x.shape)}"
            )
        if rows is not None and (x.dim() == 3 or rows.index.dim() == 2):
            raise ValueError(
                "lora_ext.use_adapters: expected a LoRAConv2d to get [batch, channels, height, "
                "width] and an index of samples [batch], but got x of shape "
                f"{list(x.shape)} and an index of shape {list(rows.index.shape)}"
            )
        found = super()._decide_with(updates, call._replace(x=self._pixels(x)))
        return found._replace(run=lambda x: found.run(self._pixels(x)).movedim(-1, -3))

    def _pixels(self, x: Tensor) -> Tensor:
        """The rows of the product ``[..., channels]``."""
        down, right = self.stride
        strided = x if down == right == 1 else x[..., ::down, ::right]
        return strided.movedim(-3, -1)


def unsupported_reason(conv: nn.Module) -> str:
    """Why this convolution is not a linear layer over channels, or ""."""
    if conv.kernel_size != (1, 1):
        return f"expected a 1x1 convolution, but got a kernel of {conv.kernel_size}"
    if conv.groups != 1:
        return f"expected a convolution with one group, but got {conv.groups}"
    if conv.padding not in ((0, 0), "same", "valid"):
        return f"expected a convolution without padding, but got padding {conv.padding}"
    return ""
