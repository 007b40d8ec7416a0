"""Quantised experts without adapters, in a model with adapters on its attention alone: an expert at
a time, by this package, and the module is otherwise its library's."""

import copy

import peft
import pytest
import torch
from expert_helpers import assert_close
from helpers import BF16
from mixture_helpers import logits, randomized, some_ids
from peft_helpers import reasons
from quantised_experts import FOUR_BITS, forms
from test_experts_quantised_apply import calls, experts_of, two_models

import lora_ext

FORMS = forms("stand-in", "int8", "float8 groups")
each_library = pytest.mark.parametrize("form", FORMS[len(FOUR_BITS) - 1 :])  # and one in 4 bits
TARGETS = ["q_proj", "o_proj"]


def of_ours(model):
    return lora_ext.apply_lora(model, lora_ext.LoraConfig(TARGETS, r=3, lora_alpha=6))


def of_peft(model):
    config = peft.LoraConfig(target_modules=TARGETS, r=3, lora_alpha=6)
    return lora_ext.accelerate(peft.get_peft_model(model, config))


LIBRARIES = pytest.mark.parametrize("adapted", [of_ours, of_peft])


def step(model, checkpoints=False):
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    y = logits(model.train())
    y.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
    assert len(found) >= 8
    return found | {"y": y.detach()}


@LIBRARIES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_step_is_that_of_dense_experts(kind, form, adapted):
    packed, dense = (randomized(adapted(model)) for model in two_models(kind, form))
    wanted = step(dense)
    assert_close(step(packed), wanted, 1e-5)
    packed.zero_grad()
    assert_close(step(packed, checkpoints=True), wanted, 1e-5)
    assert calls(packed) == 0
    text = str(lora_ext.explain(packed))
    assert "computed here: 2 " in text and "one dequantised at a time" in text
    assert "computed here" not in str(lora_ext.explain(dense))  # its library's own are as fast


@LIBRARIES
def test_bfloat16(adapted):
    packed, dense = (randomized(adapted(model)) for model in two_models(dtype=BF16))
    assert_close(step(packed), step(dense), 6e-2)
    assert calls(packed) == 0


@each_library
@LIBRARIES
def test_nothing_else_changes(adapted, form):
    model, _ = two_models(form=form)
    before = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    model = adapted(model)
    experts = experts_of(model)
    assert all(map(isinstance, experts, [before[f"model.layers.{i}.mlp.experts"] for i in (0, 1)]))
    assert {type(module).__module__ for module in experts} == {"lora_ext.nn.frozen"}
    own = [key for key in model.state_dict() if "lora_" not in key]
    own = [key.removeprefix("base_model.model.").replace(".base_layer", "") for key in own]
    assert own == keys
    model = lora_ext.unload(model) if adapted is of_ours else lora_ext.decelerate(model).unload()
    after = {name: type(module) for name, module in model.named_modules()}
    assert after == before and list(model.state_dict()) == keys


@each_library
@LIBRARIES
def test_copied_and_compiled(adapted, form):
    model = randomized(adapted(two_models(form=form)[0]))
    with torch.no_grad():
        wanted = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), wanted)
        found = torch.compile(model, backend="aot_eager")(some_ids()).logits
    torch.testing.assert_close(found, wanted)


def test_a_later_adapter_of_peft_wraps_the_librarys_own():
    """PEFT takes one on experts in 4 bits for one without targets."""
    packed, dense = (randomized(of_peft(model)) for model in two_models(form="stand-in"))
    config = peft.LoraConfig(target_parameters=["experts.down_proj"], r=2)
    found = []
    for model in (packed, dense):
        model.add_adapter("other", config)
        model.set_adapter("other")
        randomized(model)
        assert any(path == "fused" for path, _ in reasons(model))
        found.append(logits(model))
    assert {type(m.get_base_layer()).__module__ for m in experts_of(packed)} != {
        "lora_ext.nn.frozen"
    }
    torch.testing.assert_close(*found)


def test_a_later_adapter_of_ours():
    packed, dense = (randomized(of_ours(model)) for model in two_models())
    for model in (packed, dense):
        lora_ext.apply_lora(model, lora_ext.LoraConfig(["experts"], r=2), "other")
        lora_ext.set_adapter(model, "other")
    state = lora_ext.models.lora_state_dict(randomized(packed))
    dense.load_state_dict(state, strict=False)  # their order in the models differs
    torch.testing.assert_close(logits(packed), logits(dense))
    assert calls(packed) == 0
    lora_ext.unload(packed)
    assert {type(module).__module__ for module in experts_of(packed)} != {"lora_ext.nn.frozen"}


def test_a_loaded_adapter(tmp_path):
    packed, dense = (randomized(of_ours(model)) for model in two_models())
    lora_ext.save_adapter(dense, tmp_path)
    wanted = logits(dense)
    packed = lora_ext.unload(packed)
    lora_ext.load_adapter(packed, tmp_path)
    assert {type(module).__module__ for module in experts_of(packed)} == {"lora_ext.nn.frozen"}
    torch.testing.assert_close(logits(packed), wanted)
    assert calls(packed) == 0


def test_what_the_op_does_not_take_is_the_librarys(monkeypatch):
    packed, dense = (randomized(of_peft(model)) for model in two_models())
    for model in (packed, dense):
        model.base_model.model.config._experts_implementation = "another"
    from transformers.integrations import moe

    theirs = moe.ALL_EXPERTS_FUNCTIONS
    monkeypatch.setattr(type(theirs), "get_interface", lambda self, name, own: own)
    torch.testing.assert_close(logits(packed), logits(dense))
    assert calls(packed) > 0 and "computed here" not in str(lora_ext.explain(packed))
