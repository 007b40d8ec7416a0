"""Several adapters in one model, and what of a loaded one is trained."""

import copy

import pytest
import torch
from adapter_helpers import assert_unchanged, make_zoo, output, peft_model, save_peft, state_of

from lora_ext import delete_adapter, set_adapter
from lora_ext.adapters import AdapterError, load_adapter, save_adapter


@pytest.fixture
def two_folders(tmp_path):
    base = make_zoo()
    first = peft_model(base, target_modules=["q_proj", "emb"], r=2, lora_dropout=0.5)
    second = peft_model(base, target_modules=["q_proj", "mlp", "conv"], r=3, use_rslora=True)
    save_peft(first, tmp_path / "first")
    save_peft(second, tmp_path / "second")
    return base, tmp_path / "first", tmp_path / "second", output(first), output(second)


def test_several_adapters(two_folders, tmp_path):
    base, first, second, first_output, second_output = two_folders
    model = copy.deepcopy(base)
    load_adapter(model, first, "one")
    load_adapter(model, second, "two")
    torch.testing.assert_close(output(model), first_output)
    set_adapter(model, "two")
    torch.testing.assert_close(output(model), second_output)
    save_adapter(model, tmp_path / "again", "one")
    set_adapter(model, "one")
    again = load_adapter(copy.deepcopy(base), tmp_path / "again")
    assert torch.equal(output(model), output(again))
    delete_adapter(model, "one")
    delete_adapter(model, "two")
    torch.testing.assert_close(output(model), output(base))
    load_adapter(model, second, "one")
    torch.testing.assert_close(output(model), second_output)


def test_a_name_that_is_taken(two_folders):
    base, first, second, *_ = two_folders
    model = load_adapter(base, first)
    before = state_of(model)
    with pytest.raises(AdapterError, match="the model has 'default'; delete_adapter it first"):
        load_adapter(model, second)
    for name in ("", "a.b", "keys"):
        with pytest.raises(AdapterError, match="expected a name that is not empty"):
            load_adapter(model, second, name)
    assert_unchanged(model, before)


def trainable_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_trainable(two_folders):
    base, first, second, *_ = two_folders
    assert trainable_names(load_adapter(copy.deepcopy(base), first)) == set()
    model = load_adapter(base, first, "one", trainable=True)
    names = trainable_names(model)
    assert names
    assert all(name.endswith((".lora_a.one", ".lora_b.one")) for name in names)
    load_adapter(model, second, "two")
    assert trainable_names(model) == names
    load_adapter(model, second, "three", trainable=True)
    added = trainable_names(model) - names
    assert len(added) == 14
    assert all(name.endswith((".lora_a.three", ".lora_b.three")) for name in added)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_and_modules_to_save_are_trainable(bias, tmp_path):
    base = make_zoo()
    theirs = peft_model(base, target_modules=["q_proj"], bias=bias, modules_to_save=["norm"])
    save_peft(theirs, tmp_path)
    assert trainable_names(load_adapter(copy.deepcopy(base), tmp_path)) == set()
    model = load_adapter(base, tmp_path, trainable=True)
    names = {name for name in trainable_names(model) if "lora_" not in name}
    wanted = {f"layers.{i}.q_proj.bias" for i in range(3)} | {"norm.weight", "norm.bias"}
    if bias == "all":
        wanted |= {"c_attn.bias", "conv.bias", "head.0.bias", "head.1.bias"}
    assert names == wanted
