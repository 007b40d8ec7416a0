"""A valid folder that a model cannot take, or whose load fails midway: no change."""

import copy
import sys

import pytest
import torch
from adapter_helpers import assert_unchanged, make_zoo, output, state_of
from hostile_helpers import assert_refused
from torch import nn

from lora_ext import LoraConfig, apply_lora
from lora_ext.adapters import AdapterError, load_adapter
from lora_ext.nn import LoRALayer

pytestmark = pytest.mark.usefixtures("no_hang")


class Linear8bit(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)


class OwnLinear(nn.Linear):
    pass


def integer_linear():
    layer = nn.Linear(16, 16)
    weight = torch.ones(16, 16, dtype=torch.int8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def hooked_linear():
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Linear8bit, r"at 'layers.1.q_proj', but the adapter is for a .*\.Linear8bit"),
        (lambda: OwnLinear(16, 16), r"'layers.1.q_proj', but the adapter is for a .*\.OwnLinear"),
        (lambda: nn.Bilinear(4, 4, 4), r"is for a torch.nn.modules.linear.Bilinear"),
        (integer_linear, r"'layers.1.q_proj': .*expected a floating weight, but got torch.int8"),
        (hooked_linear, r"'layers.1.q_proj' cannot be adapted: .*its forward was replaced"),
        (lambda: nn.Linear(16, 8), r"layers.1.q_proj.lora_B.weight': expected shape \[8, 2\]"),
        (lambda: nn.Linear(16, 16, bias=False), "LoRA tensors alone, .*1.q_proj.base_layer.bias"),
        (lambda: nn.Identity(), "is for a torch.nn.modules.linear.Identity"),
        (lambda: nn.Conv2d(16, 16, 3), "is for a torch.nn.modules.conv.Conv2d"),
    ],
    ids=["8 bit", "subclass", "bilinear", "integer", "hook", "shape", "bias", "identity", "3x3"],
)
def test_a_module_that_cannot_have_the_adapter(make, message, folder):
    base = make_zoo(torch.float32)
    base.layers[1].q_proj = make()
    before = state_of(base)
    with pytest.raises(AdapterError, match=message):
        load_adapter(base, folder)
    assert_unchanged(base, before)


def test_a_model_with_more_layers(folder):
    """As in PEFT they stay as they are, and a warning names them."""
    base = make_zoo(torch.float32)
    base.layers.append(copy.deepcopy(base.layers[0]))
    with pytest.warns(UserWarning, match=r"names 'layers.3.q_proj' too, for which the file has no"):
        load_adapter(base, folder)
    assert type(base.layers[3].q_proj) is nn.Linear


def test_a_model_with_fewer_layers(folder):
    base = make_zoo(torch.float32)
    del base.layers[2]
    assert_refused(folder, r"LoRA tensors alone, but got 'base_model.model.layers.2.q_proj", base)


# ---- all or nothing ----


class Failure(BaseException):
    pass


def failing(function, count, after=False):
    """The function, which fails in its call number `count`."""
    calls = iter(range(10**6))

    def call(*args, **kwargs):
        number = next(calls)
        if number == count and not after:
            raise Failure
        result = function(*args, **kwargs)
        if number == count:
            raise Failure
        return result

    return call


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "last"),
    [
        (LoRALayer, "add_adapter", 3),
        (torch.Tensor, "copy_", 10),
        ("lora_ext.adapters.apply", "install", 1),
    ],
)
def test_a_failure_at_any_point_changes_nothing(owner, name, last, adapted, folder, monkeypatch):
    base = make_zoo(torch.float32)
    if adapted:
        apply_lora(base, LoraConfig("layers.1.q_proj", r=3), adapter_name="other")
    expected = output(base)
    before = state_of(base)
    owner = sys.modules[owner] if isinstance(owner, str) else owner
    for count in range(last):
        for after in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing(getattr(owner, name), count, after))
                with pytest.raises(Failure):
                    load_adapter(base, folder)
            assert_unchanged(base, before)
            assert torch.equal(output(base), expected)
    load_adapter(base, folder)
