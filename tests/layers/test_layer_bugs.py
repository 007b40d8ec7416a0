"""Bugs that other projects' LoRA layers had, where our own layers alone could have them.

Names and docstrings have the peers' public reports. `contract/test_bugs` has those that PEFT's
accelerated layers could have, too.
"""

import gc
import weakref

import pytest
import torch
from adapter_helpers import EVERYTHING, make_ids, make_zoo
from helpers import BF16
from layer_helpers import bits, delta, make_layer, randomize
from torch import nn

import lora_ext
from lora_ext import LoRAConfig, LoRALinear, apply_lora
from lora_ext.models import lora_layers
from lora_ext.nn import AdapterSpec


def test_trl_6688_no_drift_in_1000_cycles():
    """Adding and subtracting in bfloat16 changed 77% of the weights."""
    layer = make_layer("linear", {"a": AdapterSpec(4, 6.0), "b": AdapterSpec(3, 2.0)}, BF16)
    before, naive = bits(layer.weight).clone(), layer.weight.detach().clone()
    layer.merge()
    first = layer.merged_weight.clone()
    for i in range(1000):
        layer.set_adapter("ab"[i % 2])
        layer.merge()
        layer.unmerge()
        if i < 20:
            update = delta(layer, "ab"[i % 2]).to(BF16)
            naive.add_(update).sub_(update)
    assert torch.equal(bits(layer.weight), before)
    assert (bits(naive) != before).float().mean() > 0.1  # what must not happen
    layer.set_adapter(["a", "b"])
    layer.merge()
    assert torch.equal(layer.merged_weight, first)


def test_lora_34_61_train_through_a_parent_unmerges():
    """train() of the model did not call that of its layers: merged weights stayed."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = randomize(apply_lora(make_zoo(), LoRAConfig(EVERYTHING, 3, 4.0)))

        def train(self, mode=True):
            return super().train(mode)

    parent, ids = Parent(), make_ids()
    y = parent.eval().inner(ids)
    assert {layer.path for layer in lora_ext.explain(parent)} == {"library"}
    lora_ext.models.merge(parent)
    parent.eval()
    assert {layer.path for layer in lora_ext.explain(parent)} == {"merged"}
    assert torch.allclose(parent.inner(ids), y, rtol=1e-10)
    parent.train()
    assert "merged" not in {layer.path for layer in lora_ext.explain(parent)}
    parent.inner(ids).sum().backward()
    assert all(p.grad is not None for p in parent.parameters() if p.requires_grad)
    assert torch.equal(parent.eval().inner(ids), y)


@pytest.mark.parametrize("targets", [["emb"], ["head"], ["emb", "head"]])
def test_peft_2018_merging_beside_a_tied_weight(targets):
    """Merged into a tied embedding, the update was in the output layer too."""
    model = nn.ModuleDict({"emb": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model.head.weight = model.emb.weight
    before = bits(model.emb.weight).clone()
    randomize(apply_lora(model, LoRAConfig(targets, 2)))
    wanted = {name: module.weight.double() for name, module in model.items()}
    wanted |= {
        name: layer.weight.double() + delta(layer, "default") for name, layer in lora_layers(model)
    }
    lora_ext.models.merge(model)
    assert model.emb.weight is model.head.weight
    assert torch.equal(bits(model.emb.weight), before)
    lora_ext.models.merge_and_unload(model)
    for name, module in model.items():
        assert torch.allclose(module.weight.double(), wanted[name], atol=1e-6)


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
