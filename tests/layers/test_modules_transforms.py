"""Layers under functional_call and torch.func: what computes, what loops, what is refused."""

import copy
from functools import partial

import pytest
import torch
from step_helpers import IN, OUT, assert_same, make, run
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import lora_ext
from lora_ext import LoRALinear

pytestmark = pytest.mark.usefixtures("forget_graphs")


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", ["linear", "several", "pissa", "lora_bias"])
def test_functional_call(counter, name, is_compiled):
    layer, x = make(name, 0.4)
    values = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
    before = copy.deepcopy(layer.state_dict())
    loaded = copy.deepcopy(layer)
    loaded.load_state_dict(values)

    def call(values, x):
        return functional_call(layer, values, (x,))

    if is_compiled:
        call = torch.compile(call, backend=counter, fullgraph=True)
    results = []
    for function in (partial(call, values), loaded):
        torch.manual_seed(5)
        results.append(function(x))
    assert torch.equal(*results)
    assert_same(layer.state_dict(), before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["linear", "several", "lora_bias", "merged", "convolution"])
def test_vmap_over_x_is_a_loop(name):
    module, x = make(name, 0.0)
    batch = torch.stack([x, x + 1, x * 2])
    with torch.no_grad():
        one_by_one = torch.stack([module(one) for one in batch])
        torch.testing.assert_close(vmap(module)(batch), one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_adapters_is_a_loop():
    layer, x = make("linear", 0.0)
    stacks = {key: torch.stack([p, p + 1, p * 2]) for key, p in layer.named_parameters()}
    stacks = {key: value.detach() for key, value in stacks.items() if key.startswith("lora_")}

    def call(values):
        return functional_call(layer, values, (x,))

    loop = [call({key: stack[i] for key, stack in stacks.items()}) for i in range(3)]
    assert torch.equal(vmap(call)(stacks), torch.stack(loop))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_dropout():
    """Refused unless the caller says what to do; then the masks differ, or are one."""
    layer = LoRALinear(IN, OUT, r=1, alpha=1, dropout=0.5, bias=False)
    for tensor, value in (("weight", 0.0), ("lora_a", 1.0), ("lora_b", 1.0)):
        held = getattr(layer, tensor)
        nn.init.constant_(held if tensor == "weight" else held["default"], value)
    # x = 2^k in column k: y spells the mask in binary.
    x = torch.exp2(torch.arange(float(IN))).repeat(4, 6, 1)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(layer)(x)
        for randomness, masks in (("different", 24), ("same", 6)):
            spelled = vmap(layer, randomness=randomness)(x)[..., 0] / 2
            assert torch.equal(spelled, spelled.round())
            assert len(set(spelled.flatten().tolist())) == masks
            kept = spelled.long()[..., None] >> torch.arange(IN) & 1
            assert 0.3 < kept.float().mean().item() < 0.7


@pytest.mark.parametrize("per_sample", [False, True])
def test_func_grad_is_refused(per_sample):
    """torch has no functional transform of a C++ autograd Function; the reference has all."""
    layer, x = make("linear", 0.0)
    factors = {
        f"{table}.default": getattr(layer, table)["default"].detach()
        for table in ("lora_a", "lora_b")
    }

    def loss(factors, x):
        return functional_call(layer, factors, (x,)).square().sum()

    with pytest.raises(NotImplementedError, match=r"reference\.lora_linear_reference there"):
        (vmap(grad(loss), (None, 0)) if per_sample else grad(loss))(factors, x)

    def reference(factors, x):
        lora_a, lora_b = factors["lora_a.default"], factors["lora_b.default"]
        y = lora_ext.reference.lora_linear_reference(
            x, layer.weight, lora_a, lora_b, layer.bias, layer.adapters["default"].scaling
        )
        return y.square().sum()

    eager = run(layer, layer, x)
    for key, value in grad(reference)(factors, x).items():
        torch.testing.assert_close(value, eager[key], rtol=1e-5, atol=1e-3)


def test_forward_mode_is_refused_unless_merged():
    layer, x = make("linear", 0.0)
    with pytest.raises(NotImplementedError, match="forward-mode tangent"):
        jvp(layer, (x,), (x,))
    layer.eval()
    layer.merge()
    tangent = torch.randn_like(x)
    y, dy = jvp(layer, (x,), (tangent,))
    assert torch.equal(y, layer(x))
    torch.testing.assert_close(dy, tangent @ layer.merged_weight.T)
