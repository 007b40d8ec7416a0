"""What both kinds of layer compute, beside float64 and beside PEFT's operations in the same dtypes:
y, dx and the gradient of all that is trained."""

import pytest
import torch
from helpers import BF16, F16, F32, F64, HALVES, max_error, rms_error, short
from layer_helpers import assert_same_state, snapshot
from peft_helpers import FAST, as_float64, step

from contract import bases
from contract.cases import CALLED, LAYERS, LINEAR, MATRIX, cases

EVERYTHING = ("net", "linear without bias", *LAYERS, *CALLED)
ADAPTERS = ("one", "rslora", "lora_bias", "dora", "three")
# (dtype of the base, dtype of the adapters)
MODES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]


@cases(EVERYTHING, ADAPTERS)
def test_same_in_float64(kind, layer, adapters):
    """Outputs and all gradients, to the last few bits."""
    subject = kind.make(layer, adapters, F64)
    x = subject.x(dtype=F64)
    found, wanted = step(subject.model, x), step(subject.in_float64(), x)
    assert len(found) >= 1 + len(subject.trained()) + x.is_floating_point()
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(short, mode)))
@cases((*EVERYTHING[1:], *bases.QUANTISED), ADAPTERS)
def test_errors_no_larger_than_pefts(kind, layer, adapters, mode):
    """y, dx and each gradient against float64: at most twice PEFT's error, plus a floor."""
    subject = kind.make(layer, adapters, *mode)
    assert subject.paths() <= FAST
    x = subject.x(400, mode[0])
    found, theirs = step(subject.model, x), step(subject.in_peft_order(), x)
    wanted = step(subject.in_float64(), as_float64(x), dtype=mode[0])
    assert found.keys() == theirs.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == theirs[name].dtype, name
        scale = wanted[name].abs().max().item()
        # Products of pairs of halves are exact to 1e-5 (docs/numerics.md).
        floor = scale * (1e-5 if mode[0] in HALVES else 1e-6)
        error, limit = (max_error(one[name], wanted[name]) for one in (found, theirs))
        assert error <= 2 * limit + floor, name
    error, limit = (rms_error(one["y"], wanted["y"]) for one in (found, theirs))
    assert error <= 1.05 * limit + 1e-7 * wanted["y"].abs().max().item()


@pytest.mark.parametrize("dtype", HALVES, ids=short)
@cases(["linear without bias", *LINEAR, "embedding"], ["one", "rslora"])
def test_same_bits_as_pefts_default(library_route, kind, layer, adapters, dtype):
    """docs/numerics.md: float32 adapters on a half base without dropout, where ATen computes."""
    subject = kind.make(layer, adapters, dtype)
    x = subject.x(dtype=dtype)
    found, wanted = step(subject.model, x), step(subject.in_peft_order(), x)
    assert torch.equal(found["y"], wanted["y"])
    assert "dx" not in wanted or torch.equal(found["dx"], wanted["dx"])


@pytest.mark.parametrize("cast", HALVES, ids=short)
@cases([*LAYERS, *CALLED], ["one", "three", "dora", "lora_bias"])
def test_autocast(kind, layer, adapters, cast):
    """y with at most twice PEFT's error, gradients near its own and in the parameters' dtype."""
    subject = kind.make(layer, adapters)
    x, plain = subject.x(400), subject.in_peft_order()

    def run(model):
        with torch.autocast("cpu", cast):
            y = model(x)
        y.float().square().sum().backward()
        return y.detach(), {name: p.grad for name, p in model.named_parameters()}

    (y, grads), (theirs, wanted_grads) = run(subject.model), run(plain)
    wanted = subject.in_float64()(as_float64(x)).detach()
    assert y.dtype == theirs.dtype
    assert max_error(y, wanted) <= 2 * max_error(theirs, wanted) + 1e-6
    assert rms_error(y, wanted) <= 1.05 * rms_error(theirs, wanted) + 1e-6
    for name, wanted_grad in wanted_grads.items():
        assert (grads[name] is None) == (wanted_grad is None), name
        if wanted_grad is not None:
            assert grads[name].dtype == F32
            error = max_error(grads[name], wanted_grad.double())
            assert error <= 0.05 * wanted_grad.abs().max().item(), name


# ---- dropout ----


@cases(["linear", "conv1d", "conv2d", "subclass"], ["one", "three", "dora"])
def test_dropout_is_on_average_nothing(kind, layer, adapters):
    """Over many masks the update's mean is the update without dropout; in eval mode it is that."""
    subject = kind.make(layer, adapters, F64, dropout=0.4)
    x = subject.x(4, F64)
    subject.model.eval()
    wanted = subject(x)
    torch.testing.assert_close(wanted, subject.in_float64()(x), rtol=1e-11, atol=1e-11)
    subject.model.train()
    with torch.no_grad():
        draws = torch.stack([subject(x) for _ in range(2000)])
    spread = draws.std(0) / len(draws) ** 0.5
    assert spread.max() > 0
    assert ((draws.mean(0) - wanted).abs() <= 5 * spread).all()


@cases(["net", *LAYERS, *CALLED], ["three"])
def test_no_random_number_is_drawn_without_dropout(kind, layer, adapters):
    subject = kind.make(layer, adapters, dropout={"a": 0.0, "b": 0.5, "c": 0.0})
    x, before = subject.x(), torch.get_rng_state()
    subject.model.eval()
    subject(x)
    subject.model.train()
    subject.set_adapter(["c", "a"])
    subject(x)
    subject.set_adapter(["a", "b"])
    with subject.disabled():
        subject(x)
    subject.merge()
    subject(x)
    assert torch.equal(before, torch.get_rng_state())
    subject.unmerge()
    subject(x)
    assert torch.equal(before, torch.get_rng_state()) == (layer == "embedding")


# ---- what is left as it was ----


@cases(EVERYTHING, ["one", "three", "dora"])
def test_nothing_is_written(kind, layer, adapters):
    """Neither x nor a parameter changes in a step."""
    subject = kind.make(layer, adapters, dropout=0.2)
    before, x = snapshot(subject.model), subject.x()
    kept = x.clone()
    step(subject.model, x)
    assert torch.equal(x, kept)
    assert_same_state(subject.model, before)


@cases([*MATRIX, *CALLED], ["one", "three", "dora"])
def test_empty_inputs_have_gradients(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x()[:0].requires_grad_()
    y = subject(x)
    assert y.shape == subject.in_peft_order()(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad.eq(0).all() for parameter in subject.trained())
