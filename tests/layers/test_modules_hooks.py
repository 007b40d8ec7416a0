"""Hooks of a layer and of its factors, in eager mode and compiled."""

import copy

import pytest
import torch
from step_helpers import OUT, make, run

pytestmark = pytest.mark.usefixtures("forget_graphs")


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
