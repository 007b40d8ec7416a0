"""Experts in bitsandbytes' 4 bits, in PEFT's models: few tokens, and what PEFT computes.

`test_experts_quantised` has what torchao's tensors do, too.
"""

import copy
from unittest import mock

import pytest
import torch
from four_bit_experts import BLOCK, FORMS, dequantised, make_four_bits, parts_of, quantised
from helpers import BF16, F16, F32, F64, short
from peft_helpers import reasons
from quantised_experts import of_one_expert, poison_all_but, routes, two_experts, two_mixtures
from torch import nn

import lora_ext
from lora_ext.experts import Experts, few_rows, lora_experts
from lora_ext.experts.expert_groups import Rows
from lora_ext.experts.operands import Projection
from lora_ext.experts.routing import Routes
from lora_ext.quantized.of_bitsandbytes import four_bit_stack
from lora_ext.quantized.stack import QuantizedStack
from lora_ext.quantized.stacks import stack_of


def test_one_quantised_parameter_beside_a_dense_one():
    packed, dense = two_experts()
    nn.utils.parametrize.remove_parametrizations(packed, "down_proj", leave_parametrized=False)
    del packed._parameters["down_proj"]
    packed.down_proj = copy.deepcopy(dense.down_proj)
    found = [lora_experts(Experts.of(each), *routes(7)) for each in (packed, dense)]
    assert torch.equal(*found) and parts_of(packed)[0].calls == 0


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_table_that_a_default_dtype_rounded(kind):
    packed, state = quantised(torch.randn(3, 64, 64), kind, None)
    wanted, state.code = dequantised(packed, state), state.code.to(BF16)
    found = four_bit_stack(packed, state).stored(1).dequantize(F32)
    # The double's own tables are rounded.
    assert (found - wanted[1]).abs().max() < 0.04 * wanted.abs().max()


# ---- what is read ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=short)
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_take_the_bits_of_dense_experts(tokens, dtype, form, isa):
    """In the op for few rows, by strips: no expert is dequantised as a whole."""
    packed, dense = map(lora_ext.accelerate, two_mixtures("plain", form, dtype, adapter_dtype=F32))
    operands = of_one_expert(tokens, 3, dtype)
    poison_all_but(3, packed)
    wanted, stored = dense(*operands), QuantizedStack.stored
    with torch.no_grad(), mock.patch.object(QuantizedStack, "stored", autospec=True) as calls:
        calls.side_effect = stored
        assert torch.equal(packed(*operands), wanted)
    assert calls.called == (isa == "library")


@pytest.mark.parametrize("threads", ["one_thread", "two_threads"])
@pytest.mark.parametrize("nested", [None, 48])
def test_matrices_of_more_than_one_strip(nested, threads, request):
    """Of 128 rows, and of the rest."""
    request.getfixturevalue(threads)
    packed, state = quantised(torch.randn(3, 192, 128).to(BF16), "nf4", nested)
    x = torch.randn(1, 128).to(BF16)
    weights = four_bit_stack(packed, state), dequantised(packed, state)
    order, ends = torch.arange(1), [0, 1, 1]
    calls = [Projection(w, None, Routes(order, order, torch.tensor(ends))) for w in weights]
    (found, _), (wanted, _) = (few_rows.forward(x, Rows(call, None)) for call in calls)
    assert torch.equal(found, wanted)


