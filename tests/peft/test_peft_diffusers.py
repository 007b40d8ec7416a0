"""diffusers' models accelerated: its own verbs, guidance, offload, casting and GGUF, beside plain
copies; and the page for its users."""

import re
from pathlib import Path

import pytest
import torch
from diffusion_helpers import MODELS, adapted, both, inputs, output, twice
from format_helpers import needs
from helpers import BF16
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layers
from peft_helpers import FAST, paths, randomize, reasons
from torch import nn

import lora_ext

pytestmark = [pytest.mark.nightly, needs("diffusers")]

PAGE = Path(__file__).parents[2] / "docs" / "diffusion.md"


def close(found, wanted, tolerance=1e-4):
    scale = wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


def linear_paths(model):
    """What `explain` says of linear layers; PEFT computes convolutions."""
    lora = {name for name, m in model.named_modules() if isinstance(m, peft_layers.Conv2d)}
    return {path for name, path in paths(model).items() if name not in lora}


@pytest.fixture
def pefts_calls(monkeypatch):
    """How often PEFT's own forward of a linear layer ran."""
    calls, real = [], peft_layers.Linear.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(peft_layers.Linear, "forward", counted)
    return calls


# ---- diffusers' verbs ----


def hotswap(model, folder):
    file = "pytorch_lora_weights.safetensors"
    words = {"prefix": None, "weight_name": file, "adapter_name": "b"}
    model.load_lora_adapter(folder, hotswap=True, **words)


VERBS = {
    "one": (lambda m, _: m.set_adapters("a"), FAST),
    "weighted": (lambda m, _: m.set_adapters(["a", "b"], [0.7, -0.4]), FAST),
    "disabled": (lambda m, _: m.disable_lora(), {"base"}),
    "fused": (lambda m, _: m.fuse_lora(adapter_names=["a"]), {"base"}),
    "fused, both, scaled": (
        lambda m, _: (m.set_adapters(["a", "b"]), m.fuse_lora(0.5, True, ["a", "b"])),
        {"base"},
    ),
    "unfused": (lambda m, _: (m.fuse_lora(adapter_names=["a", "b"]), m.unfuse_lora()), FAST),
    "deleted": (lambda m, _: (m.delete_adapters("b"), m.set_adapters("a")), FAST),
    "hot-swapped": (hotswap, FAST),
    "unloaded": (lambda m, _: m.unload_lora(), set()),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", MODELS)
def test_verbs(name, verb, tmp_path):
    model, fast = both(name)
    given, (do, expected) = inputs(name), VERBS[verb]
    before = output(model, given)
    adapted(name, seed=9).save_lora_adapter(tmp_path, "b")
    for one in (model, fast):
        do(one, tmp_path)
    wanted = output(model, given)
    assert (wanted - before).abs().max() > 0.01 * before.abs().max() or verb == "unfused"
    close(output(fast, given), wanted)
    assert linear_paths(fast) <= expected and bool(linear_paths(fast)) == bool(expected)


def test_a_later_adapter():
    """On the same layers it is accelerated; those that it brings need another call."""
    model, fast = both("sd3")
    for targets, expected in ((["to_q"], FAST), (["to_k"], {*FAST, "peft"})):
        for one in (model, fast):
            one.add_adapter(LoraConfig(r=3, target_modules=targets), targets[0])
            one.set_adapters(["a", targets[0]])
            randomize(one)
        assert linear_paths(fast) <= {*expected, "base"}
        close(output(fast, inputs("sd3")), output(model, inputs("sd3")))
    assert "peft" in linear_paths(fast)
    assert linear_paths(lora_ext.accelerate(fast)) <= {*FAST, "base"}
    close(output(fast, inputs("sd3")), output(model, inputs("sd3")))


def test_a_folder_of_diffusers_names_the_way_out(tmp_path):
    model, fast = both("flux")
    model.save_lora_adapter(tmp_path, "b")
    other = lora_ext.apply_lora(nn.Sequential(nn.Linear(4, 4)), lora_ext.LoraConfig("0"))
    pool = lora_ext.AdapterPool(
        nn.Sequential(nn.Linear(4, 4)), capacity=1, max_rank=2, target_modules=["0"]
    )
    for take in (
        lambda: lora_ext.load_adapter(other, tmp_path, "b"),
        lambda: pool.add_adapter("b", tmp_path),
    ):
        with pytest.raises(ValueError, match=r"pipe\.load_lora_weights\(folder\) reads it, then"):
            take()
    hotswap(fast, tmp_path)
    close(output(fast, inputs("flux")), output(model, inputs("flux")))


# ---- guidance, an adapter for each image ----


@pytest.mark.parametrize("name", MODELS)
def test_guidance(name):
    """Names in the batch's order, twice; each sample as alone with its adapter."""
    model, fast = both(name)
    given = twice(name, inputs(name))
    with lora_ext.use_adapters(fast, ["a", "b", "a", "b"]):
        found = output(fast, given)
    alone = {}
    for adapter in "ab":
        model.set_adapters(adapter)
        alone[adapter] = output(model, given)
    wanted = torch.stack([alone[adapter][i] for i, adapter in enumerate("abab")])
    close(found, wanted)
    with lora_ext.use_adapters(fast, [None, "b", None, "a"]):
        found = output(fast, given)
    model.disable_lora()
    alone[None] = output(model, given)
    close(found, torch.stack([alone[a][i] for i, a in enumerate([None, "b", None, "a"])]))


# ---- training ----


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients(pefts_calls, name, is_checkpointed):
    model, fast = both(name)
    grads = []
    for one in (model, fast):
        one.train()
        if is_checkpointed:
            one.enable_gradient_checkpointing()
        one.set_adapters(["a", "b"])
        pefts_calls.clear()
        one(**inputs(name), return_dict=False)[0].square().sum().backward()
        found = {key: p.grad for key, p in one.named_parameters() if p.grad is not None}
        grads.append({key: grad for key, grad in found.items() if "lora_" in key})
    assert not pefts_calls and grads[0].keys() == grads[1].keys() and grads[0]
    for key, grad in grads[0].items():
        close(grads[1][key], grad, 1e-3)


# ---- offload, casting ----


def groups(model, kind):
    words = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type=kind, **words)


