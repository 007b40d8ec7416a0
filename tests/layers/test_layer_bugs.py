"""Bugs that other projects' LoRA layers had, where our own layers alone could have them.

Names and docstrings have the peers' public reports. `contract/test_bugs` has those that PEFT's
accelerated layers could have, too.
"""

import gc
import weakref

import torch
from torch import nn

from lora_ext import LoRALinear
from lora_ext.nn import AdapterSpec


def test_torchtune_904_merged_and_packed_weights_are_freed():
    """A cache on methods kept every model alive. Without the collector: there are no cycles."""
    layer = LoRALinear.from_linear(nn.Linear(64, 64), r=4)
    layer.add_adapter("other", AdapterSpec(4, 6.0))
    layer.set_adapter(["default", "other"])
    layer.pack_weight(backward=True)
    layer(torch.randn(64, 64)).sum().backward()
    layer.merge()
    layer.path()
    factors = [weakref.ref(p) for t in layer.tables().values() for p in t.values()]
    merged = weakref.ref(layer.merged_weight)
    gc.collect()
    gc.disable()
    try:
        layer.unmerge()
        assert merged() is None
        for name in ("default", "other"):
            layer.delete_adapter(name)
        assert [ref() for ref in factors] == [None] * len(factors)
        watched = [weakref.ref(layer), weakref.ref(layer.weight), weakref.ref(layer.packed)]
        del layer
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()
