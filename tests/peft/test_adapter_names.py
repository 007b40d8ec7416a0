"""`adapter_names` of PEFT and `use_adapters` on accelerated models: what PEFT computes one adapter
after the other, in training too, and what is left to PEFT."""

import copy
import warnings

import pytest
import torch
from contract.accelerated import PEFT
from helpers import BF16, F64
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from peft_helpers import (
    ADAPTERS,
    TARGETS,
    Net,
    layer_model,
    lora_modules,
    make_ids,
    make_x,
    net,
    peft_model,
    plain_copy,
    randomize,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_ext

NAMES = ["a", "__base__", "c", "b", "a", "__base__"]
LINEAR = ["up", "gate", "down"]


def accelerated_net(adapters="three", *args, **words):
    return lora_ext.accelerate(net(adapters, *args, **words))


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained(model, forward):
    model.zero_grad()
    y = forward(model)
    y.square().sum().backward()
    return {"y": y.detach(), **grads(model)}


def by_names(names=NAMES):
    return lambda model: model(make_ids(), adapter_names=names)


def assert_near(found, wanted, tolerance=1e-10):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


# ---- PEFT's argument ----


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "subclass", "hooked"])
@pytest.mark.parametrize("adapters", ["three", "lora_bias of one"])
def test_the_same_outputs_as_pefts(kind, adapters):
    model = PEFT.make(kind, adapters, F64).model.eval()
    x = make_x(kind, F64, 6)
    y = model(x, adapter_names=NAMES)
    torch.testing.assert_close(y, plain_copy(model)(x, adapter_names=NAMES), rtol=1e-11, atol=1e-11)
    with lora_ext.use_adapters(model, NAMES):
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("targets", [LINEAR, TARGETS], ids=["linear", "all"])
def test_a_whole_model_in_evaluation(targets):
    model = accelerated_net(dtype=F64, targets=targets).eval()
    plain = plain_copy(model)
    with torch.no_grad():
        found, wanted = by_names()(model), by_names()(plain)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_peft_refuses_training_and_here_it_trains():
    """PEFT: "Cannot pass `adapter_names` when the model is in training mode.\""""
    model = accelerated_net(dtype=F64, targets=LINEAR).train()
    plain = plain_copy(model)
    with pytest.raises(ValueError, match="in training mode"):
        by_names()(plain)
    found = trained(model, by_names())
    assert model.training and all(module.training for module in model.modules())
    assert_near(found, trained(plain.eval(), by_names()))
    with pytest.raises(ValueError, match="in training mode"):
        by_names()(lora_ext.decelerate(model))
    with pytest.raises(ValueError, match="`adapter_names`"):
        by_names(["a"] * 5)(lora_ext.accelerate(model))
    assert model.training and model.base_model.training


def test_dropout_in_training_is_each_adapters_own():
    words = {
        name: {**one, "lora_dropout": p}
        for (name, one), p in zip(ADAPTERS["three"].items(), (0.0, 0.9, 0.5), strict=True)
    }
    torch.manual_seed(1)
    model = lora_ext.accelerate(peft_model(Net(), words, LINEAR, F64)).train()
    still = by_names()(copy.deepcopy(model).eval())
    first, second = by_names()(model), by_names()(model)
    for sample, name in enumerate(NAMES):
        moves = name in ("b", "c")
        assert torch.equal(first[sample], second[sample]) != moves, name
        assert torch.allclose(first[sample], still[sample], rtol=1e-9, atol=1e-9) != moves, name


