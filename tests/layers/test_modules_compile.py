"""A compiled layer of ours is one graph with eager's bits, whatever surrounds it or changes in it.

`contract/test_compile` has the layers and states that PEFT has, too.
"""

import copy

import pytest
import torch
from step_helpers import (
    OUT,
    ROWS,
    UNTRAINED,
    adapter_gradients,
    assert_same,
    assert_trained,
    block,
    linear,
    make,
    run,
    several,
)
from torch import nn

import lora_ext

pytestmark = pytest.mark.usefixtures("forget_graphs")


OWN = [
    "batch",
    "one row",
    "no bias",
    "pissa",
    "olora",
    "several, one scaling",
    "several, other dropout",
    "merged lora_bias",
    "disabled",
    "strided convolution",
    "block",
]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", OWN)
def test_compiled_layer_is_one_graph_with_the_same_bits(device, counter, name, dropout):
    module, x = make(name, dropout, device)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    eager = run(module, module, x)
    if name in UNTRAINED:
        assert all(value is None for value in adapter_gradients(eager).values())
    else:
        assert_trained(eager)
    assert_same(run(compiled, module, x), eager)
    # A second call draws other masks, by eager's generator, and finds the graph.
    assert_same(run(compiled, module, x, seed=8), run(module, module, x, seed=8))
    assert counter.frame_count == 1


def test_compiled_training_is_eager_training(counter):
    """Ten steps of an optimizer: the same parameters, bit for bit, from one graph."""
    models = [block(dropout=0.4), block(dropout=0.4)]
    models[1].load_state_dict(models[0].state_dict())
    steps = [models[0], torch.compile(models[1], backend=counter, fullgraph=True)]
    ids = torch.randint(11, (10, 3, 7))
    for model, step in zip(models, steps, strict=True):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(lora_ext.models.lora_plus_groups(model, 0.01))
        for batch in ids:
            step(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert counter.frame_count == 1


# ---- adapters changed inside the compiled function ----


@pytest.mark.parametrize("whole_model", [False, True])
def test_adapters_disabled_inside_one_graph(counter, whole_model):
    """The model and its reference in one step, as in preference optimization."""
    model = nn.Sequential(linear(0.4), nn.Linear(OUT, 4))

    def step(x):
        disabling = lora_ext.disable_adapter(model) if whole_model else model[0].disable_adapter()
        with disabling:
            reference = model(x)
        return model(x) - reference

    x = torch.randn(ROWS)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for _ in range(2):
        eager = run(step, model, x)
        assert_trained(eager)
        assert_same(run(compiled, model, x), eager)
        assert model[0].adapters_enabled
    assert counter.frame_count == 1


def test_adapters_switched_and_merged_inside_a_compiled_function(counter):
    """Graph breaks, and the right result; fullgraph refuses."""
    layer = several().eval()

    def step(x):
        layer.set_adapter("second")
        first = layer(x)
        layer.set_adapter(("default", "third"))
        second = layer(x)
        layer.merge()
        third = layer(x)
        layer.unmerge()
        return torch.stack([first, second, third])

    x = torch.randn(ROWS)
    eager = step(x)
    assert not torch.equal(eager[0], eager[1])
    assert torch.equal(torch.compile(step, backend=counter)(x), eager)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="requires_grad"):
        torch.compile(step, backend=counter, fullgraph=True)(x)


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
