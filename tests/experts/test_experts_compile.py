"""Experts of an accelerated model under torch.compile: one graph, and the eager numbers."""

import pytest
import torch
from expert_helpers import Mixture, assert_close, make_experts, make_routes, mixture, run
from helpers import BF16, F32, F64
from peft_helpers import accelerated
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_ext

TWO = {"x": {"r": 3, "lora_alpha": 5}, "y": {"r": 2, "lora_alpha": -3}}


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_projection_whose_factors_alone_are_trained(forget_graphs, counter, name):
    """Neither x nor the router's weights have a gradient, as in a first layer."""
    model = accelerated(mixture("plain", names=[name])).base_model.model
    operands, compiled = make_routes(9), torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*operands), model(*operands))
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found, eager = (
        dict(zip(factors, torch.autograd.grad(y.square().sum(), [*factors.values()]), strict=True))
        for y in (compiled(*operands), model(*operands))
    )
    assert_close(found, eager, 1e-12)


def test_without_gradients_and_float32_adapters(device, forget_graphs, counter):
    model = accelerated(mixture(dtype=BF16, adapter_dtype=F32).to(device))
    compiled = torch.compile(model.base_model.model, backend=counter, fullgraph=True)
    operands = [each.to(device) for each in make_routes(9, dtype=BF16)]
    with torch.no_grad():
        torch.testing.assert_close(compiled(*operands), model(*operands))


@pytest.mark.parametrize("grad", [False, True])
def test_the_first_call_has_the_bits_of_the_next(grad, forget_graphs):
    """The first one follows the compilation at once, whose modes are then no longer active."""
    model = accelerated(mixture(dtype=BF16, experts=3))
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    operands = make_routes(200, experts=3, dtype=BF16)
    with torch.set_grad_enabled(grad):
        first, second = compiled(*operands), compiled(*operands)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["experts_forward", "experts_backward", "experts_sum_of_slots"])
def test_ops_keep_their_contract(name, monkeypatch):
    """What fake tensors are told is what comes back; nothing that is given is written."""
    from lora_ext.experts import autograd, ops

    monkeypatch.setattr(autograd, "passes", lambda: ops)
    given = []
    real = getattr(torch.ops.lora_ext, name).default
    own = f"_{name.removeprefix('experts_')}"

    def noted(*operands):
        given.append(operands)
        return real(*operands)

    is_of_two = isinstance(getattr(ops, own), dict)  # by whether a graph may contain it
    monkeypatch.setattr(ops, own, dict.fromkeys((True, False), noted) if is_of_two else noted)
    model = mixture("transposed, biases, interleaved", TWO)
    for p in (0.0, 0.3):
        lora_ext.accelerate(model, expert_dropout=p).train()
        run(model, *make_routes(9, dtype=F64))
    with lora_ext.use_adapters(model, ["y", "x", None]):
        run(model, *make_routes(9, dtype=F64))
    assert given
    for operands in given:
        torch.library.opcheck(real, operands, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("dtype", "kind", "sorted_by_kernels", "may"),
    [
        (BF16, "cuda", True, True),
        (BF16, "cuda", False, False),  # an adapter for each row
        (F32, "cuda", True, False),
        (F32, "cpu", False, True),
    ],
)
def test_graphs_leave_out_what_reads_the_host(dtype, kind, sorted_by_kernels, may):
    """Of CUDA graphs: torch's tag says which ops no graph may contain."""
    from lora_ext.experts import ops
    from lora_ext.experts.operands import Projection
    from lora_ext.experts.routing import Routes

    with FakeTensorMode():
        weight = torch.empty(2, 8, 8, dtype=dtype, device=kind)
        rows = torch.empty(4, dtype=torch.int32, device=kind)
        routes = Routes(rows, rows, rows, None, rows if sorted_by_kernels else None)
        assert ops._may_be_captured(Projection(weight, None, routes)) == may
    for every in (ops._forward, ops._backward):
        assert (torch.Tag.cudagraph_unsafe in every[may]._opoverload.tags) != may


def test_a_pool(forget_graphs, counter):
    """Another index, and other values of the same ranks, are no new graph."""
    model = Mixture(make_experts("plain"))
    pool = lora_ext.AdapterPool(model, 2, 3, "experts")
    config = lora_ext.LoraConfig("experts", r=2, init_lora_weights="gaussian")
    pool.add_adapter("x", config)
    pool.add_adapter("y", lora_ext.LoraConfig("experts.down_proj", r=1))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    operands, found = make_routes(9), []
    for index in ([0, 1, -1], [1, 0, 0], [-1, 1, 1]):
        randomize_(pool.parameters("x") + pool.parameters("y"))
        with lora_ext.use_adapters(model, ["x", "y"], torch.tensor(index, dtype=torch.int32)):
            found.append(model(*operands))
            torch.testing.assert_close(compiled(*operands), found[-1], rtol=1e-12, atol=1e-12)
        pool.replace_adapter("x", config)
    assert counter.frame_count == 1
    assert not torch.equal(found[0], found[1])


@torch.no_grad()
def randomize_(parameters):
    for parameter in parameters:
        parameter.normal_(std=0.3)
