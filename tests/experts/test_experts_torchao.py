"""Experts in torchao's tensors: one expert of a stack, forms that are known and not.

`test_experts_quantised` and `test_experts_quantised_apply` have what those in 4 bits do, too.
"""

from types import SimpleNamespace

import pytest
import torch
from expert_helpers import both
from format_helpers import needs
from helpers import BF16, F16, F32, short
from peft_helpers import reasons
from quantised_experts import HIDDEN, INNER, routes, two_experts, two_mixtures
from torch import nn
from torchao_experts import forms, stand_in

import lora_ext
from lora_ext import LoraConfig, apply_lora
from lora_ext.quantized import codes, of_torchao
from lora_ext.quantized.stacks import flat_weight, stack_of, weight_from_flat

# ---- numbers ----


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
@pytest.mark.parametrize("form", forms())
def test_one_expert_has_the_bits_of_torchaos_dequantize(form, dtype, isa):
    packed, _ = two_experts(form=form, dtype=dtype)
    for name in both(packed):
        tensor, stack = packed.get_parameter(name), stack_of(packed, name)
        assert stack.shape == tuple(tensor.shape) and stack.dtype == dtype
        for number, wanted in enumerate(tensor.dequantize()):
            out = torch.full_like(wanted, float("nan"))
            assert torch.equal(stack.stored(number).dequantize(dtype, out), wanted)
            assert torch.equal(stack.stored(number).dequantize(dtype), wanted)


@needs("torchao")
@pytest.mark.parametrize("form", ["int8", "int8 groups", "float8", "float8 groups"])
def test_one_expert_has_the_bits_of_torchaos_slice(form):
    packed, _ = two_experts(form=form, dtype=BF16)
    tensor, stack = packed.gate_up_proj, stack_of(packed, "gate_up_proj")
    for number in range(len(stack)):
        assert torch.equal(stack.stored(number).dequantize(BF16), tensor[number].dequantize())


@needs("torchao")
@pytest.mark.parametrize("form", ["int8", "int8 groups", "float8", "float8 groups"])
def test_the_base_alone_has_the_numbers_of_torchaos_own_forward(form):
    packed, _ = two_mixtures(form=form)
    wanted = packed.base_model.model.experts.get_base_layer()(*routes(7))
    with lora_ext.accelerate(packed).disable_adapter():
        torch.testing.assert_close(packed(*routes(7)), wanted, rtol=1e-5, atol=1e-5)
        ((path, reason),) = reasons(packed)
    assert path == "base" and reason.endswith(", one dequantised at a time")


# ---- what is refused ----


def changed(**values):
    def change(experts):
        vars(experts.down_proj).update(values)

    return change


def of_another_type(experts):
    kind = type("IntxUnpackedToInt8Tensor", (type(experts.down_proj),), {})
    kind.__module__ = "torchao.quantization"
    vars(experts)["_parameters"]["down_proj"].__class__ = kind


def of_rows_with_points(experts):
    weight = torch.randn(experts.down_proj.shape)
    experts.down_proj = stand_in(weight, weight.shape[2], 7)


