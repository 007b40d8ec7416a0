"""Layers under functional_call and torch.func: what computes, what is refused."""

import copy
from functools import partial

import pytest
import torch
from step_helpers import IN, OUT, assert_same, make
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

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


@pytest.mark.parametrize("name", ["linear", "several", "lora_bias", "merged", "convolution"])
def test_vmap_over_x(name):
    module, x = make(name, 0.0)
    batch = torch.stack([x, x + 1, x * 2])
    with torch.no_grad():
        one_by_one = torch.stack([module(one) for one in batch])
        torch.testing.assert_close(vmap(module)(batch), one_by_one, rtol=1e-5, atol=1e-5)


def test_vmap_over_adapters():
    layer, x = make("linear", 0.0)
    stacks = {key: torch.stack([p, p + 1, p * 2]) for key, p in layer.named_parameters()}
    stacks = {key: value.detach() for key, value in stacks.items() if key.startswith("lora_")}

    def call(values):
        return functional_call(layer, values, (x,))

    loop = [call({key: stack[i] for key, stack in stacks.items()}) for i in range(3)]
    torch.testing.assert_close(vmap(call)(stacks), torch.stack(loop), rtol=1e-5, atol=1e-4)


def test_vmap_dropout():
    """Refused unless the caller says what to do; then the masks differ, or are one."""
    layer = LoRALinear(IN, OUT, r=1, lora_alpha=1, lora_dropout=0.5, bias=False)
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
@pytest.mark.parametrize("name", ["linear", "several", "pissa", "lora_bias", "convolution"])
def test_func_grad(name, per_sample):
    """By torch's own products, since there is no functional transform of a C++ Function."""
    module, x = make(name, 0.0)
    values = {
        key: value.detach() for key, value in module.named_parameters() if value.requires_grad
    }

    def loss(values, x):
        return functional_call(module, values, (x,)).square().sum()

    for one in x if per_sample else [x]:
        module.zero_grad()
        loss(dict(module.named_parameters()), one).backward()
        wanted = {key: module.get_parameter(key).grad for key in values}
        found = grad(loss)(values, one)
        if per_sample:
            batch = torch.stack([one, one * 2])
            found = {key: g[0] for key, g in vmap(grad(loss), (None, 0))(values, batch).items()}
        for key, value in found.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "several", "lora_bias"])
def test_forward_mode_and_jacobians(name):
    layer, x = make(name, 0.0)
    x = x[0].double()
    layer.double()
    tangent, y = torch.randn_like(x), layer(x)
    primal, dy = jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(primal, y)
    step = 1e-4
    slope = (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(dy, slope, rtol=1e-6, atol=1e-6)
    jacobian = jacrev(layer)(x)
    product = torch.tensordot(jacobian, tangent, dims=tangent.dim())
    torch.testing.assert_close(product, dy)
    torch.testing.assert_close(jacfwd(layer)(x), jacobian)


def test_a_block_of_rows_is_refused():
    layer, x = make("linear", 0.0)
    with (
        lora_ext.use_adapters(layer, ["default"] * len(x)),
        pytest.raises(NotImplementedError, match=r"outside of torch\.func's transforms"),
    ):
        grad(lambda x: layer(x).sum())(x)
