"""Adapters of an accelerated model: switched, added, deleted, disabled, merged, scaled, swapped."""

import copy
import warnings

import pytest
import torch
from helpers import F64
from layer_helpers import assert_same_state, snapshot
from peft import LoraConfig
from peft_helpers import (
    FAST,
    TARGETS,
    accelerated,
    assert_same_output,
    lora_modules,
    make_ids,
    net,
    paths,
    randomize,
)
from torch import nn

import lora_ext

OTHER = {"b": {"r": 4, "lora_alpha": 7}}


def test_switching_adding_deleting_disabling():
    model = net("one", F64)
    fast = accelerated(model)
    for one in (model, fast):
        one.add_adapter("b", LoraConfig(target_modules=TARGETS, **OTHER["b"]))
        randomize(one.double(), seed=9)
    for action in (
        lambda m: m.set_adapter("b"),
        lambda m: m.base_model.set_adapter(["a", "b"]),
        lambda m: m.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", "linear"),
        lambda m: m.set_adapter("sum"),
        lambda m: m.delete_adapter("a"),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
    ):
        for one in (model, fast):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action(one)
        assert_same_output(fast, model)
    with model.disable_adapter(), fast.disable_adapter():
        assert set(paths(fast).values()) == {"base"}
        assert_same_output(fast, model)
    assert set(paths(fast).values()) <= FAST
    assert_same_state(fast, snapshot(model))


def test_a_later_adapter_on_other_layers_is_accelerated():
    model = lora_ext.accelerate(net("one", F64, targets=["up"]))
    plain = lora_ext.decelerate(copy.deepcopy(model))
    for one in (model, plain):
        one.add_adapter("b", LoraConfig(target_modules=["down", "embed"], **OTHER["b"]))
        one.base_model.set_adapter(["a", "b"])
        randomize(one.double(), seed=9)
    assert paths(model).keys() == {"up", "down", "embed"}
    assert set(paths(model).values()) <= FAST
    assert_same_output(model, plain)
    lora_ext.decelerate(model)
    assert {layer.path for layer in lora_ext.explain(model)} == {"peft"}


@pytest.mark.parametrize("adapters", ["one", "three", "dora"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload(adapters, safe):
    model = net(adapters, F64)
    fast = accelerated(model)
    wanted = model(make_ids())
    merged, theirs = fast.merge_and_unload(safe_merge=safe), model.merge_and_unload(safe_merge=safe)
    assert_same_state(merged, snapshot(theirs))
    assert type(merged.up) is nn.Linear and not lora_modules(merged)
    torch.testing.assert_close(merged(make_ids()), wanted, rtol=1e-10, atol=1e-10)


def test_unload_gives_the_base_back():
    model = net("one")
    base = {name: p for name, p in model.named_parameters() if "base_layer.weight" in name}
    unloaded = lora_ext.accelerate(model).unload()
    assert type(unloaded.up) is nn.Linear
    assert unloaded.up.weight is base["base_model.model.up.base_layer.weight"]


def test_scaling_changes_are_seen_at_once():
    model, ids = net("one", F64), make_ids()
    fast = accelerated(model)
    for change in (lambda m: m.set_scale("a", 3.0), lambda m: m.scale_layer(0.5)):
        for one in (model, fast):
            for module in lora_modules(one).values():
                change(module)
        assert_same_output(fast, model, ids)