def accelerates(model, **words):
    from accelerate import cpu_offload

    cpu_offload(model, "cpu", **words)


def as_pipelines_do(model):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, torch.device("cpu"))


# Way -> (what does it, whether layers of PEFT stay ours after `accelerate`, and if it comes first).
OFFLOADS = {
    "whole model": (as_pipelines_do, True, True),
    "whole layers": (lambda m: accelerates(m, preload_module_classes=["Linear"]), True, False),
    "leaves": (accelerates, False, False),
    "groups of blocks": (lambda m: groups(m, "block_level"), True, True),
    "groups of leaves": (lambda m: groups(m, "leaf_level"), False, False),
}


@pytest.mark.parametrize("is_first", [False, True], ids=["after accelerate", "before"])
@pytest.mark.parametrize("way", OFFLOADS)
@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_offload(pefts_calls, name, way, is_first):
    """Where factors are loaded one by one, by hooks of their own, PEFT's forward calls them."""
    offload, *ours = OFFLOADS[way]
    given, is_ours = inputs(name), ours[is_first]
    wanted = output(adapted(name), given)
    fast = adapted(name)
    for do in (offload, lora_ext.accelerate) if is_first else (lora_ext.accelerate, offload):
        do(fast)
    pefts_calls.clear()
    close(output(fast, given), wanted)
    assert bool(pefts_calls) != is_ours
    assert linear_paths(fast) <= (FAST if is_ours else {"peft"})


