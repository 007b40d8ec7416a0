"""Biases and modules_to_save: whole tensors that a folder holds beside the factors."""

import copy

import pytest
import torch
from adapter_helpers import (
    Tree,
    assert_unchanged,
    from_peft,
    make_zoo,
    output,
    peft_model,
    randomize,
    read_config,
    save_peft,
    state_of,
)
from torch import nn

from lora_ext import LoRAConfig, apply_lora
from lora_ext.adapters import AdapterError, load_adapter, save_adapter


def test_saved_modules_are_saved_again(tmp_path):
    """They came from a folder and are frozen, but belong to the adapter."""
    base = make_zoo()
    theirs = peft_model(base, target_modules=["q_proj"], bias="all", modules_to_save=["norm"])
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    config = read_config(tmp_path / "ours")
    assert config["bias"] == "all"
    assert config["modules_to_save"] == ["norm"]
    torch.testing.assert_close(output(from_peft(base, tmp_path / "ours")), output(theirs))
    save_adapter(ours, tmp_path / "none", bias="none")
    assert read_config(tmp_path / "none")["bias"] == "none"


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["norm"]}, {"bias": "all"}, {"bias": "lora_only"}], ids=str
)
def test_one_adapter_does_not_overwrite_what_another_stored(config, tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=["q_proj"], **config), tmp_path / "one")
    two = peft_model(base, target_modules=["q_proj", "mlp"], **config)
    randomize(p for p in two.parameters() if p.requires_grad)
    save_peft(two, tmp_path / "two")
    model = load_adapter(base, tmp_path / "one", "one")
    load_adapter(model, tmp_path / "one", "equal")
    before = state_of(model)
    with pytest.raises(AdapterError, match="adapter 'one' has other values there"):
        load_adapter(model, tmp_path / "two", "two")
    assert_unchanged(model, before)


def test_modules_to_save_that_hold_adapters(tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=["q_proj"], modules_to_save=["mlp"]), tmp_path)
    model = apply_lora(base, LoRAConfig("mlp"), adapter="other")
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"modules_to_save without adapters, but 'layers.0.mlp'"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.lin = nn.Linear(8, 8)
        self.last = nn.Linear(8, 20, bias=False)
        self.last.weight = self.emb.weight

    def forward(self, ids):
        return self.last(torch.tanh(self.lin(self.emb(ids))))


def test_a_tied_module_to_save(tmp_path):
    """PEFT copies the module, and the other keeps the old weight; here both would change."""
    base = Tied().double()
    theirs = peft_model(base, target_modules=["lin"], modules_to_save=["emb"])
    save_peft(theirs, tmp_path / "theirs")
    before = state_of(base)
    with pytest.raises(AdapterError, match=r"emb.weight.*is tied to 'last.weight'.*untie"):
        load_adapter(base, tmp_path / "theirs")
    assert_unchanged(base, before)
    untied = copy.deepcopy(base)
    untied.last.weight = nn.Parameter(untied.last.weight.detach().clone())
    load_adapter(untied, tmp_path / "theirs")
    torch.testing.assert_close(output(untied), output(theirs))

    ours = apply_lora(copy.deepcopy(base), LoRAConfig("lin", modules_to_save=("emb",)))
    randomize(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["modules_to_save"] == ["emb", "last"]
    torch.testing.assert_close(output(from_peft(base, tmp_path / "ours")), output(ours))
    assert torch.equal(output(load_adapter(base, tmp_path / "ours")), output(ours))


def test_modules_to_save_whose_names_end_alike(tmp_path):
    """PEFT compares the ends of paths, at a dot or not: "head" means "overhead" too."""
    base = Tree(["head", "overhead", "q"]).double()
    ours = apply_lora(copy.deepcopy(base), LoRAConfig("q", modules_to_save=("head",)))
    randomize(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path)
    x = torch.randn(2, 4).double()
    torch.testing.assert_close(output(from_peft(base, tmp_path), x), output(ours, x))
    assert torch.equal(output(load_adapter(base, tmp_path), x), output(ours, x))


def test_a_module_to_save_that_peft_would_look_for_in_its_own_layers(tmp_path):
    """The end of "lora_dropout"."""
    model = apply_lora(Tree(["out", "q"]), LoRAConfig("q", modules_to_save=("out",)))
    with pytest.raises(AdapterError, match="'out', with which PEFT's 'lora_dropout' ends"):
        save_adapter(model, tmp_path)
