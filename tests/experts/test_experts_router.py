"""Routers whose matrix has adapters, alone and beside adapted experts."""

import pytest
import torch
from expert_helpers import SmallConfig, assert_close, make_experts, make_routes
from helpers import BF16, F64
from peft import LoraConfig, get_peft_model
from peft_helpers import accelerated, plain_copy, randomize, reasons
from torch import nn


def routed(targets=("gate.weight", "experts.gate_up_proj", "experts.down_proj"), dtype=F64):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Qwen3MoeTopKRouter(SmallConfig())
            self.experts = make_experts("plain")

        def forward(self, x):
            _, weights, index = self.gate(x)
            return self.experts(x, index, weights.to(x.dtype))

    base = Routed().to(dtype)
    nn.init.normal_(base.gate.weight)
    words = {"r": 3, "target_modules": [], "target_parameters": list(targets)}
    names = ("x", "y")
    model = get_peft_model(base, LoraConfig(**words), "x", autocast_adapter_dtype=dtype == BF16)
    model.add_adapter("y", LoraConfig(**words), autocast_adapter_dtype=dtype == BF16)
    model.base_model.set_adapter(list(names))
    return randomize(model)


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_a_router_has_pefts_bits(dtype):
    """It compares logits: another rounding would choose another expert."""
    model = routed(["gate.weight"], dtype)
    fast = accelerated(model)
    assert reasons(fast) == {("added", "the module is called with W + B A, as PEFT makes it")}
    calls = []
    fast.base_model.model.gate.get_base_layer().register_forward_hook(lambda *_: calls.append(1))
    found, exact = [], []
    for one, into in ((model, exact), (fast, found)):
        x = make_routes(33, dtype=dtype)[0].requires_grad_()
        out = one.base_model.model.gate(x)
        (out[0].sum() + (out[1] ** 2).sum()).backward()
        into += [*out, x.grad, *(p.grad for p in one.parameters() if p.requires_grad)]
    assert calls == [1] and len(found) == 8
    assert all(torch.equal(*pair) for pair in zip(found, exact, strict=True))
    assert "weight" in fast.base_model.model.gate.get_base_layer()._parameters


def test_router_and_experts_together():
    model = routed()
    fast = accelerated(model)
    assert {path for path, _ in reasons(fast)} == {"added", "fused"}
    outcomes = []
    for one in (model, fast, plain_copy(fast)):
        one.zero_grad()
        x = make_routes(33)[0].requires_grad_()
        y = one(x)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
        outcomes.append({"y": y.detach(), "dx": x.grad, **grads})
    assert_close(outcomes[1], outcomes[0], 1e-11)
    assert_close(outcomes[2], outcomes[0], 1e-14)
