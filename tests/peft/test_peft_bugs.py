"""Bugs that other projects' integrations with PEFT had, as tests of `lora_ext.accelerate`.

Names and docstrings have the peers' public reports. `test_peer_bugs` has those of kernels,
`test_peer_bugs_layers` those of layers of our own.
"""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from helpers import BF16, F16, F32, F64
from layer_helpers import bits
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft_helpers import (
    ADAPTERS,
    TARGETS,
    accelerated,
    as_float64,
    exact_model,
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
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_ext

KINDS = ("linear", "conv1d", "embedding")
MATRIX_KINDS = ("linear", "conv1d")


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


# ---- which path runs ----


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_axolotl_3806_unsloth_23_2319_dropout_and_bias_keep_the_fused_path(
    dropout, lora_bias, training
):
    """The fused path was skipped in silence as soon as there was dropout or a bias."""
    words = {"r": 4, "lora_dropout": dropout, "lora_bias": lora_bias}
    model = accelerated(peft_model(nn.Sequential(nn.Linear(32, 32)), {"a": words}, ["0"]))
    model.train(training)
    assert set(paths(model).values()) == {"fused"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(torch.randn(64, 32))
    calls = [event.name for event in profile.events()]
    assert calls.count("lora_ext::lora_linear") >= 1
    assert calls.count("aten::linear") <= 1  # the base's product, inside the op
    assert "aten::dropout" not in calls


def test_lorafusion_a_merged_layer_adds_nothing_twice():
    """The patched forward did not know of merged adapters and added the update again."""
    model, ids = net("three", F64), make_ids()
    fast, wanted = accelerated(model), model(ids)
    fast.merge_adapter()
    assert set(paths(fast).values()) == {"base"}
    torch.testing.assert_close(fast(ids), wanted, rtol=1e-10, atol=1e-10)
    fast.unmerge_adapter()
    torch.testing.assert_close(fast(ids), wanted, rtol=1e-10, atol=1e-10)


# ---- merging and several adapters, by PEFT's own code on our forward ----


def test_peft_1355_merging_twice():
    """Each further merge added the update again, and each unmerge took one out."""
    model, ids = lora_ext.accelerate(net("three", F64)), make_ids()
    y = model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that all is merged already
        for change in (*[model.merge_adapter] * 3, *[model.unmerge_adapter] * 3):
            change()
            torch.testing.assert_close(model(ids), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_2918_negative_weights(kind):
    """A negative weight changed the wrong factor: the product is what counts. a and -a cancel."""
    adapters = {"a": {"r": 4, "lora_alpha": 3}, "minus": {"r": 4, "lora_alpha": -3}}
    model = layer_model(kind, "one", F64)
    model.add_adapter("minus", LoraConfig(target_modules=["0"], **adapters["minus"]))
    model.base_model.add_weighted_adapter(["a"], [-1.0], "negative", "linear")
    (layer,) = layers_of(lora_ext.accelerate(model.double()))
    x = make_x(kind, F64)
    model.set_adapter("a")
    positive = model(x)
    with model.disable_adapter():
        base = model(x)
    model.set_adapter("negative")
    torch.testing.assert_close(model(x) - base, base - positive, rtol=1e-5, atol=1e-6)
    assert layer.scaling["minus"] < 0


@pytest.mark.parametrize("names", [["a"], ["b", "a"], ["c", "a", "b"]])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_3608_3763_several_adapters_merged_or_not(kind, names):
    """Merged adapters differed from unmerged ones, and merging a subset dropped the others."""
    model, x = lora_ext.accelerate(layer_model(kind, "three", F64)), make_x(kind, F64)
    model.base_model.set_adapter(names)
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-12)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-12)


def test_trl_6688_forwards_between_merges_do_not_drift():
    """PEFT's merge rounds the bf16 weight for good; our forward reads what it left, and adds to it
    no drift of its own: 50 cycles leave the bits that PEFT's own model has."""
    model = net("one", BF16)
    fast, ids = accelerated(model), make_ids()
    for one in (model, fast):
        for _ in range(50):
            one.merge_adapter()
            one(ids)
            one.unmerge_adapter()
    for (name, ours), theirs in zip(fast.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(bits(ours), bits(theirs)), name
    wanted = exact_model(fast)(ids)
    scale = wanted.abs().max().item()
    assert (fast(ids).double() - wanted).abs().max() <= 0.02 * scale


def test_lora_34_61_eval_and_train_through_a_parent():
    """train() of the model did not reach its layers: dropout stayed."""
    parent = nn.ModuleDict({"inner": lora_ext.accelerate(net("one", F64, lora_dropout=0.5))})
    ids = make_ids()
    parent.eval()
    assert torch.equal(parent["inner"](ids), parent["inner"](ids))
    parent.train()
    assert not torch.equal(parent["inner"](ids), parent["inner"](ids))


# ---- autograd ----


class Leaf(nn.Linear):
    """Returns a leaf, which autograd lets nobody write to."""

    def forward(self, input):
        self.returned = super().forward(input).detach().requires_grad_()
        return self.returned


class View(nn.Linear):
    """Returns a view of a tensor that it keeps."""

    def forward(self, input):
        self.kept = torch.zeros(len(input), 2, self.out_features, dtype=input.dtype)
        self.kept[:, 0] = super().forward(input).detach()
        return self.kept[:, 0]


@pytest.mark.parametrize("kind", [Leaf, View])
@pytest.mark.parametrize("adapters", ["one", "three", "lora_bias"])
def test_peft_1372_no_write_into_what_the_base_returned(kind, adapters):
    """The update was added in place into the base's output: leaves, views and hooks broke."""
    model = peft_model(nn.Sequential(kind(24, 40)), ADAPTERS[adapters], ["0"], F64)
    fast, x = accelerated(model), make_x("linear", F64)
    for _ in range(2):
        found, wanted = step(fast, x), step(model, x)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=name)
    base, theirs = (one.base_model.model[0].base_layer for one in (fast, model))
    if kind is Leaf:
        torch.testing.assert_close(base.returned, theirs.returned)
        torch.testing.assert_close(base.returned.grad, theirs.returned.grad)
    else:
        torch.testing.assert_close(base.kept, theirs.kept)


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_peft_1372_in_place_on_the_output(kind, adapters):
    model = layer_model(kind, adapters, F64)
    grads = []
    for one in (model, accelerated(model)):
        x = make_x(kind, F64).requires_grad_()
        one(x).mul_(2).relu_().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adapters", ["one", "three", "dora", "lora_bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_unsloth_304_895_backward_leaves_what_was_saved(kind, adapters):
    """The backward wrote into x, which other layers had saved: a second one gave other numbers."""
    if (kind, adapters) == ("embedding", "lora_bias"):
        pytest.skip("PEFT has none")
    model = lora_ext.accelerate(layer_model(kind, adapters, F64, lora_dropout=0.3))
    x = make_x(kind, F64)
    y = model(x)
    grads = []
    for _ in range(2):
        model.zero_grad()
        y.sum().backward(retain_graph=True)
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("adapters", ["one", "three", "different"])
@pytest.mark.parametrize("base", [nn.Linear, "subclass"])
def test_fms_acceleration_97_dx_with_dropout(base, adapters):
    """dx forgot the mask. Against finite differences, with the masks held by the generator."""

    class Other(nn.Linear):
        pass

    words = ADAPTERS["three" if adapters == "different" else adapters]
    torch.manual_seed(0)
    kind = Other if base == "subclass" else base
    model = peft_model(nn.Sequential(kind(24, 12)), words, ["0"], F64, lora_dropout=0.4)
    lora_ext.accelerate(model)
    (layer,) = layers_of(model)
    if adapters == "different":
        layer.lora_dropout["b"].p = 0.6
        assert paths(model)["0"] == "added"
    factors = [p for p in model.parameters() if p.requires_grad]

    def run(x, *_):
        torch.manual_seed(4)
        return model(x)

    x = make_x("linear", F64, 3).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *factors))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_dora_against_finite_differences(kind, dropout):
    """The norm is a constant, so that lora_A's and lora_B's own gradients are not the whole
    derivative: x and the magnitude are checked, the rest beside PEFT in `test_same_in_float64`."""
    model = lora_ext.accelerate(layer_model(kind, "dora", F64, lora_dropout=dropout))
    (layer,) = layers_of(model)
    x = make_x(kind, F64, 3)
    magnitude = layer.lora_magnitude_vector["a"].weight

    def run(*_):
        torch.manual_seed(4)
        return model(x)

    inputs = (magnitude,) if kind == "embedding" else (x.requires_grad_(), magnitude)
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("cast", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("half_adapters", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("adapters", ["one", "three", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_unsloth_320_7020_every_mixture_of_dtypes(kind, adapters, dtype, half_adapters, cast):
    """Mixed float32 and half layers crashed in a step."""
    model = layer_model(kind, adapters, dtype, half_adapters)
    if half_adapters and dtype == F32:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(BF16)
    fast, x = accelerated(model), make_x(kind, dtype, 64)
    outputs = []
    for one in (fast, model):
        with torch.autocast("cpu", cast or BF16, enabled=cast is not None):
            outputs.append(one(x))
    y, theirs = outputs
    assert y.dtype == theirs.dtype
    wanted = exact_model(model)(as_float64(x))
    floor = 1e-6 * wanted.abs().max().item()
    error, limit = ((out.double() - wanted).abs().max() for out in (y, theirs))
    assert error <= 2 * limit + floor
    y.float().sum().backward()
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("way", ["transposed", "strided", "expanded", "offset", "one dimension"])
@pytest.mark.parametrize("adapters", ["one", "dora"])
@pytest.mark.parametrize("base", ["linear", "hooked", "conv1d"])
def test_vllm_35889_x_that_is_not_contiguous(base, adapters, way):
    model = layer_model("conv1d" if base == "conv1d" else "linear", adapters, F64)
    fast, plain = accelerated(model), torch.randn(24, 10, dtype=F64)
    x = {
        "transposed": lambda: plain.t(),
        "strided": lambda: torch.randn(10, 48, dtype=F64)[:, ::2],
        "expanded": lambda: torch.randn(1, 24, dtype=F64).expand(10, 24),
        "offset": lambda: torch.randn(241, dtype=F64)[1:].view(10, 24),
        "one dimension": lambda: torch.randn(24, dtype=F64),
    }[way]()
    if base == "hooked":
        layers_of(fast)[0].base_layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-11, atol=1e-11)


def test_vllm_51121_a_smaller_batch_after_a_larger_one():
    model = net("three", F64)
    fast = accelerated(model)
    for rows in (64, 3, 1, 0, 17):
        ids = make_ids(64)[:rows]
        assert fast(ids).shape == (rows, 9, 5)
        if rows:
            torch.testing.assert_close(fast(ids), model(ids), rtol=1e-10, atol=1e-10)


# ---- compiled ----


@pytest.mark.parametrize("adapters", ["one", "dora", "three"])
def test_peft_3020_compile_checkpoint_and_dropout(counter, adapters):
    """The three together failed; here they give the gradients of the plain layer, in one graph."""
    model = lora_ext.accelerate(layer_model("linear", adapters, F64, lora_dropout=0.5))

    def run(x):
        return checkpoint(model, x, use_reentrant=False).sin()

    results = []
    for function in (
        lambda x: model(x).sin(),
        run,
        torch.compile(run, backend=counter, fullgraph=True),
    ):
        x = make_x("linear", F64).requires_grad_()
        model.zero_grad()
        torch.manual_seed(3)
        function(x).sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([x.grad, *grads])
    assert counter.frame_count == 1
    for value, recomputed, compiled in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(compiled, value, rtol=1e-10, atol=1e-10)


def test_pytorch_141039_requires_grad_differs(counter):
    """A graph broke where the requires_grad of the adapters differed from that at compile time."""
    model = lora_ext.accelerate(layer_model("linear"))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    for _ in range(3):
        for trainable in (True, False):
            for needs_dx in (True, False):
                for parameter in factors:
                    parameter.requires_grad_(trainable)
                x = make_x("linear").requires_grad_(needs_dx)
                y = compiled(x)
                torch.testing.assert_close(y, model(x))
                assert y.requires_grad == (trainable or needs_dx)
                if y.requires_grad:
                    y.sum().backward()
    assert counter.frame_count <= 4  # and none in the second and third round


# ---- lifetimes ----


def test_torchtune_904_what_is_deleted_is_freed():
    """A cache on methods kept every model alive. Without the collector: there are no cycles."""
    model = lora_ext.accelerate(net("one"))
    model.add_adapter("b", LoraConfig(target_modules=TARGETS, r=2))
    step(model, make_ids())
    str(lora_ext.explain(model))
    factors = [weakref.ref(layer.lora_A["b"].weight) for layer in layers_of(model) if layer.lora_A]
    gc.collect()
    gc.disable()
    try:
        model.delete_adapter("b")
        assert len(factors) == 3 and [ref() for ref in factors] == [None] * 3
        weights = [weakref.ref(p) for p in model.parameters()]
        del model
        assert [ref() for ref in weights] == [None] * len(weights)
    finally:
        gc.enable()


def test_1000_steps_keep_nothing():
    """Neither tensors nor objects pile up over calls."""
    model = lora_ext.accelerate(layer_model("linear", "one", lora_dropout=0.1))
    x = make_x("linear", rows=2)
    for _ in range(50):
        model(x).sum().backward()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        model(x).sum().backward()
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert reasons(copy.deepcopy(model)) == reasons(model)
