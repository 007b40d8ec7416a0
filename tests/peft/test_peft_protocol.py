"""An accelerated model is PEFT's model still: classes, state and files; errors.

`contract/test_protocol` has what our own layers do, too.
"""

import filecmp
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from layer_helpers import assert_same_state, snapshot
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import Embedding, Linear, LoraModel
from peft_helpers import (
    ADAPTERS,
    FAST,
    TARGETS,
    Net,
    accelerated,
    assert_same_output,
    lora_modules,
    make_ids,
    net,
    paths,
    randomize,
    step,
)
from torch import nn

import lora_ext
from lora_ext.peft import swap

# ---- signatures ----


def parameters(method) -> list[tuple]:
    found = inspect.signature(method).parameters.values()
    return [(each.name, each.kind, each.default) for each in found]


@pytest.mark.parametrize(("theirs", "ours"), swap.classes().items())
def test_public_methods_keep_pefts_signatures(theirs, ours):
    """diffusers' fuse_lora(adapter_names=...) looks for that name among merge's."""
    methods = dict(inspect.getmembers(theirs, inspect.isfunction))
    public = {name: method for name, method in methods.items() if not name.startswith("_")}
    assert {"merge", "inject_adapter"} & set(public)
    for name, method in public.items():
        assert parameters(getattr(ours, name)) == parameters(method), name


# ---- state and files ----


@pytest.mark.parametrize("adapters", [name for name in ADAPTERS if name != "lora_bias"])
def test_accelerate_and_decelerate_change_no_state(adapters):
    model = net(adapters)
    before, names = snapshot(model), repr(model)
    attributes = {name: list(m.__dict__) for name, m in model.named_modules()}
    classes = {name: type(m) for name, m in model.named_modules()}
    trainable = [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]
    assert lora_ext.accelerate(model) is model
    assert len(lora_modules(model)) == len(TARGETS)
    for module in lora_modules(model).values():
        assert type(module).__module__.startswith("lora_ext.peft")
        assert isinstance(module, (Linear, Embedding))
    assert isinstance(model, PeftModel) and isinstance(model.base_model, LoraModel)
    for check in (
        lambda: None,
        lambda: step(model, make_ids()),
        lambda: lora_ext.decelerate(model),
    ):
        check()
        assert_same_state(model, before)
        assert repr(model) == names
        assert {name: list(m.__dict__) for name, m in model.named_modules()} == attributes
        assert [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()] == trainable
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert {layer.reason for layer in lora_ext.explain(model)} == {
        "not accelerated; call lora_ext.accelerate(model)"
    }


def test_twice_is_once():
    model = lora_ext.accelerate(lora_ext.accelerate(net()))
    assert set(paths(model).values()) <= FAST
    assert type(lora_ext.decelerate(lora_ext.decelerate(model)).base_model.model.up) is Linear


def test_save_pretrained_writes_the_same_bytes(tmp_path):
    model = net("one")
    model.save_pretrained(tmp_path / "peft")
    lora_ext.accelerate(model).save_pretrained(tmp_path / "ours")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        theirs, ours = (tmp_path / way / "a" / name for way in ("peft", "ours"))
        assert filecmp.cmp(theirs, ours, shallow=False)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "ours" / "a").double()
    assert_same_output(lora_ext.accelerate(loaded), model.double())


# ---- copies, other ways to hold the model ----


def test_without_a_peft_model_around_it():
    base = Net().double()
    model = inject_adapter_in_model(LoraConfig(target_modules=TARGETS, r=3), base, "a")
    model = randomize(model.double())
    assert_same_output(accelerated(model), model)
    assert set(paths(accelerated(model)).values()) <= FAST
    assert {layer.path for layer in lora_ext.explain(accelerated(model).up)} <= FAST


# ---- bad input ----


def test_errors_say_what_to_do():
    with pytest.raises(TypeError, match=r"expected a model \(nn.Module\), but got dict"):
        lora_ext.accelerate({})
    pipe = SimpleNamespace(scheduler=1, unet=lora_ext.decelerate(net()), vae=nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"SimpleNamespace; give the model .*: pipe\.unet$"):
        lora_ext.accelerate(pipe)
    with pytest.raises(TypeError, match=r"that it holds: pipe\.unet or pipe\.vae$"):
        lora_ext.accelerate(SimpleNamespace(unet=nn.Linear(2, 2), vae=nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="decelerate: expected a model"):
        lora_ext.decelerate(None)
    with pytest.raises(ValueError, match=r"LoRA layers of PEFT.*get_peft_model"):
        lora_ext.accelerate(nn.Linear(2, 2))


def test_peft_is_imported_by_the_first_call_only():
    script = (
        "import sys, lora_ext, torch\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(lora_ext.explain(torch.nn.Linear(2, 2)))\n"
        "assert 'peft' not in sys.modules\n"
        "sys.modules['peft'] = None\n"
        "for function in (lora_ext.accelerate, lora_ext.decelerate):\n"
        "    try: function(torch.nn.Linear(2, 2))\n"
        "    except ImportError as error: assert 'pip install peft' in str(error), error\n"
        "    else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
