"""bitsandbytes' parametrization of experts: its bits one expert at a time, and a model of PEFT."""

import pytest
import torch
from expert_helpers import assert_close, both, make_experts, mixture
from helpers import BF16, F16, F32, short
from peft_helpers import reasons
from quantised_experts import HIDDEN, routes, step, two_mixtures

import lora_ext
from lora_ext.quantized.stack import QuantizedStack
from lora_ext.quantized.stacks import stack_of

bnb = pytest.importorskip("bitsandbytes")
parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")


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


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
def test_pefts_model_on_its_experts(dtype, nested, tokens, monkeypatch):
    form = "bitsandbytes nested" if nested else "bitsandbytes"
    packed, dense = two_mixtures("plain", form, dtype, adapter_dtype=F32)
    x, index, weights = routes(tokens, dtype)
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
    module = make_experts("plain", sizes=(HIDDEN, 96)).float()
    for name in both(module):
        parametrize.replace_parameter_4bit(module, name, False, "nf4", 64)
    model = lora_ext.accelerate(mixture(base=module, dtype=F32))
    ((path, reason),) = reasons(model)
    assert path == "peft" and reason.startswith("a block of 4-bit codes spans two rows")
