"""apply_lora on mixtures: which parameters get adapters, and what the model's verbs do to them."""

import copy
import pickle

import peft
import pytest
import torch
from mixture_helpers import KINDS, logits, mixture, randomized
from torch import nn

import lora_ext
from lora_ext import LoraConfig, apply_lora
from lora_ext.models import lora_layers
from lora_ext.nn import LoRAExperts, LoRAParameter
from lora_ext.versions import TOO_OLD

LAYERS = [f"model.layers.{i}" for i in range(2)]
ATTENTION = [f"{n}_proj" for n in "qkvo"]


def chosen(model, *targets, **words):
    """{parameter of layer 0: (r, alpha)} that a config chooses."""
    apply_lora(model, LoraConfig(targets, r=3, lora_alpha=6, **words))
    return {
        layer.name_at(path).removeprefix("model.layers.0.mlp."): (spec.r, spec.lora_alpha)
        for path, layer in lora_layers(model)
        for spec in layer.adapters.values()
        if isinstance(layer, LoRAParameter) and ".0." in path
    }


UP, DOWN = {"experts.gate_up_proj": (6, 12)}, {"experts.down_proj": (3, 6)}


@pytest.mark.parametrize(
    ("targets", "words", "expected"),
    [
        (["all-linear"], {}, UP | DOWN),
        (["experts"], {}, UP | DOWN),
        (["re:.*mlp.*"], {}, UP | DOWN),
        (["*experts"], {}, UP | DOWN),
        (["experts.gate_up_proj"], {}, {"experts.gate_up_proj": (3, 6)}),
        (["experts.down_proj", "q_proj"], {}, DOWN),
        (["all-linear"], {"exclude_modules": "experts"}, {}),
        (["all-linear"], {"exclude_modules": "experts.down_proj"}, UP),
        (["all-linear"], {"exclude_modules": "mlp"}, UP | DOWN),  # a name is a path's end
        (["all-linear"], {"exclude_modules": "*.mlp.*"}, {}),
        (
            ["all-linear"],
            {"rank_pattern": {"experts.*": 2}},
            {"experts.gate_up_proj": (2, 12), "experts.down_proj": (2, 6)},
        ),
        (
            ["all-linear"],
            {"alpha_pattern": {"gate_up_proj": 5}},
            {"experts.gate_up_proj": (6, 5)} | DOWN,
        ),
        (["all-linear", "mlp.gate"], {}, UP | DOWN | {"gate.weight": (3, 6)}),
        (["gate.weight"], {}, {"gate.weight": (3, 6)}),
        (["q_proj"], {}, {}),
        (["*_proj"], {}, {}),
    ],
    ids=str,
)
def test_what_is_chosen(targets, words, expected):
    assert chosen(mixture(), *targets, **words) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_reaches_the_experts_of(kind):
    model = mixture(kind)
    before, keys = logits(model), list(model.state_dict())
    apply_lora(model, LoraConfig("all-linear", r=3))
    experts = [m for m in model.modules() if isinstance(m, LoRAExperts)]
    assert len(experts) == 2
    assert all(len(layer.adapters) == 1 for each in experts for layer in each.layers())
    assert torch.equal(logits(model), before)
    assert set(keys) <= set(model.state_dict())
    randomized(model)
    logits(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_as_many_parameters_as_peft_without_the_router():
    theirs = peft.get_peft_model(mixture(), peft.LoraConfig(r=3, target_modules="all-linear"))
    router = sum(p.numel() for n, p in theirs.named_parameters() if ".gate.lora" in n)
    model = apply_lora(mixture(), LoraConfig("all-linear", r=3))
    count = lora_ext.models.trainable_parameters(model)
    assert count.trainable == theirs.get_nb_trainable_parameters()[0] - router
    assert count.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"lora_bias": True}, "no lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights True or 'gaussian'"),
        ({"r": 300}, "r of 1 to 256 for the experts' .*gate_up_proj, .* rank 2 r, but got r=300;"),
    ],
    ids=str,
)
def test_what_is_not_supported_says_what_to_do(words, message):
    model = mixture()
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoraConfig("all-linear", **words))
    assert [type(m) for m in model.modules()] == types
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: setattr(e, "_is_expert_parallel", True), "expert parallel; exclude_modules"),
        (lambda e: e.to(torch.float8_e4m3fn), "that are not quantised, but got"),
        (lambda e: setattr(e, "forward", e.forward), "its forward was replaced"),
        (
            lambda e: nn.utils.parametrize.register_parametrization(e, "down_proj", nn.Identity()),
            "are computed; leave the module out by exclude_modules",
        ),
    ],
)
def test_experts_that_cannot_have_adapters_are_refused(change, message):
    model = mixture(num_hidden_layers=1)
    change(model.model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoraConfig("all-linear"))
    apply_lora(model, LoraConfig("all-linear", exclude_modules=["experts"]))


