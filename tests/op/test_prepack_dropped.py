"""PackedWeight: what drops a pack, which no change of its weight outlives."""

import copy
import pickle
import weakref

import pytest
import torch
from helpers import F32, F64, by_pickle, by_torch_save, make_problem
from pack_helpers import call, packed_weight
from torch import nn

from lora_ext import lora_linear, pack_weight
from lora_ext.functional import PackedWeight


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, by_pickle, by_torch_save])
def test_copies_and_pickles_hold_the_weight_alone(how):
    packed = packed_weight(backward=True)
    other = how(packed)
    assert packed.is_packed
    assert not other.is_packed
    assert "pack_weight again" in other.reason
    assert torch.equal(other.weight, packed.weight)
    assert torch.equal(call(other), call(packed.weight))


def test_a_pickle_holds_no_packed_bytes():
    weight = torch.randn(256, 256)
    assert len(pickle.dumps(pack_weight(weight, backward=True))) < 1.2 * weight.nbytes


def test_to_another_dtype_or_device_drops_the_pack():
    packed = packed_weight()
    assert packed.to(F32) is packed
    assert packed.to("cpu") is packed
    for other in (packed.to(F64), packed.to("meta"), packed.to(F32, copy=True)):
        assert not other.is_packed
        assert ".to()" in other.reason
    assert packed.is_packed


WRITES = [torch.neg, torch.zeros_like]
WRITES += [lambda w: w * 1.001, lambda w: w + 0.01, lambda w: w.roll(1)]


@pytest.mark.parametrize("shape", [(70, 40), (300, 257)])
@pytest.mark.parametrize("write", WRITES)
def test_verify_finds_any_write_of_all_elements(shape, write):
    """It changes no version counter, and peft's merge writes so."""
    packed = packed_weight(shape=shape)
    packed.verify()
    packed.weight.data.copy_(write(packed.weight.data))
    with pytest.raises(RuntimeError, match="written to since; call pack_weight again"):
        packed.verify()


def test_a_write_to_weight_data_raises_in_debug_mode(monkeypatch):
    monkeypatch.setattr(PackedWeight, "debug", True)
    packed = packed_weight()
    call(packed)
    packed.weight.data += 0.01
    with pytest.raises(RuntimeError, match="written to"):
        call(packed)


def test_verify_of_what_is_not_packed():
    packed = packed_weight()
    packed.drop()
    packed.weight.data += 1
    packed.verify()
    pack_weight(torch.randn(4, 4, dtype=F64)).verify()


def test_drop():
    packed = packed_weight(backward=True)
    plain = call(packed.weight)
    packed.drop()
    assert not packed.is_packed
    assert packed.nbytes == 0
    assert packed.route(64) == ("unpacked", "dropped")
    assert torch.equal(call(packed), plain)
    packed.drop("again, for another reason")
    assert packed.reason == "again, for another reason"


def test_drop_between_forward_and_backward():
    """Backward keeps the pack that its forward pass was given; nothing dangles."""
    packed = packed_weight(backward=True)
    problem = make_problem(60, 40, 70, 5)
    x = problem.x.requires_grad_()
    y = lora_linear(x, packed, problem.lora_a, problem.lora_b)
    packed.drop()
    y.backward(problem.grad)
    wanted = problem.grad @ (packed.weight + problem.lora_b @ problem.lora_a)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)


def test_a_write_between_forward_and_backward_is_caught():
    packed = packed_weight(backward=True)
    problem = make_problem(60, 40, 70, 5)
    y = lora_linear(problem.x.requires_grad_(), packed, problem.lora_a, problem.lora_b)
    with torch.no_grad():
        packed.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(problem.grad)


def test_a_pack_is_freed_with_its_last_user():
    packed = packed_weight(backward=True)
    watched = [weakref.ref(packed), weakref.ref(packed._packed), weakref.ref(packed._packed_t)]
    call(packed)
    del packed
    assert [ref() for ref in watched] == [None] * 3


# ---- changes of the weight ----


def changed_by(change):
    """A pack of an nn.Linear's weight, used, then changed: the layer, and the pack."""
    layer = nn.Linear(40, 70, bias=False).requires_grad_(False)
    layer.memory = torch.randn(70, 40).numpy()
    layer.weight.data = torch.from_numpy(layer.memory)
    packed = pack_weight(layer.weight)
    assert packed.is_packed
    call(packed)
    change(layer)
    return layer, packed


def at_its_address(layer):
    """As a cast and a cast back often leave it: a new storage in the place of the old one."""
    layer.weight.data = torch.empty(0)
    layer.memory += 1
    layer.weight.data = torch.from_numpy(layer.memory)


CHANGES = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "double": lambda layer: layer.double(),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(70, 40)),
    "other strides": lambda layer: setattr(layer.weight, "data", torch.randn(40, 70).t()),
    "in place": lambda layer: layer.weight.add_(1),
    "other data at its address": at_its_address,
    "data of inference mode": lambda layer: setattr(layer.weight, "data", inference_weight()),
}


def inference_weight():
    with torch.inference_mode():
        return torch.randn(70, 40)


@pytest.mark.parametrize("change", CHANGES)
def test_a_pack_does_not_outlive_a_change(change):
    """Modules cast and move by `weight.data = ...`: the same Parameter, of the same version."""
    layer, packed = changed_by(CHANGES[change])
    dtype = layer.weight.dtype
    assert packed.route(60)[0] == "unpacked"
    problem = make_problem(60, 40, 70, 5)
    operands = [problem.x.to(dtype), problem.lora_a.to(dtype), problem.lora_b.to(dtype)]
    x, lora_a, lora_b = operands
    wanted = lora_linear(x, layer.weight.detach(), lora_a, lora_b)
    assert torch.equal(lora_linear(x, packed, lora_a, lora_b), wanted)
    assert not packed.is_packed
    assert "replaced, moved or cast since it was packed" in packed.reason


def test_a_weight_of_inference_mode_is_not_packed():
    packed = pack_weight(inference_weight())
    assert not packed.is_packed
    assert "tensor of torch.inference_mode" in packed.reason
    with torch.inference_mode():  # a weight from outside may be
        assert pack_weight(torch.randn(70, 40)).reason == packed.reason
    weight = torch.randn(70, 40)
    with torch.inference_mode():
        assert pack_weight(weight).is_packed


@pytest.mark.parametrize("is_near", [False, True])
def test_a_packed_transpose_does_not_outlive_a_change_before_backward(is_near):
    """`weight.data = other` between forward and backward: dX is of the other, as torch's is; also
    where the other is in the same storage."""
    problem = make_problem(60, 40, 70, 5)
    dy = torch.randn(60, 70)
    grads = []
    for is_packed in (True, False):
        both = torch.stack([problem.weight, problem.weight.flip(0)])
        weight = both[0] if is_near else problem.weight.clone()
        operand = pack_weight(weight, backward=True) if is_packed else weight
        x = problem.x.clone().requires_grad_()
        y = lora_linear(x, operand, problem.lora_a, problem.lora_b)
        weight.data = both[1] if is_near else weight.flip(0)
        y.backward(dy)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    wanted = dy @ (problem.weight.flip(0) + problem.lora_b @ problem.lora_a)
    torch.testing.assert_close(grads[0], wanted, rtol=1e-4, atol=1e-3)
