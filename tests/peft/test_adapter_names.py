"""`adapter_names` of PEFT and `use_adapters` on accelerated models: what PEFT computes one adapter
after the other, in training too, and what is left to PEFT."""

import pytest
import torch
from contract.accelerated import PEFT
from helpers import BF16, F64
from peft_helpers import layer_model, lora_modules, make_ids, make_x, net, plain_copy

import lora_ext

NAMES = ["a", "__base__", "c", "b", "a", "__base__"]
OF_BLOCK = [None if name == "__base__" else name for name in NAMES]
LINEAR = ["up", "gate", "down"]


def accelerated_net(adapters="three", *args, **words):
    return lora_ext.accelerate(net(adapters, *args, **words))


def trained(model, forward):
    model.zero_grad()
    y = forward(model)
    y.square().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def by_names(names=NAMES):
    return lambda model: model(make_ids(), adapter_names=names)


# ---- PEFT's argument ----


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "subclass", "hooked"])
@pytest.mark.parametrize("adapters", ["three", "lora_bias of one"])
def test_the_same_outputs_as_pefts(kind, adapters):
    model = PEFT.make(kind, adapters, F64).model.eval()
    x = make_x(kind, F64, 6)
    y = model(x, adapter_names=NAMES)
    torch.testing.assert_close(y, plain_copy(model)(x, adapter_names=NAMES), rtol=1e-11, atol=1e-11)
    with lora_ext.use_adapters(model, OF_BLOCK):
        assert torch.equal(model(x), y)


def test_the_same_list_changed_in_place_is_another_batch():
    model = accelerated_net(targets=LINEAR).eval()
    names = list(NAMES)
    by_names(names)(model)
    names[0] = "b"
    assert torch.equal(by_names(names)(model), by_names(list(names))(model))
    assert not torch.equal(by_names(names)(model), by_names()(model))


# ---- what is left to PEFT, or refused ----


def test_a_hook_on_a_factor_is_called():
    """PEFT computes such a layer, with the names; by token it is refused."""
    model = PEFT.make("linear", "three", F64).model.eval()
    x = make_x("linear", F64, 6)
    (layer,) = lora_modules(model).values()
    seen = []
    layer.lora_A["a"].register_forward_hook(lambda *_: seen.append(1))
    plain = plain_copy(model)(x, adapter_names=NAMES)
    seen.clear()
    with lora_ext.use_adapters(model, OF_BLOCK):
        torch.testing.assert_close(model(x), plain, rtol=1e-11, atol=1e-11)
    assert seen == [1]
    torch.testing.assert_close(model(x, adapter_names=NAMES), plain, rtol=1e-11, atol=1e-11)
    index = torch.zeros(2, 3, dtype=torch.int32)
    with (
        lora_ext.use_adapters(model, ["a"], index),
        pytest.raises(ValueError, match="lora_A, lora_B or lora_dropout has hooks"),
    ):
        model(x.view(2, 3, -1))


def test_a_trained_base_weight_has_its_gradient():
    """The base is called, and the updates are added onto its y."""
    model = PEFT.make("linear", "three", F64).model
    (layer,) = lora_modules(model).values()
    layer.base_layer.weight.requires_grad_(True)
    x = make_x("linear", F64, 6)
    with lora_ext.use_adapters(model, OF_BLOCK):
        found = trained(model, lambda model: model(x))
    plain = plain_copy(model).eval()
    wanted = trained(plain, lambda model: model(x, adapter_names=NAMES))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_base_in_another_dtype_than_x():
    model = PEFT.make("linear", "three", BF16).model.eval()
    x = make_x("linear", F64, 6).float()
    with pytest.raises(RuntimeError), lora_ext.use_adapters(model, OF_BLOCK):
        model(x)


# ---- PEFT's other verbs around it ----


def test_a_layer_alone():
    """Not only whole models of PEFT: a module that holds its layers."""
    model = lora_ext.accelerate(layer_model("linear", "three")).base_model.model
    x = make_x("linear", rows=6)
    with lora_ext.use_adapters(model, OF_BLOCK):
        y = model(x)
    assert y.shape == (6, 40)
