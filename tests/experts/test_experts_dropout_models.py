"""Dropout on experts in models: accelerate(model, expert_dropout=p) and apply_lora."""

import copy
import itertools
import json

import peft
import pytest
import torch
from expert_helpers import BY_PRODUCTS, make_routes, run
from expert_helpers import mixture as small
from mixture_helpers import edit, logits, mixture, peft_mixture, randomized, some_ids
from peft.tuners.lora.layer import ParamWrapper
from peft_helpers import accelerated, reasons
from torch import nn

import lora_ext
from lora_ext import LoraConfig, apply_lora
from lora_ext.experts import layer
from lora_ext.nn import LoRAExperts

P = 0.3
TWO = {"x": {"r": 3, "lora_alpha": 5}, "y": {"r": 2, "lora_alpha": -3}}


def dropping(model, p=P):
    """An accelerated copy in training with dropout."""
    return lora_ext.accelerate(copy.deepcopy(model), expert_dropout=p).train()


def ours(config_p=P):
    """A mixture of ours in training."""
    return randomized(
        apply_lora(mixture(), LoraConfig("experts", r=3, lora_dropout=config_p))
    ).train()


MODELS = {
    "PEFT": (lambda: dropping(small()), lambda m: m(*make_routes(9))),
    "PEFT, norm": (lambda: dropping(small("norm")), lambda m: m(*make_routes(9))),
    "ours": (ours, logits),
}


@pytest.mark.parametrize("name", MODELS)
def test_in_training_alone_and_by_the_generator(name):
    make, call = MODELS[name]
    model = make()
    torch.manual_seed(0)
    first, second = call(model), call(model)
    torch.manual_seed(0)
    assert torch.equal(call(model), first) and not torch.equal(second, first)
    state = torch.get_rng_state()
    model.eval()
    plain = call(model)
    assert torch.equal(call(model), plain) and torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(first, plain)


def test_without_dropout_it_is_the_model_without():
    model = small()
    wanted = run(accelerated(model), *make_routes(9))
    for other in (dropping(model).eval(), dropping(model, 0), dropping(model, 0.0)):
        found = run(other, *make_routes(9))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_peft_and_ours_are_the_same_layer(tmp_path, monkeypatch):
    """By the same seeds, with the same factors."""
    model = peft_mixture(target_modules=[])
    model.save_pretrained(tmp_path)
    edit(tmp_path, lora_dropout=P)
    own = lora_ext.load_adapter(mixture(), tmp_path, trainable=True)
    theirs = dropping(model)
    for one in (theirs, own):
        seeds = itertools.count()
        monkeypatch.setattr(layer, "draw_seed", lambda device, s=seeds: torch.tensor(next(s)))
        one.train()
        one.found = logits(one)
    torch.testing.assert_close(own.found, theirs.found)
    assert not torch.allclose(own.found, logits(own.eval()))


def test_a_qwen3_moe_of_peft_trains():
    model = lora_ext.accelerate(
        peft_mixture(dtype=torch.float32, target_modules="all-linear"), expert_dropout=0.05
    ).train()
    experts = [e for e in lora_ext.explain(model) if e.name.endswith("experts")]
    assert len(experts) == 2 and all(each.path == "fused" for each in experts)
    ids, trained = some_ids(), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 3e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


# ---- PEFT's verbs ----


def test_a_compiled_model_has_the_probability_of_now(forget_graphs, counter):
    model = accelerated(small())
    compiled = torch.compile(model.base_model.model.train(), backend=counter, fullgraph=True)
    operands = make_routes(9)
    without = compiled(*operands)
    lora_ext.accelerate(model, expert_dropout=P)
    assert not torch.allclose(compiled(*operands), without)
    lora_ext.accelerate(model, expert_dropout=0)
    assert torch.equal(compiled(*operands), without)


def test_the_probability_stays_and_goes():
    model = accelerated(small())
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]

    def probabilities():
        return [wrapper.__dict__.get("expert_dropout") for wrapper in wrappers]

    assert probabilities() == [None, None]
    lora_ext.accelerate(model, expert_dropout=P)
    assert probabilities() == [P, P]
    assert reasons(model.train()) == {
        ("fused", f"{BY_PRODUCTS}, updates of down_proj, gate_up_proj, dropout {P}")
    }
    lora_ext.accelerate(model)
    assert probabilities() == [P, P]
    lora_ext.accelerate(model, expert_dropout=0)
    assert probabilities() == [0, 0]
    lora_ext.accelerate(model, expert_dropout=P)
    with pytest.warns(
        UserWarning, match=rf"needs it again: .*accelerate\(model, expert_dropout={P}\)"
    ):
        lora_ext.decelerate(model)
    assert probabilities() == [None, None]
    operands = make_routes(9)
    assert torch.equal(model(*operands), model(*operands))


