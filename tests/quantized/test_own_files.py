"""Models with quantised layers and adapters of this package: state dicts and folders."""

import pytest
import torch
from helpers import BF16
from layer_helpers import snapshot
from own_helpers import KINDS, OF_PEFT, Net, adapted, make_x, same
from peft import PeftModel
from torch import nn

import lora_ext
from lora_ext.models import lora_state_dict
from lora_ext.nn import LoRAQuantizedLinear


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(kind):
    """The base's entries are those that it has alone; adapters come beside them."""
    model = Net(kind)
    plain = snapshot(model)
    adapted(model)
    own = {n for n, p in model.named_parameters() if "lora_" in n}
    found = model.state_dict()
    assert set(found) == set(plain) | own and len(own) == 6
    assert all(same(found[name], value) for name, value in plain.items())
    assert set(lora_state_dict(model)) == own
    prefixed = nn.ModuleDict({"a": model}).state_dict(prefix="b.")
    assert set(prefixed) == {f"b.a.{name}" for name in found}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_goes_back(kind):
    """Of the adapters alone, and of the whole where the base alone takes its own."""
    model, other, x = adapted(Net(kind)), adapted(Net(kind)), make_x()
    for parameter in other.parameters():
        if parameter.requires_grad:
            nn.init.zeros_(parameter)
    y = model(x)
    missing, unexpected = other.load_state_dict(lora_state_dict(model), strict=False)[:2]
    assert torch.equal(other(x), y)
    assert not unexpected and not any("lora_" in name for name in missing)
    if kind.startswith(("nf4", "fp4")):
        # It has no entry for what describes its weight, with adapters or without.
        for one in (model, Net(kind)):
            with pytest.raises(RuntimeError, match=r"Unexpected key.*up\.weight\.absmax"):
                one.load_state_dict(snapshot(one))
        return
    other = adapted(Net(kind))
    nn.init.zeros_(other.up.lora_b["default"])
    other.load_state_dict(snapshot(model))
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model, x = adapted(Net(kind), use_rslora=True, rank_pattern={"up": 3}), make_x()
    lora_ext.save_adapter(model, tmp_path / "a")
    other = lora_ext.load_adapter(Net(kind), tmp_path / "a")
    assert isinstance(other.up, LoRAQuantizedLinear) and other.up.lora_a["default"].shape[0] == 3
    assert torch.equal(other(x), model(x))
    lora_ext.load_adapter(other, tmp_path / "a", "again", trainable=True)
    assert other.up.active_adapters == ("default",)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_of_the_weight_is_saved_as_plain_lora(init, tmp_path):
    """With W kept it is one; a folder that says so of another weight is refused."""
    pytest.importorskip("bitsandbytes")
    model, x = adapted(Net("nf4"), init_lora_weights=init, r=4), make_x()
    lora_ext.save_adapter(model, tmp_path / "a")
    other = lora_ext.load_adapter(Net("nf4"), tmp_path / "a")
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-3)
    config = tmp_path / "a" / "adapter_config.json"
    text = config.read_text()
    assert '"init_lora_weights": true' in text
    config.write_text(text.replace('"init_lora_weights": true', f'"init_lora_weights": "{init}"'))
    refused = f"'up', which is quantised, but got .*{init}"
    with pytest.raises(lora_ext.adapters.AdapterError, match=refused):
        lora_ext.load_adapter(Net("nf4"), tmp_path / "a")


@pytest.mark.parametrize("kind", OF_PEFT)
def test_pefts_folder_in_and_out(kind, tmp_path):
    model, x = adapted(Net(kind, BF16)), make_x(BF16)
    lora_ext.save_adapter(model, tmp_path / "ours")
    plain = Net(kind, BF16)
    plain.is_loaded_in_4bit = "4bit" in type(plain.up).__name__
    plain.is_loaded_in_8bit = "8bit" in type(plain.up).__name__
    theirs = PeftModel.from_pretrained(plain, tmp_path / "ours", is_trainable=True)
    y = model(x)
    assert (theirs(x) - y).abs().max() <= 2e-2 * y.abs().max()
    theirs.save_pretrained(tmp_path / "theirs")
    other = lora_ext.load_adapter(Net(kind, BF16), tmp_path / "theirs")
    assert torch.equal(other(x), y)