UNKNOWN = "a quantised parameter has a form that lora_ext does not know"
REASONS = {
    of_torchao.QUANTISES_X: changed(act_quant_kwargs=SimpleNamespace()),
    of_torchao.SCALES_X: changed(act_pre_scale=torch.ones(INNER)),
    of_torchao.ZERO_POINTS: of_rows_with_points,
    of_torchao.TRAINED: lambda experts: experts.down_proj.requires_grad_(),
    "torchao's IntxUnpackedToInt8Tensor is not known": of_another_type,
}
FORMS = {
    "scales": {"scale": torch.ones(6, HIDDEN)},
    "experts": {"scale": torch.ones(2, HIDDEN, 1)},
    "blocks": {"scale": torch.ones(6, 5, 1)},
    "points": {"zero_point": torch.ones(6, HIDDEN, 3), "block_size": [1, 1, INNER // 3]},
    "device": {"scale": torch.ones(6, HIDDEN, 1, device="meta")},
    "codes": {"qdata": torch.ones(6, HIDDEN, INNER, dtype=torch.int16)},
}
CASES = [*REASONS.items(), *((UNKNOWN, changed(**values)) for values in FORMS.values())]


@pytest.mark.parametrize(("reason", "change"), CASES, ids=[*REASONS, *FORMS])
def test_reasons(reason, change):
    packed, _ = two_mixtures(form="stand-in")
    experts = packed.base_model.model.experts.get_base_layer()
    change(experts)
    assert reasons(lora_ext.accelerate(packed)) == {("peft", reason)}
    with pytest.raises(ValueError, match=f"of 'down_proj': {reason}; exclude_modules"):
        apply_lora(nn.ModuleDict({"experts": experts}), LoraConfig("experts"))


@needs("torchao")
@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (lambda ao: ao.IntxWeightOnlyConfig(torch.int4), ValueError, "2-d and 4-d Tensors"),
        (lambda ao: ao.Int4WeightOnlyConfig(group_size=32), ImportError, "mslk"),
    ],
)
def test_types_that_torchao_refuses_on_a_cpu(words, error, message):
    """If one of them can be a stack some day, it can be taken here, too."""
    from torchao import quantization as ao

    module = two_experts()[1]
    with pytest.raises(error, match=message):
        ao.quantize_(module, ao.FqnToConfig({"down_proj": words(ao)}), filter_fn=None)


@needs("torchao")
def test_a_stack_that_quantises_x():
    from torchao import quantization as ao

    module = two_experts()[1]
    words = ao.Int8DynamicActivationInt8WeightConfig()
    ao.quantize_(module, ao.FqnToConfig({"down_proj": words}), filter_fn=None)
    assert stack_of(module, "down_proj") == of_torchao.QUANTISES_X


@pytest.mark.parametrize("form", ["stand-in", "stand-in points"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_stack_as_arguments_of_an_op(is_transposed, form):
    stack = stack_of(two_experts(form=form)[0], "down_proj")
    stack = stack.transpose(1, 2) if is_transposed else stack
    again = weight_from_flat(*flat_weight(stack))
    assert (again.shape, again.dtype, again.format) == (stack.shape, F32, stack.format)
    x = torch.ones(1)
    with stack.matrix(2, x) as wanted, again.matrix(2, x) as found:
        assert found.shape == stack.shape[1:] and torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("scales", "known"),
    [
        ((3, 4, 1), [torch.int8, torch.float8_e4m3fn]),
        ((1, 4, 2), [torch.int8, torch.float8_e4m3fn]),
        ((3, 1, 1), [torch.int8, torch.float8_e4m3fn]),
        ((3, 2, 1), [torch.float8_e4m3fn]),
    ],
)
def test_which_stacks_a_gpu_dequantises_by_one_launch(scales, known, monkeypatch):
    """A single matrix is written by torch's operations there."""
    monkeypatch.setattr(codes, "has_kernels", lambda device: True)
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        for zero in (None, torch.ones(scales)):
            numbers = torch.ones(3, 4, 8).to(dtype)
            made = codes.ScaledCodes(numbers, torch.ones(scales), zero, BF16)
            made.device, made.by_kernel = torch.device("cuda"), False
            assert made.is_by_kernel() == (dtype in known and zero is None)
            assert not made.part(0).is_by_kernel()


def test_what_is_kept_of_a_stack():
    """Nothing is read anew in a forward, and nothing old after a change."""
    module = two_experts(form="stand-in points")[0]
    first = stack_of(module, "down_proj")
    assert stack_of(module, "down_proj") is first
    with torch.no_grad():
        module.down_proj.zero_point.zero_()
    second = stack_of(module, "down_proj")
    assert second is not first and second.codes.zero is None
    assert torch.equal(second.stored(1).dequantize(F32), module.down_proj.dequantize()[1])
    module.down_proj.qdata = module.down_proj.qdata.clone()
    assert stack_of(module, "down_proj").codes.codes is module.down_proj.qdata
