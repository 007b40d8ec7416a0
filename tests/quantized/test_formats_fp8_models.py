"""A mixture in transformers' FP8 on a CPU, where its own forwards have no kernel: adapters on its
linear layers and experts, beside those of the dequantised model."""

import copy
import io

import peft
import pytest
import torch
from format_helpers import needs
from helpers import F32
from torch import nn

import lora_ext
from lora_ext.nn.frozen import frozen_decision

pytestmark = needs("transformers")
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def both_mixtures(expert_dtype):
    """(in FP8, dequantised)."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8.Fp8Dequantize, "_dequantize_one"):
        pytest.skip("this transformers has other FP8 layers")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3MoeConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "dtype": F32}
    config = Qwen3MoeConfig(vocab_size=32, num_hidden_layers=2, **sizes, **heads, **experts)
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config)
    how = FineGrainedFP8Config(weight_block_size=(32, 32))
    how.expert_dtype = expert_dtype
    packed = fp8.replace_with_fp8_linear(copy.deepcopy(dense), ["lm_head"], how)
    values_of = fp8.Fp8Dequantize(None)._dequantize_one
    for path, module in packed.named_modules():
        parameters = module._parameters
        for name, parameter in parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.rand(parameter.shape) * 0.01 + 0.01  # scales
                if not name.endswith("_scale_inv"):
                    values = torch.randn(parameter.shape) * 30
                    values = (
                        values.clamp(-128, 127) if parameter.dtype == torch.int8 else values / 9
                    )
                parameters[name] = nn.Parameter(values.to(parameter.dtype), requires_grad=False)
        for name in [name for name in parameters if f"{name}_scale_inv" in parameters]:
            codes, scale = parameters[name], parameters[f"{name}_scale_inv"]
            values = values_of(codes, scale, F32)
            dense.get_parameter(f"{path}.{name}").data = values
    return packed, dense


def gradients_of(model, ids):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(len(name) + parameter.numel())
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    logits = model(ids).logits
    logits.square().mean().backward()
    named = dict(model.named_parameters())
    return logits, {name: p.grad for name, p in named.items() if "lora_" in name}


def check(found, wanted, count=16):
    (logits, gradients), (dense_logits, dense_gradients) = found, wanted
    torch.testing.assert_close(logits, dense_logits)
    assert gradients.keys() == dense_gradients.keys() and len(gradients) >= count
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dense_gradients[name], msg=name)


IDS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("expert_dtype", ["fp8", "fp4"])
def test_layers_of_ours(expert_dtype):
    config = lora_ext.LoraConfig("all-linear", r=4, exclude_modules=["lm_head"])
    models = [lora_ext.apply_lora(model, config) for model in both_mixtures(expert_dtype)]
    assert {layer.path for layer in lora_ext.explain(models[0])} == {"fused"}
    check(*(gradients_of(model, IDS) for model in models))
    found = []
    for model in models:
        with lora_ext.disable_adapter(model), torch.no_grad():
            found.append(model(IDS).logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("expert_dtype", "parameters"), [("fp8", PARAMETERS), ("fp8", None), ("fp4", None)]
)
def test_layers_of_peft(expert_dtype, parameters):
    """k_proj and v_proj have no adapter, nor have all experts: computed here, too."""
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], target_parameters=parameters, r=4)
    packed, dense = (peft.get_peft_model(model, config) for model in both_mixtures(expert_dtype))
    keys = list(packed.state_dict())
    lora_ext.accelerate(packed)
    assert {layer.path for layer in lora_ext.explain(packed)} == {"fused"}
    check(*(gradients_of(model, IDS) for model in (packed, dense)), 16 if parameters else 8)
    with torch.no_grad():
        wanted = packed(IDS).logits
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        for other in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
            assert torch.equal(other(IDS).logits, wanted)
        with packed.disable_adapter(), dense.disable_adapter():
            torch.testing.assert_close(packed(IDS).logits, dense(IDS).logits)
    lora_ext.decelerate(packed)
    assert list(packed.state_dict()) == keys
    with pytest.raises(Exception, match=r"kernel|Triton|driver|CUDA"):
        packed(IDS)  # of which a CPU has none


def test_experts_on_a_gpu_without_adapters_are_the_librarys(monkeypatch):
    """It has kernels there, which quantise x, too."""
    model = lora_ext.apply_lora(both_mixtures("fp8")[0], lora_ext.LoraConfig(["q_proj"], r=4))
    monkeypatch.setattr("lora_ext.experts.decorated._DEVICES", ("cpu", "meta"))
    (experts, *_) = [m for path, m in model.named_modules() if path.endswith("mlp.experts")]
    assert frozen_decision(experts) is not None
    assert frozen_decision(experts.to("meta")) is None


def test_adapters_of_peft_that_have_the_sizes_of_bytes_are_named():
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=PARAMETERS, r=4)
    packed = peft.get_peft_model(both_mixtures("fp4")[0], config)
    with pytest.warns(UserWarning, match="PEFT sizes them by what is stored.*torch.int8"):
        lora_ext.accelerate(packed)
