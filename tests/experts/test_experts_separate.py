"""Files of adapters on experts from before transformers 5, with keys for each expert's layers, and
files with a tensor of all experts for each, which some may share."""

import warnings

import pytest
import torch
from expert_helpers import Mixture, make_experts
from hostile_helpers import assert_refused
from mixture_helpers import edit, edited, loaded_by_peft, logits, mixture, peft_mixture, put
from safetensors.torch import load_file

from lora_ext import load_adapter, save_adapter

EXPERTS = "base_model.model.model.layers.0.mlp.experts."
# Names of gate, up and down.
LAYERS_OF_EXPERTS = {"mixtral": ("w1", "w3", "w2")}
V4 = {"target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}, "peft_version": "0.15.2"}


def separate(kind, tensors, is_kept=lambda key: True):
    """The factors of each expert's layers in the place of those of stacks, whose rank is 2 r where
    they hold two layers."""
    names = LAYERS_OF_EXPERTS.get(kind, ("gate_proj", "up_proj", "down_proj"))
    for key in [key for key in tensors if ".experts." in key and key.endswith("lora_A.weight")]:
        lora_a = tensors.pop(key)
        lora_b = tensors.pop(key.replace("lora_A", "lora_B"))
        layers = names[:2] if ".base_layer." in key else names[2:]
        every_a = lora_a.view(5, len(layers), 3, -1)
        every_b = lora_b.view(len(layers), -1, len(layers), 3, 5)
        for e in range(5):
            for number, name in enumerate(layers):
                start = f"{key.partition('.experts.')[0]}.experts.{e}.{name}."
                tensors[f"{start}lora_A.weight"] = every_a[e, number]
                tensors[f"{start}lora_B.weight"] = every_b[number, :, number, :, e]
    for key in list(tensors):
        value = tensors.pop(key)
        if is_kept(key):
            place = ".block_sparse_moe." if kind == "mixtral" else ".mlp."
            tensors[key.replace(".mlp.", place)] = value


def of_layers(kind, folder, is_kept=lambda key: True, use_rslora=False, **fields):
    """PEFT's model of a mixture, whose adapter is saved as before transformers 5."""
    model = peft_mixture(kind, "all-linear", use_rslora=use_rslora)
    for module in model.modules():
        if getattr(module, "parameter_name", "") == "gate_up_proj":
            module.scaling["default"] = 6 / 3 ** (0.5 if use_rslora else 1)
            blocks = module.lora_B["default"].weight.data.view(2, -1, 2, 3, 5)
            blocks[0, :, 1], blocks[1, :, 0] = 0, 0
            for number, name in enumerate(("gate_proj", "up_proj")):
                blocks[number] *= is_kept(f".{name}.")
    model.save_pretrained(folder)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", *LAYERS_OF_EXPERTS.get(kind, ())]
    names += [] if kind in LAYERS_OF_EXPERTS else ["gate_proj", "up_proj", "down_proj"]
    edit(folder, lambda t: separate(kind, t, is_kept), target_modules=names, **{**V4, **fields})
    return model


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe"])
def test_experts_that_were_layers_are_as_in_peft(kind, tmp_path):
    model = of_layers(kind, tmp_path)
    expected = logits(model)
    torch.testing.assert_close(logits(load_adapter(mixture(kind), tmp_path)), expected)
    torch.testing.assert_close(logits(loaded_by_peft(mixture(kind), tmp_path)), expected)


@pytest.mark.parametrize(
    ("is_kept", "words"),
    [
        (lambda key: ".gate_proj." not in key, {}),  # which PEFT refuses
        (lambda key: ".up_proj." not in key, {"base_model_name_or_path": "unsloth/x"}),
        (lambda key: ".down_proj." not in key or "layers.1" in key, {"use_rslora": True}),
    ],
    ids=["no gate", "no up", "rsLoRA"],
)
def test_some_layers_of_experts(is_kept, words, tmp_path):
    """By rsLoRA, too, each layer keeps its scaling, which PEFT multiplies by the root of 2."""
    model = of_layers("qwen3_moe", tmp_path, is_kept, **words)
    for path, wrapper in model.named_modules():
        if getattr(wrapper, "parameter_name", "") == "down_proj":
            wrapper.lora_B["default"].weight.data *= is_kept(f"{path}.down_proj.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_adapter(mixture("qwen3_moe"), tmp_path, trainable=True)
    torch.testing.assert_close(logits(ours), logits(model))
    save_adapter(ours, tmp_path / "again")
    found = loaded_by_peft(mixture("qwen3_moe"), tmp_path / "again")
    torch.testing.assert_close(logits(found), logits(model))


def test_dropout_without_an_adapter_on_the_router(tmp_path):
    """Which has none; PEFT refuses it for the experts, too."""
    of_layers("qwen3_moe", tmp_path, lambda key: ".mlp.gate." not in key, lora_dropout=0.3)
    ours = load_adapter(mixture("qwen3_moe"), tmp_path, trainable=True)
    assert torch.equal(logits(ours.eval()), logits(ours))
    assert not torch.equal(logits(ours.train()), logits(ours))


HOSTILE = {
    "one missing": (
        lambda t: t.pop(EXPERTS + "3.up_proj.lora_B.weight"),
        {},
        "lora_B of expert 3 is missing",
    ),
    "one too many": (
        put(EXPERTS + "5.up_proj.lora_A.weight", 3, 16),
        {},
        "of the 5 experts .*but g",
    ),
    "another rank": (put(EXPERTS + "0.down_proj.lora_A.weight", 4, 12), {}, r"shape \[3, 12\]"),
    "another width": (put(EXPERTS + "2.up_proj.lora_B.weight", 13, 3), {}, r"shape \[12, 3\]"),
    "no dimension": (put(EXPERTS + "0.gate_proj.lora_A.weight"), {}, r"but got \[\]"),
    "another name": (put(EXPERTS + "0.w1.lora_A.weight", 3, 16), {}, "each tensor once"),
    "today's, too": (put(EXPERTS + "base_layer.lora_A.weight", 30, 16), {}, "each tensor once"),
    "a second zero": (put(EXPERTS + "00.up_proj.lora_A.weight", 3, 16), {}, "LoRA tensors alone"),
    "dropout": (None, {"lora_dropout": 0.1}, 'put "lora_dropout": 0 into adapter_config.json'),
    "several alphas": (None, {"alpha_pattern": {"0.up_proj": 1}}, "one lora_alpha .*'1', '6'"),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    of_layers("qwen3_moe", folder)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_layers_of_experts_that_do_not_fit(name, valid, tmp_path):
    tensors, fields, message = HOSTILE[name]
    folder = edited(valid, tmp_path, tensors, **fields)
    assert_refused(folder, message, mixture(), ["experts.down_proj"])


# ---- one tensor for all experts ----


def of_all(tensors, shared=("w1.lora_A", "w3.lora_A", "w2.lora_B")):
    """Random factors of all experts of a projection in one tensor, of some the same for all."""
    generator = torch.Generator().manual_seed(2)
    tensors.clear()
    for layer in range(2):
        for part, sides in {"w1": (16, 12), "w3": (16, 12), "w2": (12, 16)}.items():
            for factor, shape in {"A": (3, sides[0]), "B": (sides[1], 3)}.items():
                name = f"{part}.lora_{factor}"
                values = torch.randn(1 if name in shared else 5, *shape, generator=generator)
                key = EXPERTS.replace("layers.0", f"layers.{layer}")
                tensors[f"{key}{name}.weight"] = values


def of_each(tensors):
    """The same, apart."""
    for key in list(tensors):
        values, (start, end) = tensors.pop(key), key.split("experts.")
        for e in range(5):
            tensors[f"{start}experts.{e}.{end}"] = values[min(e, len(values) - 1)].clone()


OF_ALL = {"target_modules": "all-linear", "target_parameters": None, "rank_pattern": {}}
OF_ALL |= {"alpha_pattern": {}, "r": 3, "lora_alpha": 6}


@pytest.mark.parametrize("is_shared", [True, False])
def test_factors_of_all_experts_in_one_tensor(is_shared, valid, tmp_path):
    def tensors(found):
        of_all(found) if is_shared else of_all(found, ())

    whole = edited(valid, tmp_path / "whole", tensors, **OF_ALL)
    apart = edited(whole, tmp_path / "apart", of_each)
    model = load_adapter(mixture(), whole)
    found = logits(model)
    assert torch.equal(found, logits(load_adapter(mixture(), apart)))
    assert not torch.equal(found, logits(mixture()))
    save_adapter(model, tmp_path / "again", layout="stacked")
    first, again = (load_file(f / "adapter_model.safetensors") for f in (whole, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key].to(first[key])) for key in first)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w1.lora_A", (2, 3, 16), r"shape \[1, 3, 16\] or \[5, 3, 16\], but got \[2, 3"),
        ("w1.lora_A", (3,), r"shape \[1, 3, 16\] or \[5, 3, 16\], but got \[3\]"),
        ("2.w1.lora_A", (3, 16), "of the 5 experts .*but got .*experts.2.w1.lora_A"),
        ("gate_proj.lora_A", (1, 3, 16), "each tensor once"),
    ],
)
def test_factors_of_all_experts_that_do_not_fit(name, shape, message, valid, tmp_path):
    def tensors(found):
        of_all(found)
        put(f"{EXPERTS}{name}.weight", *shape)(found)

    folder = edited(valid, tmp_path, tensors, **OF_ALL)
    assert_refused(folder, message, mixture(), ["experts.down_proj"])


def test_a_gate_that_experts_do_not_have(valid, tmp_path):
    """Its factors would be left out."""

    def tensors(found):
        found.clear()
        put("base_model.model.experts.w1.lora_A.weight", 1, 3, 16)(found)

    folder = edited(valid, tmp_path, tensors, **OF_ALL)
    model = Mixture(make_experts("no gate"))
    message = r"of \['up_proj', 'down_proj'\] of 'experts', .*but got \['gate_proj'\]"
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
