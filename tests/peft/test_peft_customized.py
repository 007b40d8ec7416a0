"""Hooks on parts of a layer, subclasses and trained weights of its base: all have their effect."""

import copy

import pytest
import torch
from accelerate import cpu_offload, hooks
from helpers import BF16, F64
from peft.tuners.lora import layer as peft_layers
from peft_helpers import (
    ADAPTERS,
    FAST,
    accelerated,
    layer_model,
    make_ids,
    make_x,
    net,
    paths,
    peft_model,
    reasons,
    step,
)
from torch import nn

import lora_ext

BEFORE = "the layer's forward was replaced, as by hooks, before lora_ext.accelerate"

# ---- hooks ----


def attach_forward(module, seen):
    return module.register_forward_hook(lambda m, i, y: seen.append(y))


def attach_pre(module, seen):
    return module.register_forward_pre_hook(lambda m, i: seen.append(i[0]))


def attach_backward(module, seen):
    return module.register_full_backward_hook(lambda m, i, o: seen.append(o[0]))


PARTS = {
    "base": lambda layer: layer.base_layer,
    "A": lambda layer: layer.lora_A["a"],
    "B": lambda layer: layer.lora_B["a"],
    "dropout": lambda layer: layer.lora_dropout["a"],
}


@pytest.mark.parametrize("attach", [attach_forward, attach_pre, attach_backward])
@pytest.mark.parametrize("part", PARTS)
def test_hooks_on_the_parts_are_called(part, attach):
    model = layer_model("linear", "one", F64, lora_dropout=0.2)
    fast, x = accelerated(model), make_x("linear", F64)
    calls = {}
    for name, one in (("fast", fast), ("peft", model)):
        calls[name] = []
        handle = attach(PARTS[part](one.base_model.model[0]), calls[name])
        step(one.eval(), x)
        if name == "fast":
            assert paths(one)["0"] == ("added" if part == "base" else "peft")
        handle.remove()
    assert len(calls["fast"]) == len(calls["peft"]) == 1
    torch.testing.assert_close(calls["fast"][0], calls["peft"][0], rtol=1e-11, atol=1e-11)
    assert set(paths(fast).values()) <= FAST - {"added"}


def test_a_hook_that_changes_the_bases_output_is_obeyed():
    model = layer_model("linear", "one", F64)
    fast, x = accelerated(model), make_x("linear", F64)
    for one in (model, fast):
        one.base_model.model[0].base_layer.register_forward_hook(lambda m, i, y: 3 * y)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-11, atol=1e-11)


def test_hooks_on_the_layer_and_on_all_modules():
    model, x, seen = layer_model("linear"), make_x("linear"), []
    fast = accelerated(model)
    fast.base_model.model[0].register_forward_hook(lambda m, i, y: seen.append(type(m).__name__))
    assert paths(fast)["0"] == "fused"
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, y: seen.append(type(m).__name__)
    )
    try:
        assert reasons(fast) == {("peft", "a global module hook is registered, as by a profiler")}
        fast(x)
    finally:
        handle.remove()
    assert seen.count("Linear") == 5  # the base, A, B, and the layer by both hooks


# ---- hooks that replace the forward on the instance ----


@pytest.fixture
def pefts_calls(monkeypatch):
    """Names of the classes whose own forward ran."""
    calls = []
    for kind in (peft_layers.Linear, peft_layers.Embedding):

        def counted(self, *args, kind=kind, real=kind.forward, **kwargs):
            calls.append(kind.__name__)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    return calls


def replace(layer):
    kept = layer.forward
    layer.forward = lambda *args: kept(*args)


