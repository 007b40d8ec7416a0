"""PEFT's layers over quantised bases: bitsandbytes in 8 and 4 bits, torchao, HQQ.

    y = base(x) + sum over active adapters of scaling * ((drop(x) A^T) B^T + bias)

If the base multiplies by its dequantised weight, the op does so too: it dequantises into a
workspace, forward and backward. Otherwise the base's own forward runs and `lora_update` adds the
rest, without the full-size copies of x, of the update and of the base's output that PEFT makes.
Each class exists only if PEFT has the corresponding one.
"""

from __future__ import annotations

from peft.import_utils import is_bnb_4bit_available, is_bnb_available, is_hqq_available
from peft.tuners.lora import torchao as peft_torchao

from .layer import forward_over
from .linear import OverLinear

_THEIRS: list[type] = [peft_torchao.TorchaoLoraLinear]

if is_bnb_available():
    from peft.tuners.lora import bnb as peft_bnb

    _THEIRS.append(peft_bnb.Linear8bitLt)
    if is_bnb_4bit_available():
        _THEIRS.append(peft_bnb.Linear4bit)

if is_hqq_available():
    from peft.tuners.lora import hqq as peft_hqq

    _THEIRS.append(peft_hqq.HqqLoraLinear)


def _class_over(theirs: type) -> type:
    name = theirs.__name__
    doc = f"`{theirs.__module__}.{name}` with another forward."
    words = {"__module__": __name__, "__doc__": doc, "forward": forward_over(theirs)}
    return type(name, (OverLinear, theirs), words)


CLASSES = {theirs: _class_over(theirs) for theirs in _THEIRS}
globals().update({kind.__name__: kind for kind in CLASSES.values()})  # where pickle finds them