CODES = torch.zeros(3, 4, BLOCK // 2, dtype=torch.uint8)
PARTS = {"scale": torch.ones(12), "table": torch.ones(16), "block": BLOCK}
NESTED = {"scale_table": torch.ones(256), "scale_scale": torch.ones(2), "scale_block": 8}
NESTED |= {"scale_offset": torch.ones(()), "scale": torch.ones(12, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": CODES[0]}, r"contiguous codes of shape \[experts, out_features, in_f.* of \[4"),
        ({"weight": CODES.int()}, "in uint8, but got Int"),
        ({"x": torch.ones(1, BLOCK)}, "x in bfloat16 or float16, but got Float"),
        ({"block": 24}, "even block that divides the 32 input features, but got 24"),
        ({"scale": torch.ones(11)}, "scale of 12 elements in Float"),
        ({"table": None}, "a table beside codes of 4 bits, but got none"),
        ({"table": torch.ones(15)}, "table of 16 elements"),
        (NESTED | {"scale": torch.ones(12)}, "scale of 12 elements in Byte"),
        (NESTED | {"scale_scale": torch.ones(3)}, "scale_scale of 2 elements"),
        (NESTED | {"scale_offset": None}, "a scale_offset beside codes"),
        (NESTED | {"scale_block": 0}, "positive scale_block, but got 0"),
    ],
)
def test_what_the_op_refuses(change, message):
    """The kernel would read beyond them."""
    words = {"x": torch.ones(1, BLOCK, dtype=BF16), "weight": CODES} | PARTS | change
    x, weight = words.pop("x"), words.pop("weight")
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        torch.ops.lora_ext.experts_few_rows(x, None, weight, None, [], [], [], [0], **words)


def test_the_op_without_input_features():
    """No strip of them is dequantised."""
    x, codes = torch.ones(1, 0, dtype=BF16), CODES[..., :0]
    parts = PARTS | {"scale": torch.ones(0)}
    y, _ = torch.ops.lora_ext.experts_few_rows(x, None, codes, None, [], [], [], [0], **parts)
    assert torch.equal(y, torch.zeros(1, 4, dtype=BF16))


def test_adapters_that_are_off():
    """The base, too, is computed without dequantising all experts."""
    packed, dense = map(lora_ext.accelerate, two_mixtures())
    with packed.disable_adapter(), dense.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(packed(*routes(7)), dense(*routes(7)))
        ((path, reason),) = reasons(packed)
    assert path == "base"
    assert reason.startswith("adapters are disabled: ")
    assert reason.endswith(", nf4, one dequantised at a time")
    assert all(part.calls == 0 for part in parts_of(packed))


# ---- what PEFT computes ----


def explained(change, **words):
    packed = two_mixtures(**words)[0]
    model = lora_ext.accelerate(packed)
    wrapper = next(m for m in model.modules() if hasattr(m, "get_base_layer"))
    change(wrapper.get_base_layer())
    ((path, reason),) = reasons(model)
    assert path == "peft"
    return reason


def set_state(**values):
    def change(experts):
        vars(experts.parametrizations["down_proj"][0].quant_state).update(values)

    return change


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def register_doubled(experts):
    nn.utils.parametrize.register_parametrization(experts, "down_proj", Doubled(), unsafe=True)


REASONS = {
    "experts of 64 x 96 do not begin with a block of 4096 codes each": set_state(blocksize=4096),
    "a block of 4-bit codes spans two rows, which bitsandbytes on CPUs reads otherwise": set_state(
        blocksize=64
    ),
    "a quantised parameter has a form that lora_ext does not know": set_state(quant_type="int3"),
    "a quantised parameter is not a stack of matrices": set_state(shape=(6 * 64, 96)),
    "the codes of a quantised parameter are sharded": set_state(shape=(12, 64, 96)),
    "the scales of a quantised parameter are not in float32": set_state(
        absmax=torch.ones(6 * 64 * 96 // BLOCK, dtype=F64)
    ),
    "the codes of a quantised parameter are on another device than their scales": set_state(
        absmax=torch.ones(6 * 64 * 96 // BLOCK, device="meta")
    ),
    "the experts' weights differ in dtype or device": set_state(dtype=BF16),
    "the experts have hooks": lambda experts: experts.register_forward_hook(lambda _, __, y: y),
    "the module has parametrizations": register_doubled,
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_for_pefts_forward(reason):
    assert explained(REASONS[reason]).startswith(reason)


def test_pefts_leftovers_are_not_added_to():
    """A forward of PEFT 0.21's before `accelerate` leaves its update in the parameter."""
    packed = two_mixtures()[0]
    with torch.no_grad():
        packed(*routes(3))
    left = [
        len(each)
        for each in packed.base_model.model.experts.get_base_layer().parametrizations.values()
    ]
    ((path, reason),) = reasons(lora_ext.accelerate(packed))
    if left == [1, 1]:
        assert path == "fused"
    else:
        assert path == "peft" and "accelerate it before its first forward" in reason


def test_a_router_in_4_bits_is_pefts():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, BLOCK))

        def forward(self, x):
            return x @ self.weight.t()

    model = nn.ModuleDict({"gate": Router()})
    make_four_bits(model["gate"], "weight")
    assert stack_of(model["gate"], "weight") == "a quantised parameter is not a stack of matrices"