def test_adapters_that_are_added_later_have_it():
    """On the same experts, and on others of the model; PEFT has one set of parameters at a time."""
    first, second = "layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj"

    def config(*names):
        return peft.LoraConfig(r=2, target_modules=[], target_parameters=list(names))

    model = lora_ext.accelerate(peft.get_peft_model(mixture(), config(first)), expert_dropout=P)
    model.delete_adapter("default")
    model.add_adapter("x", config(first, second))
    model.set_adapter("x")
    randomized(model).train()
    texts = [each.reason for each in lora_ext.explain(model)]
    assert [f", dropout {P}" in text for text in texts] == [True, True]
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("verb", ["merge", "disable"])
def test_a_model_that_adds_nothing_draws_nothing(verb):
    model = dropping(small("plain", TWO))
    model.merge_adapter() if verb == "merge" else model.base_model.disable_adapter_layers()
    assert torch.equal(model(*make_routes(9)), model(*make_routes(9)))


# ---- ours ----


def test_files_have_none_since_peft_refuses_it(tmp_path):
    model = ours()
    with pytest.warns(UserWarning, match=r'put "lora_dropout": 0.3 into adapter_config.json'):
        lora_ext.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
    theirs = peft.PeftModel.from_pretrained(mixture(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model.eval()))
    edit(tmp_path, lora_dropout=P)
    again = lora_ext.load_adapter(mixture(), tmp_path, trainable=True).train()
    found = {
        spec.lora_dropout
        for experts in again.modules()
        if isinstance(experts, LoRAExperts)
        for each in experts.layers()
        for spec in each.adapters.values()
    }
    assert found == {P} and not torch.equal(logits(again), logits(again))


def test_merging_leaves_it_out():
    model = ours()
    plain = logits(model.eval())
    lora_ext.merge_adapter(model.train())
    torch.testing.assert_close(logits(model), plain)
    assert torch.equal(logits(model), logits(model))


# ---- what is refused ----


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan"), "0.1", True])
def test_what_is_no_probability(p):
    model = small()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"accelerate: expected expert_dropout in \[0, 1\), but"):
        lora_ext.accelerate(model, expert_dropout=p)
    with pytest.raises(ValueError, match=r"expected lora_dropout in \[0, 1\), but got"):
        LoraConfig("experts", lora_dropout=p)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("targets", [{"target_modules": ["q_proj"]}, {"router": True}], ids=str)
def test_a_model_without_adapters_on_experts(targets):
    words = {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    config = peft.LoraConfig(r=2, **(words if "router" in targets else targets))
    model = peft.get_peft_model(mixture(), config)
    message = "adapters on the experts .* expert_dropout=0.3, but got a PeftModel .*leave expert_"
    with pytest.raises(ValueError, match=message):
        lora_ext.accelerate(model, expert_dropout=P)
    lora_ext.accelerate(model, expert_dropout=0)


def test_experts_that_need_pefts_forward():
    """Never without dropout in silence: neither from the start nor by what is done later."""
    model = small()
    hook = model.base_model.model.experts.get_base_layer().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model\.experts' needs PEFT's own .* have hooks; leave"):
        lora_ext.accelerate(model, expert_dropout=P)
    hook.remove()
    model, operands = dropping(model), make_routes(9)
    model.base_model.model.experts.get_base_layer().register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"the experts have hooks; call model\.eval"):
        model(*operands)
    plain = model.eval()(*operands)
    lora_ext.accelerate(model.train(), expert_dropout=0)
    assert torch.equal(model(*operands), plain)


def test_of_ours_that_need_transformers_forward():
    model = ours()
    model.model.layers[1].mlp.experts.gate_up_proj.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"dropout 0\.3 in training, .* weights are trained; c"):
        logits(model)
    logits(model.eval())


def test_a_router_has_none():
    model = mixture()
    types = [type(m) for m in model.modules()]
    message = (
        r"dropout 0 for an adapter on a parameter of a Qwen3MoeTopKRouter, .*set lora_dropout=0"
    )
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoraConfig(["all-linear", "mlp.gate"], lora_dropout=0.1))
    assert [type(m) for m in model.modules()] == types
    assert isinstance(apply_lora(model, LoraConfig("all-linear", lora_dropout=0.1)), nn.Module)
