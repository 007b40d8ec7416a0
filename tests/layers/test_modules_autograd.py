"""Layers in autograd: inference mode, merged tensors, in-place activations on y, hooks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from step_helpers import OUT, assert_same, make, run

from lora_ext.nn import AdapterSpec

pytestmark = pytest.mark.usefixtures("forget_graphs")


def test_made_in_inference_mode():
    """A merge there leaves nothing that a later step trips over, and adapters made there train."""
    layer, x = make("lora_bias", 0.0)
    with torch.inference_mode():
        layer.eval()
        layer.merge()
        inside = layer(x)
        layer.add_adapter("second", AdapterSpec(2, 4))
    merged_step = run(layer, layer, x)
    assert torch.equal(merged_step["y"], inside)
    assert merged_step["dx"] is not None
    layer.train()
    layer.set_adapter("second")
    step = run(layer, layer, x)
    assert step["lora_b.second"].abs().max() > 0


def test_merged_tensors_are_no_part_of_a_graph():
    """A merged lora_bias too: copies are possible, and each backward is the first one."""
    layer, x = make("merged lora_bias", 0.0)
    assert not layer.merged_weight.requires_grad
    assert not layer.merged_bias.requires_grad
    copied = copy.deepcopy(layer)
    for _ in range(2):
        assert_same(run(copied, copied, x), run(layer, layer, x))


@pytest.mark.parametrize(
    "name", ["linear", "several", "lora_bias", "merged", "convolution", "one row"]
)
def test_an_in_place_activation_on_the_output(counter, name):
    """The output is nobody else's: neither an input's view nor what backward needs."""
    module, x = make(name, 0.4)
    plain = run(lambda x: F.relu(module(x)), module, x)

    def in_place(x):
        return F.relu_(module(x))

    assert_same(run(in_place, module, x), plain)
    assert_same(run(torch.compile(in_place, backend=counter, fullgraph=True), module, x), plain)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_hooks(counter, is_compiled):
    """Those of the module, before and after, and those of the factors."""
    layer, x = make("linear", 0.0)
    seen = []
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    layer.register_forward_hook(lambda *call: call[-1].tanh())
    layer.register_full_backward_hook(lambda *call: seen.append(("module", call[2][0].shape)))
    layer.lora_a["default"].register_hook(lambda gradient: gradient * 3)
    layer.lora_b["default"].register_post_accumulate_grad_hook(
        lambda factor: seen.append(("lora_b", factor.grad.shape))
    )
    function = torch.compile(layer, backend=counter) if is_compiled else layer
    hooked = run(function, layer, x)
    assert sorted(seen) == [("lora_b", (OUT, 3)), ("module", (60, OUT))]
    plain = copy.deepcopy(layer)
    for table in (plain._forward_hooks, plain._forward_pre_hooks, plain._backward_hooks):
        table.clear()
    by_hand = run(lambda x: plain(x * 2).tanh(), plain, x)
    by_hand["lora_a.default"] *= 3
    for key, value in by_hand.items():
        torch.testing.assert_close(hooked[key], value, rtol=1e-5, atol=1e-5, msg=key)
