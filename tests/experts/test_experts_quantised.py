"""Experts in bitsandbytes' 4 bits and in torchao's tensors, in PEFT's models: the numbers of the
same experts dense, and only those that have rows are dequantised, one at a time."""

import copy

import pytest
import torch
import torchao_experts
from expert_helpers import assert_close
from four_bit_experts import parts_of, states_of
from helpers import BF16, F16, F32, short
from peft_helpers import reasons
from quantised_experts import (
    HIDDEN,
    INNER,
    assert_same_bits,
    forms,
    of_one_expert,
    poison_all_but,
    routes,
    step,
    two_mixtures,
)

import lora_ext
from lora_ext.experts import decorated
from lora_ext.quantized import stack, workspace
from lora_ext.quantized.stack import QuantizedStack

FORMS = forms("stand-in", "stand-in points", "int8", "int8 groups", "float8", "float8 groups")


def assert_not_dequantised_whole(model):
    assert all(part.calls == 0 for part in parts_of(model))


# ---- numbers ----


@pytest.mark.parametrize("tokens", [1, 7, 64])  # of no token PEFT's own has no gradient
@pytest.mark.parametrize("form", ["nf4", *torchao_experts.forms("stand-in", "int8", "float8")])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
def test_the_numbers_of_peft_on_dense_experts(dtype, form, tokens):
    packed, dense = two_mixtures(form=form, dtype=dtype, adapter_dtype=F32)
    x, index, weights = routes(tokens, dtype)
    exact = step(dense.double(), (x.double(), index, weights.double()))
    found = step(lora_ext.accelerate(packed), (x, index, weights))
    assert_close(found, exact, {F32: 1e-5, BF16: 3e-2, F16: 4e-3}[dtype])
    assert_not_dequantised_whole(packed)


# ---- what is read and written ----


@pytest.mark.parametrize("form", forms("stand-in", "stand-in points", "int8", "float8 groups"))
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_experts_without_rows_are_not_read(form, tokens, monkeypatch):
    """One expert is dequantised, once in each direction for each projection."""
    numbers, stored = [], QuantizedStack.stored
    packed, dense = map(lora_ext.accelerate, two_mixtures(form=form))
    operands = of_one_expert(tokens, 3)
    wanted = step(dense, operands)
    poison_all_but(3, packed)
    noted = lambda stack, number: numbers.append(number) or stored(stack, number)  # noqa: E731
    monkeypatch.setattr(QuantizedStack, "stored", noted)
    assert_same_bits(step(packed, operands), wanted)
    assert numbers == [3, 3, 3, 3]


@pytest.mark.parametrize("form", FORMS)
def test_the_workspace_is_one_expert_and_nothing_is_written_to(form):
    packed, dense = two_mixtures(form=form)
    model = lora_ext.accelerate(packed)
    ((path, reason),) = reasons(model)
    known = {"fp4": "fp4", "float8": "float8_e4m3fn", "float8 groups": "float8_e4m3fn"}
    code = known.get(form, "nf4" if parts_of(model) else "int8")
    assert path == "fused" and f", {code}" in reason
    assert reason.endswith(", one dequantised at a time")
    before = copy.deepcopy(model.state_dict())
    states = copy.deepcopy(states_of(model))
    workspace.release()
    try:
        step(model, routes(64))
        assert workspace.nbytes() == 2 * INNER * HIDDEN * 4
        assert lora_ext.explain(model).workspace_bytes == 2 * INNER * HIDDEN * 4
    finally:
        workspace.release()
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(whole(after[name]), whole(value))
    for found, wanted in zip(states_of(model), states, strict=True):
        assert torch.equal(found.absmax, wanted.absmax)
        assert not found.nested or torch.equal(found.state2.absmax, wanted.state2.absmax)
    if states:  # of the parametrizations nothing is left over, as in PEFT's own forward
        base = packed.base_model.model.experts.get_base_layer()
        assert [len(each) for each in base.parametrizations.values()] == [1, 1]
    else:
        assert list(after) == list(dense.state_dict())


def test_slices_of_experts_are_told_where_kernels_multiply_by_them(monkeypatch):
    monkeypatch.setattr(decorated, "has_kernels", lambda device: True)
    monkeypatch.setattr(stack, "SLICE_BYTES", 5 * 2 * INNER * HIDDEN * 2)
    found = [
        lora_ext.explain(lora_ext.accelerate(two_mixtures(dtype=dtype)[0])) for dtype in (BF16, F32)
    ]
    for each, most, size in zip(found, ("up to 6", "one"), (3 * 2, 4), strict=True):
        assert f", nf4, {most} dequantised at a time" in str(each)
        assert each.workspace_bytes == 2 * INNER * HIDDEN * size


def whole(value):
    return value.dequantize() if hasattr(value, "qdata") else value


@pytest.mark.parametrize("form", forms("stand-in", "int8", "float8"))
def test_autocast_inference_mode_a_copy_and_samples_without_an_adapter(form):
    packed, dense = map(lora_ext.accelerate, two_mixtures(form=form))
    with torch.autocast("cpu", BF16):
        assert_same_bits(step(packed, routes(7)), step(dense, routes(7)))
    with torch.inference_mode():
        assert torch.equal(packed(*routes(7)), dense(*routes(7)))
    twin = copy.deepcopy(packed)
    assert_same_bits(step(twin, routes(7)), step(dense, routes(7)))
    for names in (["x", None], [None, None]):
        found = []
        for model in (packed, dense):
            with lora_ext.use_adapters(model, names):
                found.append(step(model, routes(6)))
                with model.disable_adapter():
                    found[-1]["base"] = model(*routes(6))
        assert_close(*found, 1e-5)
    assert_not_dequantised_whole(packed)
    assert_not_dequantised_whole(twin)
