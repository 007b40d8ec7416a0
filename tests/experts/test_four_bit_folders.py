"""Models that become bitsandbytes' 4 bits while their folder is read, experts included."""

import sys
import warnings

import peft
import pytest
import torch
from helpers import BF16, F16, F32, short
from mixture_helpers import mixture, some_ids
from packed_folders import WIDTHS
from safetensors.torch import load_file
from test_packed_folders import FAULTS, cut_off, rewrite, step, with_ours, with_peft
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_ext
from lora_ext.experts.decorated import up_name
from lora_ext.nn.experts import is_experts
from lora_ext.pretrained import four_bit_config, packed_config
from lora_ext.quantized.stacks import parametrized

bnb = pytest.importorskip("bitsandbytes")
four_bits = pytest.importorskip("lora_ext.pretrained.four_bits")
quantise = pytest.importorskip("lora_ext.pretrained.quantise")

KINDS = {
    "qwen3_moe": {"moe_intermediate_size": 64},
    "gpt_oss": {"intermediate_size": 64},
    "mixtral": {"intermediate_size": 128},
    "llama": {"intermediate_size": 128},
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            mixture(kind, dtype=BF16, **{**WIDTHS, **KINDS[kind]}).save_pretrained(made[kind])
        return made[kind]

    return of


def quantised(folder, dtype=BF16, **words):
    words = {"bnb_4bit_compute_dtype": dtype, **words}
    config = four_bit_config(**words)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def by_hand(folder, dtype, nested=True, kind="nf4"):
    """By bitsandbytes, from the whole model."""
    words = {"bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_type": kind}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **words)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    for module in list(filter(is_experts, model.modules())):
        for name in (up_name(module), "down_proj"):
            bnb.nn.parametrize.replace_parameter_4bit(module, name, nested, kind)
    return model


def assert_same_entries(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        if "bitsandbytes__" not in name:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "nested", "form"),
    [(BF16, True, "nf4"), (F32, False, "nf4"), (F16, True, "fp4")],
    ids=lambda value: short(value) if isinstance(value, torch.dtype) else str(value),
)
def test_the_entries_are_those_of_bitsandbytes(
    folder_of, kind, dtype, nested, form, tmp_path, monkeypatch
):
    """Quantised in parts, saved, and loaded again."""
    monkeypatch.setattr(quantise, "_AT_A_TIME", 4096)
    words = {"bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_type": form}
    model = quantised(folder_of(kind), dtype, **words)
    wanted = by_hand(folder_of(kind), dtype, nested, form).state_dict()
    assert len([n for n in wanted if "bitsandbytes__" in n]) >= 12
    assert_same_entries(model.state_dict(), wanted)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")  # Mixtral's under its folders' names
    stored = {name.replace("block_sparse_moe", "mlp"): t for name, t in stored.items()}
    assert_same_entries(stored, wanted)
    config = packed_config(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype=dtype)
    assert_same_entries(again.state_dict(), wanted)
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
@pytest.mark.parametrize("is_as_here", [True, False])
def test_values_of_all_kinds_have_the_codes_of_bitsandbytes(dtype, is_as_here, monkeypatch):
    """At the bounds between codes and beside them, zeros, infinities, NaN, denormal scales; and
    where another bitsandbytes computes otherwise."""
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    bounds = ((table[1:] + table[:-1]) / 2).repeat(4).view(4, -1)
    bounds[1] = torch.nextafter(bounds[1], torch.tensor(9.0))
    bounds[2] = torch.nextafter(bounds[2], torch.tensor(-9.0))
    exact = torch.cat([bounds.flatten(), torch.tensor([1.0, -1.0, 0.0, -0.0])])
    special = torch.randn(4, 64)
    special[0], special[1, 5], special[2, 7], special[3] = 0, torch.inf, torch.nan, 1e-39
    values = torch.cat([exact[None], exact[None] * 3, special, torch.randn(3000, 64)]).to(dtype)
    assert quantise._is_as_here()
    monkeypatch.setattr(quantise, "_is_as_here", lambda: is_as_here)
    for nested in (False, True):
        words = {"quant_type": "nf4", "compress_statistics": nested}
        codes, state = bnb.functional.quantize_4bit(values, **words)
        config = four_bit_config(bnb_4bit_use_double_quant=nested)
        found = quantise.quantised(values, config, torch.uint8)
        assert torch.equal(found[0], codes)
        entries = [each.as_dict(packed=True) for each in (found[1], state)]
        for name, wanted in entries[1].items():
            torch.testing.assert_close(entries[0][name], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapt", [with_peft, with_ours])
def test_a_step_is_that_of_the_model_made_by_hand(folder_of, kind, adapt):
    models = (quantised(folder_of(kind), F32), by_hand(folder_of(kind), F32))
    found, wanted = (step(adapt(model).train(), some_ids()) for model in models)
    assert torch.equal(found[0], wanted[0]) and found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert torch.equal(found[1][name], gradient), name


def test_peft_trains_and_saves_it(folder_of, tmp_path):
    model = quantised(folder_of("qwen3_moe"))
    assert model.is_loaded_in_4bit and model.hf_quantizer.is_trainable
    assert model.get_memory_footprint() < 0.6 * mixture_bytes(folder_of("qwen3_moe"))
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_ext.accelerate(model)
    model(some_ids()).logits.square().mean().backward()
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4


def mixture_bytes(folder):
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def test_what_is_not_quantised(folder_of, tmp_path, monkeypatch):
    """Modules that are named, and stacks whose rows are no whole blocks."""
    skipped = ["model.layers.0.mlp", "q_proj"]
    model = quantised(folder_of("qwen3_moe"), llm_int8_skip_modules=skipped)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert not parametrized(first) and len(parametrized(second)) == 2
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    mixture("qwen3_moe", **{**WIDTHS, "moe_intermediate_size": 96}).save_pretrained(tmp_path)
    words = []
    monkeypatch.setattr(four_bits.logger, "warning", words.append)
    model = quantised(tmp_path)
    assert len(words) == 2 and "layers.0.mlp.experts.down_proj is not quantised" in words[0]
    assert {*parametrized(model.model.layers[0].mlp.experts)} == {"gate_up_proj"}
    model.save_pretrained(tmp_path / "again")
    config = packed_config(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", config=config, dtype=BF16)
    assert_same_entries(again.state_dict(), model.state_dict())


def test_bitsandbytes_own_config_leaves_experts_dense(folder_of):
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder_of("qwen3_moe"), quantization_config=config, dtype=F32
    )
    with pytest.warns(UserWarning, match=r"but for its experts, .* GiB: .*four_bit_config\(\)"):
        with_ours(model)


SAVED = {
    "cut off": (cut_off, FAULTS["cut off"][1]),
    "no scale": (
        rewrite(lambda t: t.pop("model.layers.1.mlp.experts.down_proj.absmax")),
        "expected the scales 'model.layers.1.mlp.experts.down_proj.absmax' of .*{file}",
    ),
    "odd depth": (
        rewrite(
            lambda t: t.update(
                {n: t[n][:-32].clone() for n in t if n.endswith("1.mlp.experts.down_proj")}
            )
        ),
        "expected scales of .* for .model.layers...mlp.experts.down_proj. .*'{file}'",
    ),
}


@pytest.mark.parametrize("fault", SAVED)
def test_a_fault_names_tensor_and_file(folder_of, fault, tmp_path):
    quantised(folder_of("qwen3_moe")).save_pretrained(tmp_path)
    change, words = SAVED[fault]
    change(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words.format(file=tmp_path / "model.safetensors")):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=packed_config(tmp_path), dtype=BF16)


