"""An accelerated model is PEFT's model still: state, files, copies, dtypes, errors."""

import copy
import filecmp
import io
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import BF16, F32, F64
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
    layer_model,
    lora_modules,
    make_ids,
    make_x,
    net,
    paths,
    randomize,
    step,
)
from torch import nn
from torch.func import functional_call

import lora_ext

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


def test_load_adapter_into_an_accelerated_model(tmp_path):
    source = net("one", F64)
    randomize(source, seed=8)
    source.save_pretrained(tmp_path)
    model = lora_ext.accelerate(net("dora", F64))
    model.load_adapter(tmp_path / "a", "loaded")
    model.set_adapter("loaded")
    assert set(paths(model).values()) <= FAST
    assert_same_output(model.double(), source)


# ---- copies, other ways to hold the model ----


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_independent(way):
    model = lora_ext.accelerate(net("three", F64))
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert paths(other) == paths(model)
    assert_same_state(other, snapshot(model))
    assert_same_output(other, model)
    y = model(make_ids()).detach()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(make_ids()), y)


def test_without_a_peft_model_around_it():
    base = Net().double()
    model = inject_adapter_in_model(LoraConfig(target_modules=TARGETS, r=3), base, "a")
    model = randomize(model.double())
    assert_same_output(accelerated(model), model)
    assert set(paths(accelerated(model)).values()) <= FAST
    assert {layer.path for layer in lora_ext.explain(accelerated(model).up)} <= FAST


def test_functional_call_uses_what_it_is_given():
    model = net("one", F64)
    fast = accelerated(model)
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    wanted = functional_call(model, others, (make_ids(),))
    torch.testing.assert_close(functional_call(fast, others, (make_ids(),)), wanted)


def test_casting_and_moving():
    model = accelerated(net("one"))
    for dtype in (BF16, F64, F32):
        model.to(dtype)
        assert set(paths(model).values()) <= FAST
        assert model(make_ids()).dtype == dtype
    meta = copy.deepcopy(model).to("meta")
    assert meta(make_ids().to("meta")).is_meta


# ---- bad input ----


def test_errors_say_what_to_do():
    with pytest.raises(TypeError, match=r"expected a model \(nn.Module\), but got dict"):
        lora_ext.accelerate({})
    with pytest.raises(TypeError, match="decelerate: expected a model"):
        lora_ext.decelerate(None)
    with pytest.raises(ValueError, match=r"LoRA layers of PEFT.*get_peft_model"):
        lora_ext.accelerate(nn.Linear(2, 2))


@pytest.mark.parametrize("make", [lambda x: x[..., :7], lambda x: x.half(), lambda x: x.long()])
def test_a_wrong_x_gives_pefts_error_or_ours(make):
    model = layer_model("linear")
    fast, x = accelerated(model), make(make_x("linear"))
    for one in (model, fast):
        with pytest.raises((RuntimeError, TypeError)):
            one(x)
    assert torch.isfinite(fast(make_x("linear"))).all()


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
