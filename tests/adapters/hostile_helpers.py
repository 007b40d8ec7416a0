"""A valid adapter folder, and the check that a broken one is refused and changes no model."""

import copy

import pytest
import torch
from adapter_helpers import assert_unchanged, make_zoo, peft_model, save_peft, state_of

from lora_ext import LoraConfig, apply_lora
from lora_ext.adapters import AdapterError, load_adapter

Q0 = "base_model.model.layers.0.q_proj."
A, B = Q0 + "lora_A.weight", Q0 + "lora_B.weight"


def save_valid(folder):
    """PEFT's own: 3 x q_proj of rank 2, the norm stored whole, biases of the layers."""
    config = {
        "target_modules": ["q_proj"],
        "r": 2,
        "bias": "lora_only",
        "modules_to_save": ["norm"],
    }
    save_peft(peft_model(make_zoo(torch.float32), **config), folder)


def assert_refused(folder, message, base=None, targets="q_proj"):
    """Into a plain model, and into one with an adapter, whose layers are there already."""
    base = make_zoo(torch.float32) if base is None else base
    adapted = apply_lora(copy.deepcopy(base), LoraConfig(targets, r=3), adapter_name="other")
    for model in (base, adapted):
        before = state_of(model)
        with pytest.raises(AdapterError, match=message) as caught:
            load_adapter(model, folder)
        assert str(caught.value).startswith(f"lora_ext.load_adapter: {folder}: ")
        assert len(str(caught.value)) < 1500
        assert_unchanged(model, before)
