"""Bugs that other projects' integrations with PEFT had, where `lora_ext.accelerate` alone could
have them.

Names and docstrings have the peers' public reports. `contract/test_bugs` has those that our own
layers could have, too.
"""

import pytest
import torch
from helpers import F64
from peft_helpers import (
    ADAPTERS,
    accelerated,
    layer_model,
    lora_modules,
    make_x,
    peft_model,
    step,
)
from torch import nn

import lora_ext


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
        torch.testing.assert_close(step(fast, x), step(model, x), rtol=1e-11, atol=1e-11)
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