def test_checkpoints_within_a_model_are_refused_after_its_forward():
    """PEFT's hooks, which know the names, are gone when backward computes the forward again."""
    model = accelerated_net(dtype=F64, targets=LINEAR).train()
    inner = model.base_model.model
    layer = inner.up

    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = layer

        def forward(self, x):
            return checkpoint(self.up, x, use_reentrant=False)

    inner.up = Region()
    loss = by_names()(model).sum()
    with pytest.raises(RuntimeError, match="within the block of its forward"):
        loss.backward()
    with lora_ext.use_adapters(model, NAMES):
        trained(model, lambda model: model(make_ids()))


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
    with lora_ext.use_adapters(model, NAMES):
        torch.testing.assert_close(model(x), plain, rtol=1e-11, atol=1e-11)
    assert seen == [1]
    torch.testing.assert_close(model(x, adapter_names=NAMES), plain, rtol=1e-11, atol=1e-11)
    index = torch.zeros(2, 3, dtype=torch.int32)
    with (
        lora_ext.use_adapters(model, ["a"], index),
        pytest.raises(RuntimeError, match="a factor or its dropout has hooks; give an index"),
    ):
        model(x.view(2, 3, -1))


def test_dora_by_sample_is_pefts_and_by_token_refused():
    words = {"a": ADAPTERS["three"]["a"], "d": {**ADAPTERS["dora"]["a"]}}
    torch.manual_seed(1)
    model = lora_ext.accelerate(peft_model(nn.Sequential(nn.Linear(24, 40)), words, ["0"], F64))
    x, names = make_x("linear", F64, 6), ["a", "d", "__base__", "d", "a", "a"]
    model.eval()
    theirs = plain_copy(model)
    try:
        wanted = theirs(x, adapter_names=names)
    except (ValueError, TypeError, KeyError) as error:
        with lora_ext.use_adapters(model, names), pytest.raises(type(error)):
            model(x)
    else:
        with lora_ext.use_adapters(model, names):
            torch.testing.assert_close(model(x), wanted, rtol=1e-11, atol=1e-11)
    index = torch.tensor([[0, 1, 1], [0, -1, 0]], dtype=torch.int32)
    with (
        lora_ext.use_adapters(model, ["a", "d"], index),
        pytest.raises(RuntimeError, match="a variant of LoRA, such as DoRA"),
    ):
        model(x.view(2, 3, -1))
    index = torch.tensor([[0, -1, 0], [0, -1, 0]], dtype=torch.int32)
    with lora_ext.use_adapters(model, ["a"], index):  # DoRA is not named
        model(x.view(2, 3, -1))


def test_dora_on_an_embedding_is_refused():
    model = PEFT.make("embedding", "dora").model
    ids = make_x("embedding", rows=6)
    with (
        lora_ext.use_adapters(model, ["a"] * 6),
        pytest.raises(RuntimeError, match=r"plain adapters, but .* a variant of LoRA"),
    ):
        model(ids)


def test_layers_that_are_not_accelerated_are_refused():
    model = net("three")
    with (
        pytest.raises(ValueError, match=r"'base_model\.model\.\w+' is PEFT's .*call lora_ext\.acc"),
        lora_ext.use_adapters(model, NAMES),
    ):
        raise AssertionError
    lora_ext.accelerate(model)
    with lora_ext.use_adapters(model, NAMES):
        model(make_ids())


def test_convolutions_of_peft_are_refused_by_name():
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    model = get_peft_model(base, LoraConfig(target_modules=["0", "2"], r=2), "a")
    with (
        pytest.raises(ValueError, match="is PEFT's Conv2d"),
        lora_ext.use_adapters(lora_ext.accelerate(model), ["a"]),
    ):
        raise AssertionError


def test_further_arguments_of_a_layer_are_refused():
    model = PEFT.make("linear", "three").model
    (layer,) = lora_modules(model).values()
    with (
        lora_ext.use_adapters(model, NAMES),
        pytest.raises(RuntimeError, match="without further arguments"),
    ):
        layer(make_x("linear", rows=6), scale=2.0)


