"""Bugs that other projects' LoRA layers and models had, as tests of these.

Names and docstrings have the peers' public reports. `test_peer_bugs` has those of kernels.
"""

import gc
import weakref

import pytest
import torch
from adapter_helpers import make_ids, make_zoo
from helpers import BF16, F16, F32, F64
from layer_helpers import (
    KINDS,
    MATRIX_KINDS,
    adapter_parameters,
    bits,
    delta,
    exact,
    make_input,
    make_layer,
    randomize,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_ext
from lora_ext import LoRAConfig, LoRALinear, apply_lora
from lora_ext.models import lora_layers
from lora_ext.nn import AdapterSpec

TARGETS = ["emb", "q_proj", "mlp", "c_attn", "conv", "head.0"]
SPEC = AdapterSpec(4, 6.0)


def make_model(*names):
    model = make_zoo()
    for name in names:
        apply_lora(model, LoRAConfig(TARGETS, 3, 4.0), name)
    lora_ext.models.set_adapter(model, names)
    return randomize(model)


# ---- which path runs ----


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("training", [False, True])
def test_axolotl_3806_dropout_keeps_the_fused_path(dropout, training):
    """The fused path was skipped in silence as soon as there was dropout."""
    layers = [nn.Linear(32, 32) for _ in range(3)]
    model = apply_lora(nn.Sequential(*layers), LoRAConfig("*", dropout=dropout)).train(training)
    assert {layer.path for layer in lora_ext.explain(model)} == {"fused"}
    apply_lora(model, LoRAConfig("*", dropout=0.3), "other")
    lora_ext.models.set_adapter(model, ["default", "other"])
    for layer in lora_ext.explain(model):
        assert layer.path == ("library" if training else "fused")
        assert ("differ in dropout" in layer.reason) == training


# ---- merging ----


def test_peft_1355_merging_twice():
    """Each further merge added the update again, and each unmerge took one out."""
    model, ids = make_model("a", "b"), make_ids()
    y = model(ids)
    for _ in range(3):
        lora_ext.models.merge(model)
        assert torch.allclose(model(ids), y, rtol=1e-10)
    merged = model(ids)
    lora_ext.models.merge(model)
    assert torch.equal(model(ids), merged)
    for _ in range(3):
        lora_ext.models.unmerge(model)
        assert torch.equal(model(ids), y)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_2918_negative_weights(kind):
    """A negative weight changed the wrong factor: the product is what counts. a and -a cancel."""
    specs = {"a": AdapterSpec(4, 3.0), "minus": AdapterSpec(4, -3.0)}
    layer, x = make_layer(kind, specs, F64), make_input(kind, F64)
    with torch.no_grad():
        for table in (layer.lora_a, layer.lora_b):
            table["minus"].copy_(table["a"])
    assert torch.equal(delta(layer, "a"), -delta(layer, "minus"))
    with layer.disable_adapters():
        base = layer(x)
    assert torch.allclose(layer(x), base, rtol=1e-12, atol=1e-12)
    layer.set_adapter("minus")
    negative = layer(x)
    layer.set_adapter("a")
    assert torch.allclose(layer(x) - base, base - negative, rtol=1e-10, atol=1e-12)
    layer.set_adapter(["a", "minus"])
    layer.merge()
    assert torch.allclose(layer.merged_weight, layer.weight, rtol=1e-12, atol=1e-12)


def test_peft_3608_3763_several_adapters_merged_or_not():
    """Merged adapters differed from unmerged ones, and merging a subset dropped the others."""
    model, ids = make_model("a", "b", "c"), make_ids()
    for active in ("a", ["a", "b"], ["c", "a", "b"]):
        lora_ext.models.set_adapter(model, active)
        y = model(ids)
        for subset in (active, active[-1], active[:1]):
            lora_ext.models.merge(model, subset)
            assert torch.allclose(model(ids), y, rtol=1e-10, atol=1e-12)
        lora_ext.models.unmerge(model)
        assert torch.equal(model(ids), y)


def test_trl_6688_no_drift_in_1000_cycles():
    """Adding and subtracting in bfloat16 changed 77% of the weights."""
    layer = make_layer("linear", {"a": SPEC, "b": AdapterSpec(3, 2.0)}, BF16)
    before, naive = bits(layer.weight).clone(), layer.weight.detach().clone()
    layer.merge()
    first = layer.merged_weight.clone()
    for i in range(1000):
        layer.set_adapter("ab"[i % 2])
        layer.merge()
        layer.unmerge()
        if i < 20:
            update = delta(layer, "ab"[i % 2]).to(BF16)
            naive.add_(update).sub_(update)
    assert torch.equal(bits(layer.weight), before)
    assert (bits(naive) != before).float().mean() > 0.1  # what must not happen
    layer.set_adapter(["a", "b"])
    layer.merge()
    assert torch.equal(layer.merged_weight, first)


def test_lora_34_61_eval_and_train_through_a_parent():
    """train() of the model did not call that of its layers: merged weights stayed."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model("a")

        def train(self, mode=True):
            return super().train(mode)

    parent, ids = Parent(), make_ids()
    y = parent.eval().inner(ids)
    assert {layer.path for layer in lora_ext.explain(parent)} == {"library"}
    lora_ext.models.merge(parent)
    parent.eval()
    assert {layer.path for layer in lora_ext.explain(parent)} == {"merged"}
    assert torch.allclose(parent.inner(ids), y, rtol=1e-10)
    parent.train()
    assert "merged" not in {layer.path for layer in lora_ext.explain(parent)}
    parent.inner(ids).sum().backward()
    assert all(p.grad is not None for p in parent.parameters() if p.requires_grad)
    assert torch.equal(parent.eval().inner(ids), y)


@pytest.mark.parametrize("targets", [["emb"], ["head"], ["emb", "head"]])
def test_peft_2018_merging_beside_a_tied_weight(targets):
    """Merged into a tied embedding, the update was in the output layer too."""
    model = nn.ModuleDict({"emb": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model.head.weight = model.emb.weight
    before = bits(model.emb.weight).clone()
    randomize(apply_lora(model, LoRAConfig(targets, 2)))
    wanted = {name: module.weight.double() for name, module in model.items()}
    wanted |= {
        name: layer.weight.double() + delta(layer, "default") for name, layer in lora_layers(model)
    }
    lora_ext.models.merge(model)
    assert model.emb.weight is model.head.weight
    assert torch.equal(bits(model.emb.weight), before)
    lora_ext.models.merge_and_unload(model)
    for name, module in model.items():
        assert torch.allclose(module.weight.double(), wanted[name], atol=1e-6)


# ---- autograd ----


@pytest.mark.parametrize("kind", KINDS)
def test_peft_1372_no_write_into_what_others_own(kind):
    """The update was added in place into what the base returned: leaves, views and hooks broke."""
    layer, x = make_layer(kind, {"a": SPEC, "b": AdapterSpec(2, 1.0)}, F64), make_input(kind, F64)
    if x.is_floating_point():
        x.requires_grad_()
    before, seen = x.detach().clone(), []
    wanted = torch.relu(exact(layer, x))
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    layer.register_forward_hook(lambda module, args, output: output.view_as(output).clone())
    y = nn.ReLU(inplace=True)(layer(x))
    assert torch.allclose(y, wanted)
    assert torch.allclose(seen[0], exact(layer, x))
    assert torch.equal(x.detach(), before)
    y.sum().backward()
    grads = [p.grad.clone() for p in adapter_parameters(layer)]
    layer.zero_grad()
    torch.relu(exact(layer, x)).sum().backward()
    if kind != "embedding":
        for parameter, grad in zip(adapter_parameters(layer), grads, strict=True):
            assert torch.allclose(parameter.grad, grad)


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_peft_1372_in_place_on_the_output(kind):
    layer, x = make_layer(kind, dtype=F64), make_input(kind, F64).requires_grad_()
    layer(x).mul_(2).relu_().sum().backward()
    (wanted,) = torch.autograd.grad((2 * torch.relu(exact(layer, x))).sum(), x)
    assert torch.allclose(x.grad, wanted)


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_fms_acceleration_97_dx_with_dropout(kind):
    """dx forgot the mask. Against finite differences, with the mask held by the generator."""
    layer = make_layer(kind, {"a": AdapterSpec(4, 6.0, 0.4), "b": AdapterSpec(2, 1.0, 0.4)}, F64)

    def run(x, *factors):
        torch.manual_seed(4)
        return layer(x)

    lead = (3,)
    inputs = (make_input(kind, F64, lead)[:1].requires_grad_(), *adapter_parameters(layer))
    assert torch.autograd.gradcheck(run, inputs)


# Of the kernels there is test_peer_bugs; here the layers choose dtypes and cast.
@pytest.mark.parametrize("cast", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("adapters", [None, F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("count", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_unsloth_320_7020_every_mixture_of_dtypes(kind, count, dtype, adapters, cast):
    """Mixed float32 and half layers crashed in a step."""
    specs = {"a": SPEC} if count == 1 else {"a": SPEC, "b": AdapterSpec(2, 1.0)}
    layer = make_layer(kind, specs, dtype, adapters)
    x = make_input(kind, dtype, (16,))
    given = adapters or F32
    with torch.autocast("cpu", cast or BF16, enabled=cast is not None):
        y = layer(x)
    lookup = kind == "embedding"
    assert y.dtype == (dtype if cast is None or lookup else cast)
    wanted = exact(layer, x)
    scale = wanted.abs().max().item()
    assert (y.double() - wanted).abs().max() < 0.03 * scale
    y.float().sum().backward()
    for parameter in adapter_parameters(layer):
        assert parameter.dtype == parameter.grad.dtype == given
        assert parameter.grad.isfinite().all()
    layer.merge()
    with torch.autocast("cpu", cast or BF16, enabled=cast is not None):
        assert (layer(x).double() - wanted).abs().max() < 0.03 * scale


# ---- compiled ----


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def test_peft_3020_compile_checkpoint_and_dropout(counter):
    """The three together failed; here they give the gradients of the plain layer, in one graph."""
    layer = make_layer("linear", {"a": AdapterSpec(4, 6.0, 0.5)})

    def run(x):
        return checkpoint(layer, x, use_reentrant=False).sin()

    grads = []
    for function in (
        lambda x: layer(x).sin(),
        run,
        torch.compile(run, backend=counter, fullgraph=True),
    ):
        x = make_input("linear", lead=(64,)).requires_grad_()
        layer.zero_grad()
        torch.manual_seed(3)
        function(x).sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in adapter_parameters(layer))])
    assert counter.frame_count == 1
    for value, recomputed, compiled in zip(*grads, strict=True):
        assert torch.equal(recomputed, value)
        assert torch.allclose(compiled, value, atol=1e-6)


def test_pytorch_141039_requires_grad_differs(counter):
    """A graph broke where the requires_grad of the adapters differed from that at compile time."""
    layer = make_layer("linear", {"a": SPEC, "b": AdapterSpec(2, 1.0)})
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        for trainable in (True, False):
            for needs_dx in (True, False):
                for parameter in adapter_parameters(layer):
                    parameter.requires_grad_(trainable)
                x = make_input("linear", lead=(64,)).requires_grad_(needs_dx)
                y = compiled(x)
                torch.testing.assert_close(y, layer(x))
                assert y.requires_grad == (trainable or needs_dx or layer.bias.requires_grad)
                y.sum().backward()
    assert counter.frame_count <= 4  # and none in the second and third round


# ---- lifetimes ----


def test_torchtune_904_what_is_deleted_is_freed():
    """A cache on methods kept every model alive. Without the collector: there are no cycles."""
    layer = LoRALinear.from_linear(nn.Linear(64, 64), r=4)
    layer.add_adapter("other", SPEC)
    layer.set_adapter(["default", "other"])
    layer.pack_weight(backward=True)
    layer(torch.randn(64, 64)).sum().backward()
    layer.merge()
    layer.path()
    factors = [weakref.ref(p) for t in layer.tables().values() for p in t.values()]
    merged = weakref.ref(layer.merged_weight)
    gc.collect()
    gc.disable()
    try:
        layer.unmerge()
        assert merged() is None
        for name in ("default", "other"):
            layer.delete_adapter(name)
        assert [ref() for ref in factors] == [None] * len(factors)
        watched = [weakref.ref(layer), weakref.ref(layer.weight), weakref.ref(layer.packed)]
        del layer
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()
