"""PEFT's layers over quantised bases: bitsandbytes in 8 and 4 bits, torchao, HQQ.

    y = base(x) + sum over active adapters of scaling * ((drop(x) A^T) B^T + bias)

If the base multiplies by its dequantised weight, the op does so too: it dequantises into a
workspace, forward and backward. Otherwise the base's own forward runs and `lora_update` adds the
rest, without the full-size copies of x, of the update and of the base's output that PEFT makes.
Each class exists only if PEFT has the corresponding one.
"""

from __future__ import annotations

from typing import Any

from peft.import_utils import is_bnb_4bit_available, is_bnb_available, is_hqq_available
from peft.tuners.lora import torchao as peft_torchao
from torch import Tensor

from ..nn.row_adapters import current_row_adapters
from . import mixed_batch
from .linear import computed, linear_path


def forward_over(theirs: Any) -> Any:
    """The forward of a class that replaces `theirs`. It calls `theirs` by name: in a bound method
    that outlives `decelerate`, self is of PEFT's class."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if getattr(self, "row_adapters", None) is not None:  # absent after `decelerate`
            rows = current_row_adapters(self)
            if rows is not None:
                return mixed_batch.linear(self, theirs, x, rows, args, kwargs)
        if not (args or kwargs) and type(self) is not theirs:
            y = computed(self, x, linear_path(self, x))
            if y is not None:
                return y
        return theirs.forward(self, x, *args, **kwargs)

    return forward


class _Quantized(mixed_batch.ByRow):
    """A mix-in placed before PEFT's class."""

    def path(self, rows: int | None = None) -> tuple[str, str]:
        """How the next forward is computed, and why."""
        if self.row_adapters is not None and current_row_adapters(self) is not None:
            return mixed_batch.linear_path(self, current_row_adapters(self))
        path = linear_path(self, None)
        return path.name, path.reason


class TorchaoLoraLinear(_Quantized, peft_torchao.TorchaoLoraLinear):
    """`peft.tuners.lora.torchao.TorchaoLoraLinear` with another forward."""

    forward = forward_over(peft_torchao.TorchaoLoraLinear)


CLASSES: dict[type, type] = {peft_torchao.TorchaoLoraLinear: TorchaoLoraLinear}

if is_bnb_available():
    from peft.tuners.lora import bnb as peft_bnb

    class Linear8bitLt(_Quantized, peft_bnb.Linear8bitLt):
        """`peft.tuners.lora.bnb.Linear8bitLt` with another forward."""

        forward = forward_over(peft_bnb.Linear8bitLt)

    CLASSES[peft_bnb.Linear8bitLt] = Linear8bitLt

    if is_bnb_4bit_available():

        class Linear4bit(_Quantized, peft_bnb.Linear4bit):
            """`peft.tuners.lora.bnb.Linear4bit` with another forward."""

            forward = forward_over(peft_bnb.Linear4bit)

        CLASSES[peft_bnb.Linear4bit] = Linear4bit

if is_hqq_available():
    from peft.tuners.lora import hqq as peft_hqq

    class HqqLoraLinear(_Quantized, peft_hqq.HqqLoraLinear):
        """`peft.tuners.lora.hqq.HqqLoraLinear` with another forward."""

        forward = forward_over(peft_hqq.HqqLoraLinear)

    CLASSES[peft_hqq.HqqLoraLinear] = HqqLoraLinear