def test_a_trained_base_weight_has_its_gradient():
    """The base is called, and the updates are added onto its y."""
    model = PEFT.make("linear", "three", F64).model
    (layer,) = lora_modules(model).values()
    layer.base_layer.weight.requires_grad_(True)
    x = make_x("linear", F64, 6)
    with lora_ext.use_adapters(model, NAMES):
        found = trained(model, lambda model: model(x))
    plain = plain_copy(model).eval()
    assert_near(found, trained(plain, lambda model: model(x, adapter_names=NAMES)))


def test_a_base_in_another_dtype_than_x():
    model = PEFT.make("linear", "three", BF16).model.eval()
    x = make_x("linear", F64, 6).float()
    with pytest.raises(RuntimeError), lora_ext.use_adapters(model, NAMES):
        model(x)


# ---- PEFT's other verbs around it ----


def test_values_that_hotswap_writes_are_seen():
    """`hotswap_adapter_from_state_dict` writes ``.data``, which no version counter sees.

    It also finds an adapter's keys by whether its name is a part of them.
    """
    words = {"french": ADAPTERS["three"]["a"], "code": ADAPTERS["three"]["b"]}
    names = ["french", "code", "__base__"] * 2
    model = lora_ext.accelerate(peft_model(Net(), words, LINEAR)).eval()
    other = randomize(copy.deepcopy(model), seed=9)
    state = {key: p.detach().clone() for key, p in other.named_parameters() if ".french." in key}
    config = LoraConfig(**words["french"], target_modules=LINEAR)
    with lora_ext.use_adapters(model, names):
        first = model(make_ids())
        hotswap_adapter_from_state_dict(model, state, "french", config)
        second = model(make_ids())
    wanted = plain_copy(model)(make_ids(), adapter_names=names)
    torch.testing.assert_close(second, wanted, rtol=1e-5, atol=1e-5)
    for sample, name in enumerate(names):
        assert torch.equal(first[sample], second[sample]) != (name == "french")


def test_decelerate_within_a_block_and_after_it():
    """PEFT's own forward knows nothing of blocks; nothing of ours is left behind."""
    model = accelerated_net(targets=LINEAR).eval()
    plain = plain_copy(model)(make_ids())
    with lora_ext.use_adapters(model, NAMES):
        model(make_ids())
    lora_ext.decelerate(model)
    assert torch.equal(model(make_ids()), plain)
    torch.testing.assert_close(
        by_names()(model), by_names()(accelerated_copy(model)), rtol=1e-5, atol=1e-5
    )


def accelerated_copy(model):
    return lora_ext.accelerate(copy.deepcopy(model))


def test_adapters_that_come_and_go():
    words = {name: ADAPTERS["three"][name] for name in "ab"}
    model = lora_ext.accelerate(peft_model(Net(), words, LINEAR)).eval()
    with pytest.raises(ValueError, match=r"names out of \['a', 'b'\], but got \['c'\]"):
        by_block(model, ["a", "c"] * 3)
    model.add_adapter("c", LoraConfig(r=3, target_modules=LINEAR))
    randomize(model)
    found = by_block(model, ["a", "c"] * 3)
    wanted = plain_copy(model)(make_ids(), adapter_names=["a", "c"] * 3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    model.delete_adapter("c")
    with pytest.raises(ValueError, match="but got"):
        by_block(model, ["a", "c"] * 3)


def by_block(model, names):
    with lora_ext.use_adapters(model, names):
        return model(make_ids())


def test_a_quantised_base_is_called():
    """torchao's int8 weights, where it is installed."""
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32))
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model(base, ADAPTERS["three"], ["0"])
    x = torch.randn(6, 32)
    model.eval()
    wanted = model(x, adapter_names=NAMES)
    lora_ext.accelerate(model)
    with lora_ext.use_adapters(model, NAMES):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_layer_alone():
    """Not only whole models of PEFT: a module that holds its layers."""
    model = lora_ext.accelerate(layer_model("linear", "three")).base_model.model
    x = make_x("linear", rows=6)
    with lora_ext.use_adapters(model, NAMES):
        y = model(x)
    assert y.shape == (6, 40)
