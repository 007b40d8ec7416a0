"""Bugs that other projects' integrations with PEFT had, where `lora_ext.accelerate` alone could
have them.

Names and docstrings have the peers' public reports. `contract/test_bugs` has those that our own
layers could have, too.
"""

import pytest
import torch
from helpers import BF16, F64
from layer_helpers import bits
from peft_helpers import (
    ADAPTERS,
    accelerated,
    exact_model,
    layer_model,
    lora_modules,
    make_ids,
    make_x,
    net,
    peft_model,
    step,
)
from torch import nn

import lora_ext


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_peft_2918_a_negative_weight_of_a_sum(kind):
    """add_weighted_adapter's negative weight changed the wrong factor: the product is what counts.

    PEFT makes the sum; what is computed with it is ours.
    """
    model = layer_model(kind, "one", F64)
    model.base_model.add_weighted_adapter(["a"], [-1.0], "negative", "linear")
    lora_ext.accelerate(model.double())
    x = make_x(kind, F64)
    model.set_adapter("a")
    positive = model(x)
    with model.disable_adapter():
        base = model(x)
    model.set_adapter("negative")
    torch.testing.assert_close(model(x) - base, base - positive, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_dora_against_finite_differences(kind, dropout):
    """The norm is a constant, so that lora_A's and lora_B's own gradients are not the whole
    derivative: x and the magnitude are checked, the rest beside PEFT in `test_same_in_float64`."""
    model = lora_ext.accelerate(layer_model(kind, "dora", F64, lora_dropout=dropout))
    (layer,) = lora_modules(model).values()
    x = make_x(kind, F64, 3)
    magnitude = layer.lora_magnitude_vector["a"].weight

    def run(*_):
        torch.manual_seed(4)
        return model(x)

    inputs = (magnitude,) if kind == "embedding" else (x.requires_grad_(), magnitude)
    assert torch.autograd.gradcheck(run, inputs)


def test_vllm_35889_x_that_is_not_contiguous_in_pefts_own_forward():
    """DoRA on a base with hooks."""
    model = layer_model("linear", "dora", F64)
    fast = accelerated(model)
    (layer,) = lora_modules(fast).values()
    layer.base_layer.register_forward_hook(lambda *_: None)
    for x in (
        torch.randn(24, 10, dtype=F64).t(),
        torch.randn(10, 48, dtype=F64)[:, ::2],
        torch.randn(1, 24, dtype=F64).expand(10, 24),
        torch.randn(241, dtype=F64)[1:].view(10, 24),
        torch.randn(24, dtype=F64),
    ):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-11, atol=1e-11)
