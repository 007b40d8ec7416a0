"""Experts in torchao's tensors, in PEFT's models and in ours: the numbers of the same experts
dense, and only those that have rows are dequantised, one at a time."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from expert_helpers import assert_close, both, make_routes
from format_helpers import needs
from four_bit_experts import HIDDEN, INNER, step
from helpers import BF16, F16, F32, short
from mixture_helpers import loaded_by_peft, logits, randomized
from mixture_helpers import mixture as language_model
from peft_helpers import reasons
from torch import nn
from torchao_experts import forms, quantise, stand_in, two_experts, two_mixtures

import lora_ext
from lora_ext import LoraConfig, apply_lora
from lora_ext.quantized import of_torchao, workspace
from lora_ext.quantized.stack import QuantizedStack
from lora_ext.quantized.stacks import flat_weight, stack_of, weight_from_flat

KINDS = ["plain", "transposed, biases, interleaved", "no gate", "norm"]


def routes(tokens, dtype=F32, **words):
    return make_routes(tokens, dtype=dtype, hidden=HIDDEN, **words)


def of_one_expert(tokens, expert):
    x, index, weights = routes(tokens)
    return x, torch.full_like(index[:, :1], expert), weights[:, :1]


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def dequantised(monkeypatch):
    """The numbers of the experts that are dequantised, in their order."""
    numbers, stored = [], QuantizedStack.stored
    monkeypatch.setattr(
        QuantizedStack,
        "stored",
        lambda self, number: numbers.append(number) or stored(self, number),
    )
    return numbers


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


@pytest.mark.parametrize("tokens", [0, 7, 64])
@pytest.mark.parametrize("form", forms("stand-in", "stand-in points", "int8 groups", "float8"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_dense_experts(kind, form, tokens):
    packed, dense = map(lora_ext.accelerate, two_mixtures(kind, form))
    assert_same_bits(step(packed, routes(tokens)), step(dense, routes(tokens)))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("form", forms("stand-in", "int8", "float8"))
@pytest.mark.parametrize("dtype", [BF16, F16], ids=short)
def test_the_numbers_of_peft_on_dense_experts(dtype, form, tokens):
    packed, dense = two_mixtures(form=form, dtype=dtype, adapter_dtype=F32)
    x, index, weights = routes(tokens, dtype)
    exact = step(dense.double(), (x.double(), index, weights.double()))
    found = step(lora_ext.accelerate(packed), (x, index, weights))
    assert_close(found, exact, {BF16: 3e-2, F16: 4e-3}[dtype])


@needs("torchao")
@pytest.mark.parametrize("form", ["int8", "int8 groups", "float8", "float8 groups"])
def test_the_base_alone_has_the_numbers_of_torchaos_own_forward(form):
    packed, _ = two_mixtures(form=form)
    wanted = packed.base_model.model.experts.get_base_layer()(*routes(7))
    with lora_ext.accelerate(packed).disable_adapter():
        torch.testing.assert_close(packed(*routes(7)), wanted)
        ((path, reason),) = reasons(packed)
    assert path == "base" and reason.endswith(", one dequantised at a time")


# ---- what is read ----


@pytest.mark.parametrize("form", forms("stand-in", "stand-in points", "int8", "float8 groups"))
@pytest.mark.parametrize("tokens", [1, 64])
def test_experts_without_rows_are_not_read(form, tokens, dequantised):
    """One expert is dequantised, once in each direction for each projection."""
    packed, dense = map(lora_ext.accelerate, two_mixtures(form=form))
    wanted = step(dense, of_one_expert(tokens, 3))
    base = packed.base_model.model.experts.get_base_layer()
    with torch.no_grad():
        for name in both(base):
            base.get_parameter(name).scale[:3] = float("nan")
            base.get_parameter(name).scale[4:] = float("nan")
    assert_same_bits(step(packed, of_one_expert(tokens, 3)), wanted)
    assert dequantised == [3, 3, 3, 3]


@pytest.mark.parametrize("form", forms("stand-in", "int8", "float8"))
def test_the_workspace_is_one_expert_and_nothing_is_written_to(form):
    packed, dense = two_mixtures(form=form)
    model = lora_ext.accelerate(packed)
    ((path, reason),) = reasons(model)
    kind = "float8_e4m3fn" if form == "float8" else "int8"
    assert path == "fused" and reason.endswith(f", {kind}, one dequantised at a time")
    before = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
    workspace.release()
    try:
        step(model, routes(64))
        assert workspace.nbytes() == 2 * INNER * HIDDEN * 4
        assert lora_ext.explain(model).workspace_bytes == 2 * INNER * HIDDEN * 4
    finally:
        workspace.release()
    after = model.state_dict()
    assert list(after) == list(before) == list(dense.state_dict())
    for name, value in before.items():
        assert torch.equal(whole(after[name]), whole(value))


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
    with lora_ext.use_adapters(packed, ["x", None]), lora_ext.use_adapters(dense, ["x", None]):
        assert_close(step(packed, routes(6)), step(dense, routes(6)), 1e-5)


# ---- models of ours ----


def two_models(form):
    """(a model with quantised experts, the same model dense)."""
    packed = language_model("qwen3_moe", F32, hidden_size=64, moe_intermediate_size=96)
    dense = copy.deepcopy(packed)
    for path, module in packed.named_modules():
        if path.endswith("mlp.experts"):
            for name in both(module):
                quantise(module, name, form)
                value = module.get_parameter(name).dequantize()
                dense.get_submodule(path).get_parameter(name).data = value
    return packed, dense


@pytest.mark.parametrize("form", forms("stand-in", "int8", "float8 groups"))
def test_apply_lora(form, tmp_path):
    packed, dense = two_models(form)
    plain, keys, kinds = logits(packed), list(packed.state_dict()), [*map(type, packed.modules())]
    config = LoraConfig("all-linear", r=3, lora_alpha=6, lora_dropout=0.2)
    found = []
    for model in (packed, dense):
        randomized(apply_lora(model, config)).train()
        torch.manual_seed(2)
        y = logits(model)
        y.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n} | {"y": y})
    assert_same_bits(*found)
    assert ", one dequantised at a time" in str(lora_ext.explain(packed))
    assert all("lora_" in name for name, p in packed.named_parameters() if p.requires_grad)
    numbers = [lora_ext.models.trainable_parameters(model) for model in (packed, dense)]
    assert dataclasses.astuple(numbers[0]) == dataclasses.astuple(numbers[1])

    packed.eval(), dense.eval()
    with pytest.raises(RuntimeError, match="expected a dense 'gate_up_proj' to merge into"):
        lora_ext.merge_adapter(packed)
    lora_ext.save_adapter(packed, tmp_path)
    base_packed, base_dense = two_models(form)
    assert torch.equal(logits(lora_ext.load_adapter(base_dense, tmp_path)), logits(dense))
    theirs = lora_ext.accelerate(loaded_by_peft(base_packed, tmp_path))
    torch.testing.assert_close(logits(theirs), logits(packed))
    lora_ext.unload(packed)
    assert list(packed.state_dict()) == keys and [*map(type, packed.modules())] == kinds
    assert torch.equal(logits(packed), plain)


def test_another_forward_dequantises_all():
    """Where the experts cannot be computed here, W + B A has the whole stack."""
    packed, dense = two_models("stand-in")
    config = LoraConfig("experts", r=3)
    for model in (packed, dense):
        for module in randomized(apply_lora(model, config)).modules():
            if isinstance(module, lora_ext.nn.LoRAExperts):
                module._is_expert_parallel = True
    torch.testing.assert_close(logits(packed), logits(dense))


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
    packed, _ = two_mixtures()
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
