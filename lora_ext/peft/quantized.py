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

from .layer import run
from .linear import OverLinear


def forward_over(theirs: Any) -> Any:
    """The forward of a class that replaces `theirs`. It calls `theirs` by name: in a bound method
    that outlives `decelerate`, self is of PEFT's class."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(self) is theirs:
            return theirs.forward(self, x, *args, **kwargs)
        return run(self, x, args, kwargs)

    return forward


class TorchaoLoraLinear(OverLinear, peft_torchao.TorchaoLoraLinear):
    """`peft.tuners.lora.torchao.TorchaoLoraLinear` with another forward."""

    forward = forward_over(peft_torchao.TorchaoLoraLinear)


CLASSES: dict[type, type] = {peft_torchao.TorchaoLoraLinear: TorchaoLoraLinear}

if is_bnb_available():
    from peft.tuners.lora import bnb as peft_bnb

    class Linear8bitLt(OverLinear, peft_bnb.Linear8bitLt):
        """`peft.tuners.lora.bnb.Linear8bitLt` with another forward."""

        forward = forward_over(peft_bnb.Linear8bitLt)

    CLASSES[peft_bnb.Linear8bitLt] = Linear8bitLt

    if is_bnb_4bit_available():

        class Linear4bit(OverLinear, peft_bnb.Linear4bit):
            """`peft.tuners.lora.bnb.Linear4bit` with another forward."""

            forward = forward_over(peft_bnb.Linear4bit)

        CLASSES[peft_bnb.Linear4bit] = Linear4bit

if is_hqq_available():
    from peft.tuners.lora import hqq as peft_hqq

    class HqqLoraLinear(OverLinear, peft_hqq.HqqLoraLinear):
        """`peft.tuners.lora.hqq.HqqLoraLinear` with another forward."""

        forward = forward_over(peft_hqq.HqqLoraLinear)

    CLASSES[peft_hqq.HqqLoraLinear] = HqqLoraLinear
