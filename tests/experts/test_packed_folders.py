"""Models in MXFP4 and FP8 that stay so, beside transformers' dequantised ones of the folder."""

import importlib
import re
import shutil
import sys

import peft
import pytest
import torch
import transformers
from helpers import F32
from mixture_helpers import mixture, some_ids
from packed_folders import FOLDERS, make_folder, write_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_ext
from lora_ext.nn.experts import is_experts
from lora_ext.pretrained import packed_config
from lora_ext.quantized.stacks import stack_of, stacks_of
from lora_ext.versions import TOO_OLD


def cannot_import():
    """Why this transformers has no FP8 layers here, as `packed_config` says it."""
    try:
        importlib.import_module("transformers.integrations.finegrained_fp8")
    except ImportError as error:
        return str(error)
    return ""


needs_fp8 = pytest.mark.skipif(bool(cannot_import()), reason="its FP8 layers cannot be imported")
KINDS = [
    pytest.param(kind, marks=[needs_fp8] if method == "fp8" else [])
    for kind, (method, _) in FOLDERS.items()
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = make_folder(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


def packed(folder, dtype=F32):
    config = packed_config(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)


def dequantised(folder, dtype=F32):
    """By transformers, which on a CPU has no other way; older releases round to bfloat16."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(dtype)


def step(model, ids):
    """Logits, and the gradients of factors."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # their order is another one where parameters are parametrized
            generator = torch.Generator().manual_seed(len(name) + parameter.numel())
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    logits = model(ids).logits
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


def with_peft(model):
    """PEFT names wrappers of two parameters by their order, which in MXFP4 is the alphabet's, so
    that gpt-oss' adapters are of one parameter here."""
    found = {n: m for n, m in model.named_modules() if is_experts(m)}
    stacks = [f"{n}.down_proj" for n in found]
    stacks += [f"{n}.gate_up_proj" for n, m in found.items() if not m.is_transposed]
    words = {"target_parameters": stacks} if stacks else {}
    targets = ["o_proj"] if stacks else ["o_proj", "down_proj"]
    config = peft.LoraConfig(target_modules=targets, r=4, **words)
    return lora_ext.accelerate(peft.get_peft_model(model, config))


def with_ours(model):
    return lora_ext.apply_lora(model, lora_ext.LoraConfig("all-linear", r=4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapt", [with_peft, with_ours])
def test_a_step_is_that_of_the_dequantised_model(folder_of, kind, adapt, tmp_path):
    """Its adapters load there, too, and the other way round: their sizes are those of W."""
    models = [adapt(load(folder_of(kind))) for load in (packed, dequantised)]
    (found, gradients), (wanted, dense) = (step(model, some_ids()) for model in models)
    torch.testing.assert_close(found, wanted)
    assert gradients.keys() == dense.keys() and len(gradients) >= 8
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dense[name], msg=name)
    for first, load in zip(models, (dequantised, packed), strict=True):
        second = load(folder_of(kind))
        if adapt is with_ours:
            lora_ext.save_adapter(first, tmp_path)
            lora_ext.load_adapter(with_ours(second), tmp_path, "again")
            lora_ext.set_adapter(second, "again")
        else:
            first.save_pretrained(tmp_path)
            second = lora_ext.accelerate(peft.PeftModel.from_pretrained(second, tmp_path))
        torch.testing.assert_close(second(some_ids()).logits, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_as_loaded_it_stays_packed_and_is_saved_as_it_was(folder_of, kind, tmp_path):
    model, dense = packed(folder_of(kind)), dequantised(folder_of(kind))
    with torch.no_grad():
        torch.testing.assert_close(model(some_ids()).logits, dense(some_ids()).logits)
    ids = model.generate(some_ids(), max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, dense.generate(some_ids(), max_new_tokens=3, do_sample=False))
    for path, module in model.named_modules():
        for name in ("gate_up_proj", "down_proj"):
            if stacks_of(module):
                stack = stack_of(module, name)
                values = stack.codes.dequantize(F32)
                values = values.mT if stack.is_transposed else values
                assert torch.equal(values, dense.get_parameter(f"{path}.{name}"))
    model.save_pretrained(tmp_path)
    bits = [load_file(each / "model.safetensors") for each in (tmp_path, folder_of(kind))]
    assert bits[0].keys() == bits[1].keys()
    for name, tensor in bits[0].items():
        stored = bits[1][name].to(tensor.dtype)  # in the model's dtype, if it is no code
        assert torch.equal(tensor.view(torch.uint8), stored.view(torch.uint8)), name
    assert packed(tmp_path).config.quantization_config.quant_method.startswith("lora_ext")


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-100])


def rewrite(change):
    def fault(file):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return fault


def scales_of(tensors, layer="layers.1.", part="down_proj"):
    return next(n for n in tensors if layer in n and part in n and re.search(r"_scale", n))


def other_shape(tensors):
    name = scales_of(tensors)
    tensors[name] = tensors[name].repeat_interleave(2, -1)


def odd_depth(tensors):
    name = scales_of(tensors).replace("_scales", "_blocks").removesuffix("_scale_inv")
    tensors[name] = tensors[name][..., :-1].contiguous()


FAULTS = {
    "cut off": (cut_off, "expected whole tensors in '{file}'"),
    "no scale": (
        rewrite(lambda t: t.pop(scales_of(t))),
        r"expected the scales '{scale}' of .*{file}",
    ),
    "scales of another shape": (rewrite(other_shape), r"'{scale}' in '{file}' is of \["),
    "odd depth": (rewrite(odd_depth), r"in (')?{file}|expected scales of"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1]])
def test_a_fault_names_tensor_and_file(folder_of, kind, name, tmp_path):
    folder = shutil.copytree(folder_of(kind), tmp_path / "model")
    file = folder / "model.safetensors"
    scale = scales_of(load_file(file))
    fault, words = FAULTS[name]
    if name == "odd depth" and kind != "gpt_oss":
        pytest.skip("the last block of a row has fewer codes")
    fault(file)
    words = words.format(file=re.escape(str(file)), scale=re.escape(scale))
    with pytest.raises(ValueError, match=words):
        packed(folder)


def test_a_folder_of_another_format(tmp_path):
    mixture("llama").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"one of \['fp8', .*'mxfp4'\], but .* has 'none'; load it",
    ):
        packed_config(tmp_path)
    write_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="has 'gptq'"):
        packed_config(tmp_path)


def test_a_transformers_without_the_classes(folder_of, monkeypatch):
    folder = folder_of("gpt_oss")
    monkeypatch.setitem(sys.modules, "lora_ext.pretrained.mxfp4", None)
    words = f"but {re.escape(transformers.__version__)} cannot .*; pip install 'transformers>="
    with pytest.raises(ImportError, match=words):
        packed_config(folder)
    monkeypatch.setitem(TOO_OLD, "transformers", "expected transformers 5.0")
    with pytest.raises(ImportError, match=r"packed_config: expected transformers 5.0"):
        packed_config(folder)