@pytest.mark.parametrize("is_kept", [True, False], ids=["factors kept", "factors cast"])
@pytest.mark.parametrize("name", MODELS)
def test_layerwise_casting(pefts_calls, name, is_kept):
    """With "lora_" among what is skipped the factors keep their bits, and the update is ours."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    model, fast = (one.to(BF16) for one in both(name))
    skipped = (*DEFAULT_SKIP_MODULES_PATTERN, *(["lora_"] if is_kept else []))
    for one in (model, fast):
        one.enable_layerwise_casting(
            torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=skipped
        )
    given = inputs(name, dtype=BF16)
    wanted = output(model, given)
    assert pefts_calls
    pefts_calls.clear()
    close(output(fast, given), wanted, 3e-2)
    assert bool(pefts_calls) != is_kept
    assert linear_paths(fast) == ({"added"} if is_kept else {"peft"})


# ---- GGUF ----


def in_gguf(model, dtype):
    """The model with the linear layers of its blocks in Q8_0, as `from_single_file` makes them."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child.in_features % 32:
                continue
            layer = GGUFLinear(
                child.in_features, child.out_features, child.bias is not None, compute_dtype=dtype
            )
            blocks = torch.from_numpy(quants.quantize(child.weight.detach().numpy(), kind))
            layer.weight = GGUFParameter(blocks, quant_type=kind)
            layer.bias = child.bias
            setattr(parent, name, layer.requires_grad_(False))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_gguf(pefts_calls, name, dtype, monkeypatch):
    make, *rest = MODELS[name]
    monkeypatch.setitem(MODELS, name, (lambda: in_gguf(make(), dtype), *rest))
    model, fast = both(name)
    for one in (model, fast):
        for parameter in one.parameters():
            if type(parameter) is nn.Parameter:
                parameter.data = parameter.data.to(dtype)
    given = inputs(name, dtype=dtype)
    wanted = output(model, given)
    pefts_calls.clear()
    close(output(fast, given), wanted, 1e-4 if dtype == torch.float32 else 3e-2)
    assert not pefts_calls
    assert {reason[0] for reason in reasons(fast)} == {"fused"}
    assert all("Q8_0, dequantised into" in reason for _, reason in reasons(fast))
    with lora_ext.use_adapters(fast, ["a", "b"]):
        mixed = output(fast, given)
    for i, adapter in enumerate("ab"):
        model.set_adapters(adapter)
        close(mixed[i], output(model, given)[i], 1e-4 if dtype == torch.float32 else 3e-2)


def test_own_layers_over_gguf(tmp_path):
    def base():
        torch.manual_seed(1)
        return in_gguf(MODELS["flux"][0](), torch.float32).eval()

    model, given = base(), inputs("flux")
    plain = output(model, given)
    lora_ext.apply_lora(model, lora_ext.LoraConfig(MODELS["flux"][1], r=4))
    assert {layer.path for layer in lora_ext.explain(model)} == {"fused"}
    close(output(model, given), plain)
    for key, parameter in model.named_parameters():
        if "lora_b" in key:
            nn.init.normal_(parameter, std=0.3)
    changed = output(model, given)
    assert (changed - plain).abs().max() > 0.01 * plain.abs().max()
    lora_ext.save_adapter(model, tmp_path)
    assert torch.equal(output(lora_ext.load_adapter(base(), tmp_path), given), changed)
    assert torch.equal(output(lora_ext.unload(model), given), plain)


# ---- the page ----


def pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    none = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "vae"))
    none |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    transformer = adapted("sd3")
    transformer.unload_lora()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **none
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts():
    generator = torch.Generator().manual_seed(5)
    words = {"prompt_embeds": (2, 8, 32), "pooled_prompt_embeds": (2, 64)}
    words |= {f"negative_{key}": shape for key, shape in words.items()}
    found = {key: torch.randn(shape, generator=generator) for key, shape in words.items()}
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return found | {"latents": latents, "num_inference_steps": 2, "output_type": "latent"}


def test_a_pipeline_is_refused_by_name():
    pipe = pipeline()
    with pytest.raises(TypeError, match=r"got StableDiffusion3Pipeline; .*: pipe\.transformer$"):
        lora_ext.accelerate(pipe)


def test_the_page(tmp_path, monkeypatch):
    """Its code runs, and images are those of diffusers with PEFT."""
    from diffusers import StableDiffusion3Pipeline

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("fox", "ink")):
        layers = {
            key.replace(".a.", "."): value
            for key, value in adapted("sd3", seed).state_dict().items()
            if "lora_" in key and ".a." in key
        }
        StableDiffusion3Pipeline.save_lora_weights(name, transformer_lora_layers=layers)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    names = {"pipe": pipeline(), "prompts": prompts()}
    plain = pipeline()
    for code in blocks:
        exec(compile(code, PAGE.name, "exec"), names)
    plain.load_lora_weights("fox", adapter_name="fox")
    plain.load_lora_weights("ink", adapter_name="ink")
    plain.set_adapters(["fox", "ink"], [0.7, 0.3])
    close(names["images"], plain(**prompts()).images)
    for i, (name, weight) in enumerate((("fox", 0.7), ("ink", 0.3))):
        plain.set_adapters(name, weight)
        close(names["each"][i], plain(**prompts()).images[i])
