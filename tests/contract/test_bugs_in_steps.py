"""Bugs that other projects' layers had in forward and backward, as tests of both kinds of layer.

As in `test_bugs`, names and docstrings have the peers' public reports.
"""

import pytest
import torch
from helpers import BF16, F16, F32, F64
from peft_helpers import as_float64
from torch import nn

from contract.adapters import DIFFERENT
from contract.cases import CALLED, LAYERS, LINEAR, MATRIX, assert_close, cases, every_kind


def assert_same_gradients(subject, reference):
    found = dict(subject.model.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.grad is None:
            assert found[name].grad is None, name
        else:
            assert_close(found[name].grad, parameter.grad, msg=name)


@cases([*LAYERS, *CALLED], ["one", "three", "lora_bias"])
def test_peft_1372_no_write_into_what_others_own(kind, layer, adapters):
    """The update was added in place into what the base returned: leaves, views and hooks broke."""
    subject = kind.make(layer, adapters, F64)
    reference, x, seen = subject.in_float64(), subject.x(dtype=F64), []
    if x.is_floating_point():
        x.requires_grad_()
    before, own_x = x.detach().clone(), x.detach().clone().requires_grad_(x.requires_grad)
    wanted = reference(own_x)
    subject.layer.register_forward_hook(lambda module, args, output: seen.append(output))
    subject.layer.register_forward_hook(lambda module, args, output: output.view_as(output).clone())
    y = nn.ReLU(inplace=True)(subject(x))
    assert_close(y, torch.relu(wanted))
    assert_close(seen[0], wanted)
    assert torch.equal(x.detach(), before)
    y.sum().backward()
    torch.relu(wanted).sum().backward()
    assert_same_gradients(subject, reference)
    if x.requires_grad:
        assert_close(x.grad, own_x.grad)


@cases([*LAYERS, *CALLED], ["one", "three", "dora", "lora_bias"])
def test_unsloth_304_895_backward_leaves_what_was_saved(kind, layer, adapters):
    """The backward wrote into x, which other layers had saved: a second one gave other numbers."""
    subject = kind.make(layer, adapters, F64, dropout=0.3)
    y = subject(subject.x(dtype=F64))
    grads = []
    for _ in range(2):
        subject.model.zero_grad()
        y.sum().backward(retain_graph=True)
        grads.append([p.grad.clone() for p in subject.trained()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.rest  # a second each
@pytest.mark.parametrize("dropout", [0.4, DIFFERENT], ids=["same", "different"])
@cases([*MATRIX, *CALLED], ["one", "three"])
def test_fms_acceleration_97_dx_with_dropout(kind, layer, adapters, dropout):
    """dx forgot the mask. Against finite differences, with the masks held by the generator."""
    subject = kind.make(layer, adapters, F64, dropout=dropout)
    if adapters == "three" and dropout == DIFFERENT:
        assert subject.paths() == {"added"}

    def run(x, *_):
        torch.manual_seed(4)
        return subject(x)

    x = subject.x(3, F64)[:3].requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *subject.trained()))


# Of the kernels there is test_peer_bugs; here the layers choose dtypes and cast.
@pytest.mark.parametrize("cast", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@cases([*LAYERS, "subclass"], ["one", "three", "dora"])
def test_unsloth_320_7020_every_mixture_of_dtypes(
    kind, layer, adapters, dtype, adapter_dtype, cast
):
    """Mixed float32 and half layers crashed in a step."""
    subject = kind.make(layer, adapters, dtype, adapter_dtype)
    x = subject.x(64, dtype)

    def under_autocast(model):
        with torch.autocast("cpu", cast or BF16, enabled=cast is not None):
            return model(x)

    y, theirs = under_autocast(subject), under_autocast(subject.in_peft_order())
    wanted = subject.in_float64()(as_float64(x))
    scale = wanted.abs().max().item()
    assert y.dtype == theirs.dtype == (dtype if cast is None or layer == "embedding" else cast)
    error, limit = ((out.double() - wanted).abs().max() for out in (y, theirs))
    assert error <= min(2 * limit + 1e-6 * scale, 0.03 * scale)
    y.float().sum().backward()
    for parameter in subject.trained():
        assert parameter.dtype == parameter.grad.dtype == adapter_dtype
        assert parameter.grad.isfinite().all()
    subject.merge()
    assert (under_autocast(subject).double() - wanted).abs().max() <= 0.03 * scale


@pytest.mark.parametrize("way", ["transposed", "strided", "expanded", "offset", "one dimension"])
@cases([*LINEAR, *CALLED], ["one", "three", "dora"])
def test_vllm_35889_x_that_is_not_contiguous(kind, layer, adapters, way):
    subject = kind.make(layer, adapters, F64)
    width = subject.x().shape[-1]
    x = {
        "transposed": lambda: torch.randn(width, 10, dtype=F64).t(),
        "strided": lambda: torch.randn(10, 2 * width, dtype=F64)[:, ::2],
        "expanded": lambda: torch.randn(1, width, dtype=F64).expand(10, width),
        "offset": lambda: torch.randn(10 * width + 1, dtype=F64)[1:].view(10, width),
        "one dimension": lambda: torch.randn(width, dtype=F64),
    }[way]()
    assert_close(subject(x), subject.in_float64()(x), rtol=1e-11, atol=1e-11)


@every_kind
def test_vllm_51121_a_smaller_batch_after_a_larger_one(kind):
    subject = kind.make("net", "three", F64)
    reference, x = subject.in_float64(), subject.x(64)
    shape = reference(x).shape[1:]
    for rows in (64, 3, 1, 0, 17):
        assert subject(x[:rows]).shape == (rows, *shape)
        if rows:
            assert_close(subject(x[:rows]), reference(x[:rows]))
