"""PEFT's models under this library's verbs, and bound methods that outlive `decelerate`."""

import copy

import pytest
import torch
from peft.helpers import DoraCaching
from peft_helpers import layer_model, make_ids, make_x, net

import lora_ext

VERBS = {
    "set_adapter": lambda m: lora_ext.set_adapter(m, "a"),
    "delete_adapter": lambda m: lora_ext.delete_adapter(m, "a"),
    "merge_adapter": lora_ext.merge_adapter,
    "unmerge_adapter": lora_ext.unmerge_adapter,
    "disable_adapter": lambda m: lora_ext.disable_adapter(m).__enter__(),
    "merge_and_unload": lora_ext.merge_and_unload,
    "unload": lora_ext.unload,
    "lora_state_dict": lora_ext.models.lora_state_dict,
    "mark_only_lora_as_trainable": lora_ext.models.mark_only_lora_as_trainable,
    "save_adapter": lambda m: lora_ext.save_adapter(m, "/nowhere"),
    "load_adapter": lambda m: lora_ext.load_adapter(m, "/nowhere"),
    "apply_lora": lambda m: lora_ext.apply_lora(m, lora_ext.LoraConfig("up")),
}


@pytest.mark.parametrize("is_accelerated", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_names_the_method_of_peft(verb, is_accelerated):
    model = net()
    if is_accelerated:
        lora_ext.accelerate(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=rf"lora_ext\.(models\.)?{verb}: expected .* PEFT's own methods.*: "
    ):
        VERBS[verb](model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_bound_forward_outlives_decelerate(kind):
    """accelerate's add_hook_to_module keeps one and calls it instead of the class's."""
    model = layer_model(kind, "three")
    x = make_x(kind)
    wanted = model(x)
    lora_ext.accelerate(model)
    layer = model.base_model.model[0]
    kept = layer.forward
    layer.forward = lambda *args, **kwargs: kept(*args, **kwargs)
    lora_ext.decelerate(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))


# ---- PEFT's cache of DoRA's norms ----


def caches(model):
    return [m._dora_cache for m in model.modules() if hasattr(m, "_dora_cache")]


@pytest.fixture
def no_caching():
    yield
    DoraCaching()(enabled=False)


def test_the_cache_of_dora_is_filled_used_and_cleared(no_caching, monkeypatch):
    model = lora_ext.accelerate(net("dora")).eval()
    ids = make_ids()
    wanted = model(ids)
    assert caches(model)
    assert not any(caches(model))
    computed = []
    from lora_ext.peft import dora

    real = dora.weight_norm
    monkeypatch.setattr(dora, "weight_norm", lambda *args: computed.append(1) or real(*args))
    with DoraCaching():
        first = model(ids)
        assert all(caches(model))
        count = len(computed)
        assert count == len(caches(model))
        assert torch.equal(model(ids), first)
        assert len(computed) == count
    torch.testing.assert_close(first, wanted, rtol=1e-6, atol=1e-6)
    model(ids)
    assert not any(caches(model))
    DoraCaching()(enabled=True)
    model.train()
    model(ids)
    assert not any(caches(model))


def test_cached_dora_has_the_gradients_of_dora(no_caching):
    model = lora_ext.accelerate(net("dora", torch.float64)).eval()
    grads = []
    for _ in range(2):
        model.zero_grad()
        with DoraCaching():
            model(make_ids()).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    model.zero_grad()
    model(make_ids()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[1][name], parameter.grad)


def test_accelerated_again_after_caching(no_caching):
    model = net("dora", torch.float64).eval()
    with DoraCaching():
        wanted = model(make_ids())
        lora_ext.accelerate(model)
        torch.testing.assert_close(model(make_ids()), wanted)
        lora_ext.decelerate(model)
        torch.testing.assert_close(model(make_ids()), wanted)
