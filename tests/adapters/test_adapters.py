"""Adapters on disk: PEFT's folders load here, and the folders written here load in PEFT."""

import copy

import pytest
import torch
from adapter_helpers import (
    EVERYTHING,
    LINEAR,
    WEIGHTS,
    from_peft,
    make_ids,
    make_zoo,
    output,
    peft_model,
    read_config,
    read_tensors,
    save_peft,
)

from lora_ext.adapters import AdapterError, load_adapter, save_adapter
from lora_ext.models import lora_layers

CONFIGS = {
    "linear": {"target_modules": ["q_proj", "mlp"], "r": 4, "lora_alpha": 6},
    "embedding": {"target_modules": ["emb"], "r": 3},
    "conv1d": {"target_modules": ["c_attn"], "r": 5, "fan_in_fan_out": True},
    "conv2d": {"target_modules": ["conv"], "r": 2},
    "everything": {"target_modules": EVERYTHING, "r": 4, "lora_alpha": 7},
    "rslora": {"target_modules": EVERYTHING, "use_rslora": True, "r": 4},
    "rank_pattern": {
        "target_modules": EVERYTHING,
        "r": 4,
        "rank_pattern": {r"layers\.[01]\.q_proj": 6, "^emb": 2, "mlp": 1},
    },
    "alpha_pattern": {
        "target_modules": EVERYTHING,
        "r": 4,
        # Of two keys that match the first counts: of those in the file, where PEFT sorts them.
        "alpha_pattern": {r".*\.(mlp|q_proj)": 11, "conv": 1, "q_proj": 3},
        "rank_pattern": {"conv": 3},
    },
    "rslora with patterns": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.mlp": 5},
    },
    "lora_bias": {"target_modules": [*LINEAR, "conv"], "lora_bias": True, "r": 3},
    "bias all": {"target_modules": ["q_proj", "emb"], "bias": "all"},
    "bias lora_only": {"target_modules": ["q_proj", "c_attn"], "bias": "lora_only"},
    "modules_to_save": {"target_modules": LINEAR, "modules_to_save": ["head", "score"]},
    "bias all and modules_to_save": {
        "target_modules": LINEAR,
        "modules_to_save": ["head"],
        "bias": "all",
    },
    "regex": {"target_modules": r".*\.[01]\.(q_proj|mlp)$|c_\w+"},
    "all-linear": {"target_modules": "all-linear"},
    "layers_to_transform": {
        "target_modules": ["q_proj", "layers.1.mlp"],  # a whole path is meant as it is
        "layers_to_transform": [0, 2],
        "layers_pattern": ["h", "layers"],
    },
    "one layer of a pattern": {
        "target_modules": ["q_proj", "mlp"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "exclude names": {"target_modules": LINEAR, "exclude_modules": ["layers.0.mlp"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r"head\..*"},
    "dropout": {"target_modules": LINEAR, "lora_dropout": 0.25},
}
# PEFT initializes these from float32 weights only.
FLOAT32_CONFIGS = {
    "mica": {"target_modules": ["q_proj", "emb"], "init_lora_weights": "mica"},
    "pissa": {"target_modules": [*LINEAR, "emb"], "init_lora_weights": "pissa", "r": 4},
    "pissa rslora": {
        "target_modules": LINEAR,
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "lora_alpha": 3,
        "rank_pattern": {"q_proj": 3},
    },
    "olora": {"target_modules": ["q_proj", "mlp", "emb"], "init_lora_weights": "olora", "r": 4},
}


def case(table, *names):
    return pytest.mark.parametrize("config", [pytest.param(table[n], id=n) for n in names or table])


@case(CONFIGS)
def test_a_folder_of_peft_loads_and_goes_back(config, tmp_path):
    base = make_zoo()
    theirs = peft_model(base, **config)
    save_peft(theirs, tmp_path / "theirs")
    wanted = output(theirs)
    assert (wanted - output(base)).abs().max() > 1e-3

    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), wanted, rtol=1e-12, atol=1e-12)

    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(output(from_peft(base, tmp_path / "ours")), wanted)
    again = load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(output(again), output(ours))


@case(FLOAT32_CONFIGS)
def test_inits_that_need_the_weight(config, tmp_path):
    """PEFT keeps W - scaling B0 A0 as the weight, rounded; here the weight stays."""
    base = make_zoo(torch.float32)
    theirs = peft_model(base, **config)
    save_peft(theirs, tmp_path / "theirs")
    wanted = output(theirs)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.layers[0].q_proj.weight, base.layers[0].q_proj.weight)

    save_adapter(ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["init_lora_weights"] is True
    back = from_peft(base, tmp_path / "ours")
    torch.testing.assert_close(output(back), wanted, rtol=1e-4, atol=1e-5)


def test_a_half_base_gets_float32_factors(tmp_path):
    base = make_zoo(torch.bfloat16)
    theirs = peft_model(base, target_modules=EVERYTHING, r=4)
    save_peft(theirs, tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    dtypes = {layer.lora_a["default"].dtype for _, layer in lora_layers(ours)}
    assert dtypes == {torch.float32}
    torch.testing.assert_close(output(ours), output(theirs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_the_dtype_of_factors_does_not_depend_on_the_file(stored, tmp_path):
    from safetensors.torch import save_file

    base = make_zoo(torch.float32)
    save_peft(peft_model(base, target_modules=LINEAR), tmp_path)
    tensors = {key: value.to(stored) for key, value in read_tensors(tmp_path).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    for wanted, given in ((torch.float32, None), (torch.bfloat16, torch.bfloat16)):
        ours = load_adapter(copy.deepcopy(base), tmp_path, adapter_dtype=given)
        layer = ours.layers[0].q_proj
        key = "base_model.model.layers.0.q_proj.lora_A.weight"
        assert layer.lora_a["default"].dtype == layer.lora_b["default"].dtype == wanted
        assert torch.equal(layer.lora_a["default"], tensors[key].to(wanted))


def test_the_dtype_of_factors_is_floating(tmp_path):
    save_peft(peft_model(make_zoo(), target_modules=LINEAR), tmp_path)
    with pytest.raises(AdapterError, match=r"a floating adapter_dtype, but got torch\.int8"):
        load_adapter(make_zoo(), tmp_path, adapter_dtype=torch.int8)


def test_loaded_in_inference_mode_and_trained_outside(tmp_path):
    theirs = peft_model(make_zoo(), target_modules=EVERYTHING, bias="all", modules_to_save=["norm"])
    save_peft(theirs, tmp_path)
    ours = make_zoo()
    with torch.inference_mode():
        load_adapter(ours, tmp_path, trainable=True)
    loss = ours(make_ids()).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
