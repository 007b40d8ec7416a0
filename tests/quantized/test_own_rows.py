"""Models with quantised layers and adapters of this package: an adapter for each row, and pools."""

import copy

import pytest
import torch
from own_helpers import FEW, Net, adapted, base, make_x
from torch import nn

import lora_ext
from lora_ext import AdapterPool, LoraConfig, unload
from lora_ext.nn import LoRAQuantizedLinear

NAMES = ["a", None, "b", "a", "b", None]


@pytest.mark.parametrize("kind", FEW)
def test_a_pool(kind, tmp_path):
    """Served without gradients from the slots, trained from their views, as adapters of the model
    itself."""
    model, x = Net(kind), make_x(lead=(6, 12))
    wanted_model = adapted(adapted(Net(kind), "a"), "b", r=4, lora_alpha=3.0)
    for name in ("a", "b"):
        lora_ext.save_adapter(wanted_model, tmp_path / name, name)
    pool = AdapterPool(model, capacity=3, max_rank=8)
    assert len(pool.layers) == 3 and isinstance(model.up, LoRAQuantizedLinear)
    plain = Net(kind)(x)
    assert torch.equal(model(x), plain)
    for name in ("a", "b"):
        pool.add_adapter(name, tmp_path / name)
    pool.add_adapter("new", LoraConfig("all-linear", r=2))
    for mode in (True, False):
        model.train(mode)
        wanted_model.train(mode)
        with lora_ext.use_adapters(wanted_model, NAMES):
            wanted = wanted_model(x)
        with lora_ext.use_adapters(model, NAMES):
            found = model(x)
            with torch.no_grad():
                served = model(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(served, wanted, rtol=1e-4, atol=1e-3)
    with lora_ext.use_adapters(model, ["new"] * 6):
        model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in pool.parameters("new"))
    pool.save_adapter("b", tmp_path / "out")
    again = lora_ext.load_adapter(Net(kind), tmp_path / "out")
    assert torch.equal(again.up.lora_a["default"], model.up.pool.slots["b"][0])
    pool.delete_adapter("a")
    assert copy.deepcopy(model).up.pool is not model.up.pool
    unload(model)
    assert type(model.up) is type(base(kind)) and not hasattr(model.up, "pool")


@pytest.mark.parametrize("kind", FEW)
def test_a_compiled_pool(kind):
    x = make_x(lead=(6, 12))
    model = Net(kind).eval()
    pool = AdapterPool(model, capacity=2, max_rank=8)
    pool.add_adapter("a", LoraConfig("all-linear", r=4))
    for parameter in pool.parameters("a"):
        nn.init.normal_(parameter)
    torch._dynamo.reset()
    with lora_ext.use_adapters(model, ["a", None] * 3), torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-2)