def test_experts_of_another_layout_are_not_left_out_in_silence(monkeypatch):
    model = mixture(num_hidden_layers=1)
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.zeros(5, 16, 24))
    experts.__class__ = type("OtherExperts", (nn.Module,), {})
    model.others = experts
    words = r"leaves out the experts of \['OtherExperts'\]: transformers' use_experts_implem"
    with pytest.warns(UserWarning, match=words):
        apply_lora(copy.deepcopy(model), LoraConfig("all-linear"))
    experts.__class__, model.experts = (
        type("Stacks", (nn.Module,), {}),
        model._modules.pop("others"),
    )
    model.expert_conv = nn.Conv1d(4, 4, 3)  # no stack of experts
    monkeypatch.setitem(TOO_OLD, "transformers", "expected transformers 5.0")
    with pytest.warns(UserWarning, match=r"experts of \['Stacks'\]: expected transformers 5.0$"):
        apply_lora(copy.deepcopy(model), LoraConfig("all-linear"))
    with pytest.warns(UserWarning, match=r"AdapterPool: .* leaves out .* \['Stacks'\]"):
        lora_ext.AdapterPool(model, 2, 4)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_packed_experts_are_not_left_out_in_silence(is_loaded):
    """gpt-oss as it is on disk; its loaded stacks are no tensors of torch."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model = mixture("gpt_oss", num_hidden_layers=1)
    experts = model.model.layers[0].mlp.experts = mxfp4.Mxfp4GptOssExperts(model.config)
    if experts.down_proj.dim() <= 3:  # of an older transformers four, which PEFT itself refuses
        packed = peft.LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
        packed = peft.get_peft_model(copy.deepcopy(model), packed)
        words = "since PEFT sizes .* but got 1 such as .*mlp.experts'"
        with pytest.warns(UserWarning, match=words):
            lora_ext.accelerate(packed)
        assert "packed in MXFP4; load the model with config=" in str(lora_ext.explain(packed))
    if is_loaded:
        for name in ("gate_up_proj", "down_proj"):
            del experts._parameters[name]
            setattr(experts, name, None)
    words = r"of 'model.layers.0.mlp.experts', a Mxfp4.* in MXFP4; load .*; exclude_modules="
    with pytest.raises(ValueError, match=words):
        apply_lora(model, LoraConfig("all-linear"))
    with pytest.raises(ValueError, match=words):
        lora_ext.AdapterPool(model, 2, 4)
    apply_lora(model, LoraConfig("all-linear", exclude_modules=["experts"]))


def test_experts_of_the_oldest_transformers_are_not_left_out():
    """Its decorator sets less on instances."""
    models = [mixture(num_hidden_layers=1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for name in ("has_gate", "is_concatenated", "_is_expert_parallel", "has_post_expert_norm"):
        models[1].model.layers[0].mlp.experts.__dict__.pop(name, None)
    paths = []
    for model in models:
        torch.manual_seed(1)
        apply_lora(model, LoraConfig("all-linear", r=2))
        paths.append([path for path, _ in lora_layers(model)])
    assert paths[0] == paths[1] and any("experts" in path for path in paths[0])
    ids = torch.arange(12)[None]
    assert torch.equal(*(model(input_ids=ids).logits for model in models))


def two_adapters(kind="gpt_oss"):
    model = apply_lora(mixture(kind), LoraConfig("all-linear", r=3, lora_alpha=6))
    apply_lora(model, LoraConfig(["experts", "router"], r=2, use_rslora=True), "second")
    return randomized(model)


def test_adapters_are_switched_and_add_up():
    """The sum of two is the layer with both products in its weights."""
    model, base = two_adapters(), mixture("gpt_oss")
    for names in (["default"], ["second"], ["default", "second"], []):
        lora_ext.set_adapter(model, names)
        by_hand = copy.deepcopy(base)
        for path, layer in lora_layers(model):
            delta = 0
            for name in layer.active_adapters:
                lora_a, lora_b = layer.factors(name)
                if isinstance(layer, LoRAParameter):
                    count = layer.count
                    a = lora_a.view(count, -1, lora_a.shape[1])
                    b = lora_b.view(len(lora_b), -1, count)
                    delta = delta + layer.adapters[name].scaling * torch.einsum(
                        "ore,eri->eoi", b, a
                    )
                else:
                    delta = delta + layer.adapters[name].scaling * lora_b @ lora_a
            is_parameter = isinstance(layer, LoRAParameter)
            target = by_hand.get_parameter(
                layer.name_at(path) if is_parameter else f"{path}.weight"
            )
            if torch.is_tensor(delta):
                is_stack = is_parameter and layer.transposed
                target.data += (delta.transpose(1, 2) if is_stack else delta).view(target.shape)
        torch.testing.assert_close(logits(model), logits(by_hand))
        trained = {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == set(names)


def test_merging_disabling_and_taking_out():
    model, base = two_adapters(), mixture("gpt_oss")
    plain, keys = logits(base), list(base.state_dict())
    lora_ext.set_adapter(model, ["default", "second"])
    both = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), both)
        assert all(
            each.module is m
            for m in copied.modules()
            if isinstance(m, LoRAExperts)
            for each in m.layers()
        )
    lora_ext.merge_adapter(model, "second")  # the other is added still
    torch.testing.assert_close(logits(model), both)
    lora_ext.merge_adapter(model)
    assert {each.path for each in lora_ext.explain(model)} <= {"merged", "base"}
    torch.testing.assert_close(logits(model), both)
    with lora_ext.disable_adapter(model):
        assert torch.equal(logits(model), plain)
    lora_ext.unmerge_adapter(model)
    assert torch.equal(logits(model), both)
    merged = lora_ext.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), both)
    lora_ext.delete_adapter(model, "default")
    lora_ext.unload(model)
    assert torch.equal(logits(model), plain)
    for each in (merged, model):
        assert list(each.state_dict()) == keys
        assert [type(m) for m in each.modules()] == [type(m) for m in base.modules()]


def test_the_state_dict_has_what_is_trained():
    model = apply_lora(mixture(num_hidden_layers=1), LoraConfig("experts", r=2))
    found = lora_ext.models.lora_state_dict(model)
    at = "model.layers.0.mlp.experts.lora."
    shapes = {key.removeprefix(at): tuple(value.shape) for key, value in found.items()}
    assert shapes == {
        "gate_up_proj.lora_a.default": (20, 16),
        "gate_up_proj.lora_b.default": (24, 20),
        "down_proj.lora_a.default": (10, 12),
        "down_proj.lora_b.default": (16, 10),
    }
    names = {group["name"] for group in lora_ext.models.lora_plus_groups(model, 1e-3)}
    assert names == {"lora_a", "lora_b"}


def test_explain_says_which_forward_experts_take():
    model = apply_lora(mixture(), LoraConfig("experts"))
    assert {each.path for each in lora_ext.explain(model)} == {"fused"}
    model.model.layers[0].mlp.experts.gate_up_proj.requires_grad_(True)
    text = str(lora_ext.explain(model))
    assert "weights are trained: transformers' forward with W + scaling B A" in text


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_any_implementation_of_transformers_is_the_same(implementation):
    model = randomized(apply_lora(mixture(dtype=torch.float32), LoraConfig("all-linear", r=3)))
    expected = logits(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), expected)
    with lora_ext.disable_adapter(model):
        torch.testing.assert_close(logits(model), logits(mixture(dtype=torch.float32)))


def test_an_adapter_of_attention_leaves_experts_as_they_were(tmp_path):
    model = apply_lora(mixture(), LoraConfig("all-linear", r=2))
    apply_lora(model, LoraConfig("q_proj", r=2), "attention")
    plain, model = mixture(), randomized(model)
    with lora_ext.use_adapters(model, ["attention", None]):
        torch.testing.assert_close(logits(model)[1], logits(plain)[1])
    pool = lora_ext.AdapterPool(plain, 2, 4, exclude_modules=["experts"])
    assert len(pool.layers) == 8
    lora_ext.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"pool's layers.*experts.gate_up_proj' too"):
        pool.add_adapter("default", tmp_path)