@pytest.mark.parametrize(
    ("more", "nested", "cure"),
    [
        (0, True, ""),
        (-1, True, "a model of 100% of its size would fit"),
        (0, False, "with bnb_4bit_use_double_quant=True it fits"),
        (-1, False, r"a model of \d+% of its size would fit"),
    ],
)
def test_a_model_that_does_not_fit_is_not_read(folder_of, more, nested, cure, monkeypatch):
    """What is free beside what it takes with scales quantised again."""
    free = needed_of(folder_of("qwen3_moe")) + more
    monkeypatch.setattr(four_bits, "free_memory", lambda: free)
    if not cure:
        quantised(folder_of("qwen3_moe"))
        return
    monkeypatch.setattr(four_bits, "quantised", None)
    with pytest.raises(ValueError, match=f"GiB of free memory .* GiB are free: {cure}"):
        quantised(folder_of("qwen3_moe"), bnb_4bit_use_double_quant=nested)


def needed_of(folder):
    """Bytes of a mixture's weights in 4 bits, of the others, and of a stack's twice."""
    numbers, kept, stacks = 0, 0, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() < 2 or any(each in name for each in ("embed", "lm_head", "gate.weight")):
            kept += tensor.nbytes
            continue
        numbers += tensor.numel()
        if "layers.1.mlp.experts" in name:
            stacks[name.split(".")[-2]] += tensor.nbytes
    return int(numbers * (0.5 + (1 + 4 / 256) / 64)) + kept + 4 * stacks["up_proj"]


def test_words_and_versions(monkeypatch):
    with pytest.raises(TypeError, match=r"words of \['bnb_4bit_compute_dtype'.*\['block'\]"):
        four_bit_config(block=32)
    with pytest.raises(TypeError, match="load_in_8bit"):
        four_bit_config(load_in_8bit=True)
    monkeypatch.setitem(sys.modules, "lora_ext.pretrained.four_bits", None)
    with pytest.raises(ImportError, match=r"four_bit_config: .*; pip install 'transformers>=5.4'"):
        four_bit_config()


def test_transformers_dequantises_no_experts(folder_of):
    model = quantised(folder_of("qwen3_moe"))
    with pytest.raises(NotImplementedError, match="load its folder without quantization_config"):
        model.dequantize()
