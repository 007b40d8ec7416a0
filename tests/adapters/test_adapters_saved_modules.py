"""Biases and modules_to_save: whole tensors that a folder holds beside the factors."""

import copy

import pytest
import torch
from adapter_helpers import (
    Tied,
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

from lora_ext import LoraConfig, apply_lora
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
    with pytest.raises(AdapterError, match="'one' has loaded other values there"):
        load_adapter(model, tmp_path / "two", "two")
    assert_unchanged(model, before)


def test_modules_to_save_that_hold_adapters(tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=["q_proj"], modules_to_save=["mlp"]), tmp_path)
    model = apply_lora(base, LoraConfig("mlp"), adapter_name="other")
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"modules_to_save without adapters, but 'layers.0.mlp'"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("names", [["emb"], ["last"], ["emb", "last"]], ids=str)
def test_a_tied_module_to_save(names, tmp_path):
    """PEFT copies each of them, so that the other keeps the old weight, or they differ."""
    base = Tied().double()
    save_peft(peft_model(base, target_modules=["lin"], modules_to_save=names), tmp_path)
    wanted = output(from_peft(base, tmp_path))
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(ours), wanted)
    assert ours.emb.weight is not ours.last.weight
    if len(names) == 1:
        other = "last" if names == ["emb"] else "emb"
        assert torch.equal(ours.get_submodule(other).weight, base.emb.weight)
    save_adapter(ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["modules_to_save"] == names
    torch.testing.assert_close(output(from_peft(base, tmp_path / "ours")), wanted)


def test_equal_values_stay_tied(tmp_path):
    base = Tied().double()
    ours = apply_lora(copy.deepcopy(base), LoraConfig("lin", modules_to_save=("emb",)))
    randomize(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["modules_to_save"] == ["emb", "last"]
    torch.testing.assert_close(output(from_peft(base, tmp_path / "ours")), output(ours))
    again = load_adapter(base, tmp_path / "ours")
    assert torch.equal(output(again), output(ours))
    assert again.emb.weight is again.last.weight


def test_a_load_that_fails_after_untying_ties_again(tmp_path, monkeypatch):
    base = Tied().double()
    save_peft(peft_model(base, target_modules=["lin"], modules_to_save=["last"]), tmp_path)
    before = state_of(base)

    def fail(*_):
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr("lora_ext.adapters.apply.install", fail)
    with pytest.raises(MemoryError):
        load_adapter(base, tmp_path)
    assert_unchanged(base, before)
    assert base.last.weight is base.emb.weight


def test_modules_to_save_whose_names_end_alike(tmp_path):
    """PEFT compares the ends of paths, at a dot or not: "head" means "overhead" too."""
    base = Tree(["head", "overhead", "q"]).double()
    ours = apply_lora(copy.deepcopy(base), LoraConfig("q", modules_to_save=("head",)))
    randomize(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path)
    x = torch.randn(2, 4).double()
    torch.testing.assert_close(output(from_peft(base, tmp_path), x), output(ours, x))
    assert torch.equal(output(load_adapter(base, tmp_path), x), output(ours, x))


def test_a_module_to_save_that_peft_would_look_for_in_its_own_layers(tmp_path):
    """The end of "lora_dropout"."""
    model = apply_lora(Tree(["out", "q"]), LoraConfig("q", modules_to_save=("out",)))
    with pytest.raises(AdapterError, match="'out', with which PEFT's 'lora_dropout' ends"):
        save_adapter(model, tmp_path)
