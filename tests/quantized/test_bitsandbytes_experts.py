"""bitsandbytes' parametrization of experts: its bits one expert at a time, and a model of PEFT."""

import copy

import pytest
import torch
from expert_helpers import assert_close, both, make_experts, make_routes, mixture
from four_bit_experts import factors, step
from helpers import BF16, F16, F32, short
from peft_helpers import reasons

import lora_ext
from lora_ext.quantized.stack import QuantizedStack
from lora_ext.quantized.stacks import stack_of

bnb = pytest.importorskip("bitsandbytes")
parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")

HIDDEN, INNER = 64, 128


def quantised(experts, nested, kind="nf4", block=64):
    for name in both(experts):
        parametrize.replace_parameter_4bit(experts, name, nested, kind, block)
    return experts


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((3, 128, 128), 64), ((5, 96, 64), 32), ((2, 10, 256), 256), ((3, 1, 4096), 4096)],
    ids=str,
)
def test_one_expert_at_a_time(shape, block, kind, nested, dtype, isa):
    """Of the second scales' blocks of 256 some begin with an expert, and some do not."""
    module = torch.nn.Module()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    module.stack = torch.nn.Parameter(weight, requires_grad=False)
    parametrize.replace_parameter_4bit(module, "stack", nested, kind, block)
    stack = stack_of(module, "stack")
    assert isinstance(stack, QuantizedStack) and stack.shape == shape and stack.dtype == dtype
    whole = module.stack
    for number, wanted in enumerate(whole):
        assert torch.equal(stack.stored(number).dequantize(dtype), wanted)


def two_mixtures(dtype, nested):
    base = make_experts("plain", sizes=(HIDDEN, INNER)).to(dtype)
    dense = copy.deepcopy(base)
    packed = quantised(base, nested)
    for name in both(dense):
        dense.get_parameter(name).data = getattr(packed, name).clone()
    models = [mixture(base=each, dtype=dtype, adapter_dtype=F32) for each in (packed, dense)]
    with torch.no_grad():
        for name, factor in factors(models[1]).items():
            factor.copy_(factors(models[0])[name])
    return models


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
def test_pefts_model_on_its_experts(dtype, nested, tokens, monkeypatch):
    packed, dense = two_mixtures(dtype, nested)
    x, index, weights = make_routes(tokens, dtype=dtype, hidden=HIDDEN)
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    lora_ext.accelerate(packed)
    ((path, reason),) = reasons(packed)
    assert path == "fused" and reason.endswith("nf4, one dequantised at a time")
    with monkeypatch.context() as patch:
        patch.setattr(bnb.functional, "dequantize_4bit", None)  # whole stacks
        found = step(packed, (x, index, weights))
    exact = step(dense.double(), (x.double(), index, weights.double()))
    assert_close(found, exact, 1e-5 if dtype == F32 else 3e-2)
    after = packed.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_blocks_across_rows_are_pefts():
    module = quantised(make_experts("plain", sizes=(HIDDEN, 96)).float(), False)
    model = lora_ext.accelerate(mixture(base=module, dtype=F32))
    ((path, reason),) = reasons(model)
    assert path == "peft" and reason.startswith("bitsandbytes' kernels on the CPU read blocks")