REPLACING = {
    "a function": replace,
    "accelerate's": lambda m: hooks.add_hook_to_module(m, hooks.ModelHook()),
    "dispatched with its parts": lambda m: hooks.attach_execution_device_hook(m, "cpu"),
    "offloaded with its parts": lambda m: cpu_offload(
        m, "cpu", preload_module_classes=["Linear", "Embedding"]
    ),
}


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("how", REPLACING)
def test_hooks_attached_after_accelerate_keep_the_fast_path(pefts_calls, how, kind):
    model, x = layer_model(kind, "three"), make_x(kind)
    fast = accelerated(model)
    layer, wanted = fast.base_model.model[0], fast(x)
    REPLACING[how](layer)
    assert "forward" in vars(layer)
    for one in (fast, copy.deepcopy(fast)):
        assert paths(one)["0"] in FAST
        with torch.no_grad():  # what is offloaded is gone in backward
            assert torch.equal(one(x), wanted) and pefts_calls == []
    lora_ext.decelerate(fast)(x)
    assert len(pefts_calls) == 1


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_hooks_attached_before_accelerate_call_pefts_forward(pefts_calls, kind):
    """Until they are taken away, which leaves PEFT's bound method on the instance."""
    model, x = layer_model(kind, "three"), make_x(kind)
    hooks.add_hook_to_module(model.base_model.model[0], hooks.ModelHook())
    fast, before = accelerated(model), ("peft", BEFORE)
    assert torch.equal(fast(x), model(x)) and reasons(fast) == {before}
    assert reasons(copy.deepcopy(fast)) == {before}
    hooks.remove_hook_from_module(fast, recurse=True)
    assert reasons(fast) == {before} and torch.equal(fast(x), model(x))
    count = len(pefts_calls)
    assert paths(lora_ext.accelerate(fast))["0"] in FAST
    fast(x)
    assert len(pefts_calls) == count
    lora_ext.decelerate(fast)(x)
    assert len(pefts_calls) == count + 1


def test_offloaded_factors_are_loaded_by_pefts_forward():
    """accelerate's own hooks on each of them; the numbers are those of the model as it was."""
    model, x = layer_model("linear", "three"), make_x("linear")
    fast = cpu_offload(accelerated(model), "cpu")
    assert fast.base_model.model[0].lora_A["a"].weight.is_meta
    assert reasons(fast) == {
        ("peft", "lora_A's or lora_B's forward was replaced, as by an offload hook")
    }
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


# ---- the base layer ----


class Doubling(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input):
        return 2 * super().forward(input)


class Tanh(nn.Linear):
    """Its output is saved for backward: writing to it would spoil the gradient (peft#1372)."""

    def forward(self, input):
        return torch.tanh(super().forward(input))


class View(nn.Linear):
    """Its output is a view of a tensor that it keeps."""

    def forward(self, input):
        self.kept = torch.zeros(len(input), 2, self.out_features, dtype=input.dtype)
        self.kept[:, 0] = super().forward(input).detach()
        return self.kept[:, 0]


@pytest.mark.parametrize("kind", [Doubling, Tanh, View])
@pytest.mark.parametrize("adapters", ["one", "three", "lora_bias"])
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_a_subclass_of_linear_is_called_as_it_is(kind, adapters, dtype):
    torch.manual_seed(0)
    model = peft_model(nn.Sequential(kind(24, 40)), ADAPTERS[adapters], ["0"], dtype)
    fast, x = accelerated(model), make_x("linear", dtype)
    assert reasons(fast) == {
        ("added", "the base layer is not exactly nn.Linear or transformers' Conv1D")
    }
    tolerance = 1e-11 if dtype == F64 else 2e-2
    torch.testing.assert_close(step(fast, x), step(model, x), rtol=tolerance, atol=tolerance)
    if kind is View:
        kept, theirs = (one.base_model.model[0].base_layer.kept for one in (fast, model))
        assert torch.equal(kept, theirs)


class OneRow(nn.Linear):
    """Returns a row for all of x, which PEFT's sum broadcasts."""

    def forward(self, input):
        return super().forward(input[:1])


def test_a_base_that_changes_the_shape():
    torch.manual_seed(0)
    model = peft_model(nn.Sequential(OneRow(24, 40)), ADAPTERS["three"], ["0"], F64)
    fast, x = accelerated(model), make_x("linear", F64)
    assert torch.equal(fast(x), model(x)) and fast(x).shape == (60, 40)


def test_a_base_weight_that_is_trained_gets_its_gradient():
    model = layer_model("linear", "one", F64)
    fast, x = accelerated(model), make_x("linear", F64)
    for one in (model, fast):
        one.base_model.model[0].base_layer.weight.requires_grad_()
    assert reasons(fast) == {("added", "the base weight is trained")}
    found = step(fast, x)
    assert any("base_layer.weight" in name for name in found)
    torch.testing.assert_close(found, step(model, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_base_bias_that_is_trained_gets_its_gradient(bias):
    model = net("one", F64, bias=bias)
    fast, ids = accelerated(model), make_ids()
    found = step(fast, ids)
    assert any("base_layer.bias" in name for name in found)
    assert paths(fast)["up"] in ("fused", "library")
    torch.testing.assert_close(found, step(model, ids), rtol=1e-10, atol=1e-10)
