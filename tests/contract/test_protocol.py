"""A layer as an nn.Module and its adapters by name, for both kinds: state, copies, hooks, files,
dtypes, modes."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers import BF16, F16, F32, F64, by_pickle, by_torch_save
from layer_helpers import assert_same_state, snapshot
from peft_helpers import FAST, as_float64, step
from torch.func import functional_call

from contract import bases
from contract.cases import (
    CALLED,
    EXPERTS,
    LAYERS,
    LINEAR,
    MATRIX,
    assert_close,
    cases,
    every_kind,
)

EVERYTHING = ("net", *LAYERS, *CALLED)

# ---- adapters by name ----


@cases(EVERYTHING, ["three"])
def test_only_active_adapters_count_and_train(kind, layer, adapters):
    subject = kind.make(layer, adapters, F64)
    x, seen = subject.x(dtype=F64), []
    for names in (["b"], ["c", "a"], ["a", "b", "c"]):
        subject.set_adapter(names)
        assert subject.active() == {tuple(names)}
        step(subject.model, x)
        for name in "abc":
            for parameter in subject.factors(name):
                assert parameter.requires_grad == (name in names)
                assert (parameter.grad is not None) == (name in names)
        seen.append(subject(x))
        assert_close(seen[-1], subject.in_float64()(x))
    assert not any(torch.allclose(y, other) for y, other in pairwise(seen))


@cases(EVERYTHING, ["three"])
def test_a_deleted_adapter_leaves_the_others(kind, layer, adapters):
    subject = kind.make(layer, adapters, F64)
    x = subject.x(dtype=F64)
    subject.set_adapter(["a", "c"])
    wanted = subject(x)
    subject.set_adapter(["a", "b", "c"])
    subject.delete("b")
    assert not any("b" in key.split(".") for key in subject.model.state_dict())
    assert subject.active() == {("a", "c")}
    assert_close(subject(x), wanted)


@cases(EVERYTHING, ["one", "three"])
def test_disabled_it_is_the_base(kind, layer, adapters):
    subject = kind.make(layer, adapters, F64)
    x, without = subject.x(dtype=F64), subject.holding(copy.deepcopy(subject.model))
    with torch.no_grad():
        for parameter in without.trained():
            parameter.zero_()
    y, base = subject(x), without(x)
    assert not torch.allclose(y, base)
    with subject.disabled():
        assert subject.paths() == {"base"}
        assert_close(subject(x), base)
    with pytest.raises(KeyError), subject.disabled():
        raise KeyError
    assert torch.equal(subject(x), y)


# ---- hooks ----


@cases([*MATRIX, *CALLED], ["one"])
def test_hooks_see_and_change_what_passes(kind, layer, adapters):
    subject = kind.make(layer, adapters, F64)
    x, grads = subject.x(dtype=F64).requires_grad_(), []
    wanted = subject.in_float64()(2 * x) + 1
    subject.layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    subject.layer.register_forward_hook(lambda module, args, output: output + 1)
    assert_close(subject(x), wanted)
    subject.layer.register_full_backward_hook(
        lambda module, into, out: grads.append((into[0], out[0]))
    )
    subject(x).sum().backward()
    ((into, out),) = grads
    assert out.eq(1).all()
    assert_close(x.grad, 2 * into)


@every_kind
def test_a_copy_has_hooks_of_its_own(kind):
    subject, calls = kind.make("linear"), []
    handle = subject.layer.register_forward_hook(lambda *args: calls.append(1))
    other = copy.deepcopy(subject.model)
    handle.remove()
    subject(subject.x())
    assert not calls
    other(subject.x())
    assert calls


# ---- copies and state ----


WAYS = {"deepcopy": copy.deepcopy, "pickle": by_pickle, "torch.save": by_torch_save}


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("way", WAYS)
@cases((*EVERYTHING, *bases.QUANTISED, *EXPERTS), ["one", "three", "lora_bias"])
def test_copies_are_whole_and_independent(kind, layer, adapters, way, merged):
    if merged and not bases.has_dense_weight(layer):
        pytest.skip("refused or rounded")
    if way != "deepcopy" and not bases.can_be_pickled(layer):
        pytest.skip("without adapters, too")
    subject = kind.make(layer, adapters)
    # bitsandbytes changes its weight in a forward in eval, and back for a state dict.
    subject.model.train(layer in bases.QUANTISED)
    x = subject.x()
    with subject.disabled():
        base = subject(x)
    if merged:
        subject.merge()
    reasons, y = subject.reasons(), subject(x)
    subject.pack()  # which a copy does not have
    other = subject.holding(WAYS[way](subject.model))
    assert_same_state(other.model, snapshot(subject.model))
    assert other.reasons() == reasons
    assert (other.active(), other.merged()) == (subject.active(), subject.merged())
    (names,) = subject.active()
    assert subject.merged() == {names if merged else ()}
    # torchao's tensors, which are made of others, have no memory themselves.
    plain = [parameter for parameter in other.model.parameters() if parameter.data_ptr()]
    own = {parameter.data_ptr() for parameter in subject.model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in plain}
    for parameter in subject.trained():
        parameter.zero_()
    subject.unmerge()
    if len(names) > 1:
        subject.delete(names[-1])
    assert torch.equal(other(x), y)
    with other.disabled():
        assert_close(other(x), base, **kind.unmerged(F32))
    kept = subject(x)
    for parameter in plain:
        parameter.zero_()
    assert torch.equal(subject(x), kept)


@torch.no_grad()
@cases(EVERYTHING, ["one", "three", "dora", "lora_bias"])
def test_a_state_dict_restores_the_adapters(kind, layer, adapters):
    subject, other = kind.make(layer, adapters), kind.make(layer, adapters)
    x = subject.x()
    for parameter in other.model.parameters():
        parameter.copy_(torch.rand_like(parameter))
    assert not torch.allclose(other(x), subject(x))
    other.model.load_state_dict(subject.model.state_dict())
    assert torch.equal(other(x), subject(x))


@cases(["net"], ["two", "dora"])
def test_a_saved_adapter_is_loaded_as_it_was(kind, layer, adapters, tmp_path):
    source, model = kind.make(layer, "one", F64), kind.make(layer, adapters, F64)
    with torch.no_grad():
        for parameter in source.trained():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    source.save(tmp_path, "a")
    model.load(tmp_path, "loaded")
    model.set_adapter("loaded")
    assert model.paths() <= FAST
    x = source.x(6)
    assert_close(model.holding(model.model.double())(x), source(x))


def packs_of(model):
    packs = [getattr(module, "packed", None) for module in model.modules()]
    return [pack for pack in packs if pack is not None and pack.is_packed]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@cases(EVERYTHING, ["one", "three", "lora_bias"])
def test_functional_call_uses_what_it_is_given(kind, layer, adapters, dtype):
    """And neither a packed weight, which waits for the next call, nor a copy of the factors."""
    subject = kind.make(layer, adapters, dtype)
    subject.model.eval()
    subject.pack()
    packs = packs_of(subject.model)
    reference, x = subject.in_float64(), subject.x(64, dtype)
    others = {name: torch.randn_like(p) for name, p in subject.model.named_parameters()}
    wide = {name: value.double() for name, value in others.items()}
    found = functional_call(subject.model, others, (x,))
    wanted = functional_call(reference, wide, (as_float64(x),))
    assert packs_of(subject.model) == packs
    tolerance = 1e-10 if dtype == F64 else 1e-4
    assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@cases(EVERYTHING, ["one", "three"])
def test_casting_and_moving(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    subject.pack()
    for dtype in (BF16, F64, F16, F32):
        subject.model.to(dtype)
        assert subject.paths() <= FAST
        x = subject.x(dtype=dtype)
        y, wanted = subject(x), subject.in_float64()(as_float64(x))
        assert {y.dtype, *(p.dtype for p in subject.model.parameters())} == {dtype}
        assert (y - wanted).abs().max() <= 64 * torch.finfo(dtype).eps * wanted.abs().max()
    meta = copy.deepcopy(subject.model).to("meta")
    y = meta(subject.x().to("meta"))
    assert y.is_meta and y.shape == wanted.shape


# ---- bad input ----

WRONG = {"width": lambda x: x[..., :7], "half": torch.Tensor.half, "integers": torch.Tensor.long}


@pytest.mark.parametrize("way", WRONG)
@cases([*LINEAR, *CALLED], ["one"])
def test_a_wrong_x_is_an_error_and_changes_nothing(kind, layer, adapters, way):
    subject = kind.make(layer, adapters)
    y = subject(subject.x())
    with pytest.raises((RuntimeError, TypeError)):
        subject(WRONG[way](subject.x()))
    assert torch.equal(subject(subject.x()), y)
