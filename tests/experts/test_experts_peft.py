"""Experts in models of PEFT: its verbs, the chain of wrappers, routers, and what PEFT computes."""

import copy
import filecmp

import peft
import pytest
import quantised_experts
import torch
from accelerate import hooks
from expert_helpers import (
    BY_PRODUCTS,
    HIDDEN,
    INNER,
    Mixture,
    assert_close,
    both,
    make_experts,
    make_routes,
    mixture,
    run,
)
from helpers import BF16, F32, F64
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft_helpers import accelerated, randomize, reasons
from torch import nn

import lora_ext
from lora_ext.experts import decorated

BIASES = "transposed, biases, interleaved"
TWO = {"x": {"r": 3, "lora_alpha": 5}, "y": {"r": 2, "lora_alpha": -3, "use_rslora": True}}
FUSED = {("fused", f"{BY_PRODUCTS}, updates of down_proj, gate_up_proj")}


def assert_same(model, other, tolerance=1e-11):
    assert_close(run(model, *make_routes(9)), run(other, *make_routes(9)), tolerance)


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def experts_of(model):
    return wrappers(model)[0].get_base_layer()


# ---- PEFT's verbs ----

VERBS = {
    "switch": lambda model: model.set_adapter("y"),
    "delete": lambda model: model.delete_adapter("x"),
    "merge": lambda model: model.merge_adapter(),
    "merge one": lambda model: model.merge_adapter(["y"]),
    "merge and unmerge": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "add": lambda model: (
        model.add_adapter("z", LoraConfig(r=1, **targets_of(model)), autocast_adapter_dtype=False),
        model.double(),
        model.set_adapter("z"),
        randomize(model),
    ),
    "scale": lambda model: [wrapper.set_scale("x", 3.0) for wrapper in wrappers(model)],
    "convert to half and back": lambda model: model.bfloat16().double(),
}


def targets_of(model):
    names = [f"experts.{name}" for name in both(experts_of(model))]
    return {"target_parameters": names, "target_modules": []}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_before_and_after(verb):
    """Done to an accelerated model they are what they are without, whichever comes first."""
    model = mixture("plain", TWO)
    fast = accelerated(model)
    run(fast, *make_routes(9))
    for one in (model, fast):
        VERBS[verb](one)
    assert_same(fast, model)
    assert_same(accelerated(model), model)
    assert_same(lora_ext.decelerate(fast), model)


@pytest.mark.parametrize("merge", [True, False])
def test_unload(merge):
    model = mixture("transposed, biases, interleaved", TWO)
    fast = accelerated(model)
    bases = [one.merge_and_unload() if merge else one.unload() for one in (model, fast)]
    with torch.no_grad():
        torch.testing.assert_close(*(base(*make_routes(9)) for base in bases))


def test_files_are_the_same_bytes(tmp_path):
    model = mixture("plain", TWO)
    model.save_pretrained(tmp_path / "peft")
    fast = accelerated(model)
    run(fast, *make_routes(9))
    fast.save_pretrained(tmp_path / "ours")
    name = "x/adapter_model.safetensors"
    assert filecmp.cmp(tmp_path / "peft" / name, tmp_path / "ours" / name, shallow=False)


def test_hot_swap(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    other = mixture("plain", {"x": {"r": 3, "lora_alpha": 7}})
    for wrapper in wrappers(other):
        nn.init.normal_(wrapper.lora_B["x"].weight)
    other.save_pretrained(tmp_path)
    model = mixture("plain")
    fast = accelerated(model)
    before = run(fast, *make_routes(9))["y"]
    for one in (model, fast):
        hotswap_adapter(one, tmp_path / "x", "x")
    assert not torch.equal(run(fast, *make_routes(9))["y"], before)
    assert_same(fast, model)


def test_rank_pattern():
    """The two parameters may differ in rank."""
    words = {"r": 3, "rank_pattern": {".*gate_up_proj": 6}}
    model = mixture("plain", {"x": words})
    assert {wrapper.r["x"] for wrapper in wrappers(model)} == {3, 6}
    assert_same(accelerated(model), model)


# ---- the chain ----


def test_the_outermost_wrapper_stands_for_all():
    model = mixture()
    assert reasons(model) == {("peft", "not accelerated; call lora_ext.accelerate(model)")}
    fast = accelerated(model)
    assert [type(wrapper) is ParamWrapper for wrapper in wrappers(fast)] == [False, True]
    assert reasons(fast) == FUSED and len(lora_ext.explain(fast)) == 1
    assert [type(each) for each in wrappers(lora_ext.decelerate(fast))] == [ParamWrapper] * 2
    assert_same(copy.deepcopy(accelerated(model)), model)


def test_wrappers_of_one_chain_may_differ():
    """One is merged, the other not; or is disabled."""
    model = mixture()
    outer, inner = wrappers(model)
    inner.merge()
    assert_same(accelerated(model), model)
    outer.enable_adapters(False)
    assert_same(accelerated(model), model)
    inner.unmerge()
    assert_same(accelerated(model), model)


@pytest.mark.parametrize("order", [("x", "index", "weights"), ("weights", "x", "index")])
def test_arguments_by_name(order):
    model = mixture()
    fast, operands = accelerated(model), make_routes(9)
    names = dict(zip(("x", "index", "weights"), operands, strict=True))
    theirs = {"x": "hidden_states", "index": "top_k_index", "weights": "top_k_weights"}
    x = names.pop("x")
    words = {theirs[name]: names[name] for name in order if name in names}
    assert torch.equal(fast.base_model.model.experts(x, **words), fast(*operands))


# ---- what PEFT computes ----


class Overridden(type(make_experts("plain"))):
    def forward(self, *operands):
        return super().forward(*operands) * 2


def to_overridden(experts):
    experts.__class__ = Overridden


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


REASONS = {
    "the module is not one of transformers' use_experts_implementation": to_overridden,
    "the experts' forward was replaced, as by an offload hook": lambda experts: setattr(
        experts, "forward", experts.forward
    ),
    "the experts have hooks": lambda experts: experts.register_forward_hook(lambda _, __, y: y + 1),
    "the experts are split over processes": lambda experts: setattr(
        experts, "_is_expert_parallel", True
    ),
    "the experts' implementation is not one of transformers' own": lambda experts: setattr(
        experts.config, "_experts_implementation", "registered"
    ),
    "the module has parametrizations": lambda experts: (
        nn.utils.parametrize.register_parametrization(experts, "act", Doubled())
    ),
    "the experts' weights are trained": lambda experts: experts.down_proj.requires_grad_(),
}


# Release -> what its decorator does not set on instances, for experts that are not as by default.
LACKS = {
    "5.0": ("has_gate", "is_concatenated", "_is_expert_parallel", "has_post_expert_norm"),
    "5.17": ("_is_expert_parallel", "has_post_expert_norm"),
    "5.19": ("has_post_expert_norm",),
}


@pytest.mark.parametrize("kind", ["plain", "transposed, biases, interleaved"])
@pytest.mark.parametrize("release", LACKS)
def test_experts_of_older_releases(release, kind):
    model = mixture(kind)
    stated = experts_of(model).is_concatenated
    for name in LACKS[release]:
        experts_of(model).__dict__.pop(name, None)
    assert decorated.is_concatenated(experts_of(model)) == stated
    fast, operands = accelerated(model), make_routes(9)
    assert {path for path, _ in reasons(fast)} == {"fused"}
    assert_close(run(fast, *operands), run(model, *operands), 1e-11)
    if release != "5.19":  # before 5.18 a plan of tensor parallelism alone tells of parallel ones
        experts_of(fast)._hf_tp_plan = "moe_tp_experts"
        assert reasons(fast) == {("peft", "the experts are split over processes")}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_for_pefts_forward(reason, monkeypatch):
    from transformers.integrations import moe

    registered = {"registered": lambda *operands: moe.grouped_mm_experts_forward(*operands) * 3}
    monkeypatch.setattr(moe.ALL_EXPERTS_FUNCTIONS, "_local_mapping", registered)
    model = mixture(dtype=F32)
    experts_of(model).act = nn.Parameter(torch.ones(1))
    REASONS[reason](experts_of(model))
    fast = accelerated(model)
    assert reasons(fast) == {("peft", reason)}
    operands = make_routes(9, dtype=F32)
    found, exact = run(fast, *operands), run(model, *operands)
    assert all(torch.equal(found[name], exact[name]) for name in exact)


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias"])
def test_trained_biases_have_pefts_gradient(name):
    model = mixture(BIASES, dtype=F32)
    experts_of(model).get_parameter(name).requires_grad_()
    fast = accelerated(model)
    assert reasons(fast) == {("peft", "the experts' biases are trained")}
    found, exact = (run(one, *make_routes(9, dtype=F32)) for one in (fast, model))
    assert any(name in each for each in exact)
    assert all(torch.equal(found[each], exact[each]) for each in exact)


def test_hooks_that_replace_the_forward_of_wrappers(monkeypatch):
    """After accelerate: of the outermost they call ours, of an inner one PEFT's has to run."""
    calls, theirs = [], ParamWrapper.forward
    fast, operands = accelerated(mixture()), make_routes(9)
    wanted, (outer, inner) = fast(*operands), wrappers(fast)
    monkeypatch.setattr(
        ParamWrapper, "forward", lambda *args, **words: calls.append(1) or theirs(*args, **words)
    )
    hooks.add_hook_to_module(outer, hooks.ModelHook())
    assert torch.equal(fast(*operands), wanted) and calls == [] and reasons(fast) == FUSED
    lora_ext.decelerate(fast)(*operands)
    assert len(calls) == 2
    lora_ext.accelerate(hooks.remove_hook_from_module(fast, recurse=True))
    hooks.add_hook_to_module(inner, hooks.ModelHook())
    why = "PEFT's wrapper of another parameter of the module has hooks"
    assert reasons(fast) == {("peft", why)}
    torch.testing.assert_close(fast(*operands), wanted)
    assert len(calls) == 4


# Releases of PEFT that leave one adapter's update on a stack with a parametrization of its own.
LEAVES_UPDATES = {"0.21.0", "0.21.1", "0.21.2"}


@pytest.mark.parametrize("adapters", [None, TWO], ids=["one", "two"])
def test_pefts_bug_on_stacks_with_a_parametrization(adapters):
    """Such as experts in 4 bits. PEFT 0.21's `_remove_parametrizations` looks for a
    _LoraParameterProxy, but the update of one adapter is a _LoraFactorsProxy: it stays, and each
    forward adds it once more, to what `explain` says. (The release before has no such class.)"""
    model = mixture("plain", adapters, names=["down_proj"])
    nn.utils.parametrize.register_parametrization(experts_of(model), "down_proj", Doubled())
    fast, operands = accelerated(model), make_routes(9)
    is_left = peft.__version__ in LEAVES_UPDATES and adapters is None
    for one in (model, fast):
        with torch.no_grad():
            first, second = one(*operands), one(*operands)
        assert torch.equal(first, second) != is_left
        assert len(experts_of(one).parametrizations["down_proj"]) == (3 if is_left else 1)
    assert torch.equal(fast(*operands), model(*operands))
    ((path, reason),) = reasons(fast)
    assert path == "peft" and reason.startswith("the module has parametrizations")
    assert ("adds the update once more in each forward" in reason) == is_left


def test_a_bias_with_adapters_is_pefts():
    model = mixture("transposed, biases, interleaved", names=["gate_up_proj", "down_proj_bias"])
    reason = "a parameter other than the experts' weights has adapters"
    assert reasons(accelerated(model)) == {("peft", reason)}
    assert_same(accelerated(model), model)


def test_a_module_that_is_not_of_experts():
    """Of a parameter of 3 dimensions in somebody's own module."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN, dtype=F64))

        def forward(self, x, index, weights):
            return torch.einsum("ti,eoi->to", x, self.weight)

    config = LoraConfig(r=2, target_parameters=["experts.weight"], target_modules=[])
    model = get_peft_model(Mixture(Own()), config, autocast_adapter_dtype=False)
    model = randomize(model.double())
    assert {path for path, _ in reasons(accelerated(model))} == {"peft"}
    with torch.no_grad():
        assert torch.equal(accelerated(model)(*make_routes(5)), model(*make_routes(5)))


def test_under_torch_func():
    """PEFT's own forward runs, whose parametrizations torch.func refuses."""
    model = mixture()
    x, index, weights = make_routes(5)
    for one in (model, accelerated(model)):
        with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
            torch.func.jacrev(lambda x, one=one: one(x, index, weights).sum())(x)


# ---- steps ----


def gate_with_product(z):
    """Whose product autocast would make in bfloat16."""
    gate, up = z.chunk(2, -1)
    return (nn.functional.silu(gate) * up) @ torch.eye(INNER, dtype=z.dtype)


@pytest.mark.parametrize("with_product", [False, True], ids=["own gate", "gate with a product"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast(dtype, with_product):
    """The experts compute in their own dtype, as transformers' grouped ones; y has x's."""
    model = mixture(dtype=dtype, adapter_dtype=F32)
    experts = experts_of(model)
    experts.config._experts_implementation = "grouped_mm"
    if with_product:
        experts._apply_gate = gate_with_product
    fast, operands = accelerated(model), make_routes(9, dtype=F32)
    plain = run(model, *operands)
    with torch.autocast("cpu", BF16):
        found = run(fast, *operands)
    assert found["y"].dtype == F32
    assert_close(found, plain, 1e-5 if dtype == F32 else 4e-2)


@pytest.mark.parametrize("whose", ["peft", "ours"])
@pytest.mark.parametrize("kind", ["plain", BIASES, "no gate"])
def test_what_is_kept_for_backward(kind, whose):
    """x, z, the routes, S of each side, the router's weights and whether they are of an expert: not
    y, not h, no gathered x."""
    tokens, slots, rank = 64, 4, 3
    if whose == "peft":
        model = accelerated(mixture(kind, dtype=F32))
        experts = experts_of(model)
    else:
        model = Mixture(make_experts(kind).to(F32))
        targets = [f"experts.{name}" for name in both(model.experts)]
        experts = lora_ext.apply_lora(model, lora_ext.LoraConfig(targets, r=rank)).experts
    x, index, weights = make_routes(tokens, slots, dtype=F32)
    operands = [x.requires_grad_(), index, weights.requires_grad_()]
    own = {parameter.data_ptr() for parameter in model.parameters()}
    own |= {operand.data_ptr() for operand in operands}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(*operands)
    rows = tokens * slots
    inner = experts.down_proj.shape[1 if experts.is_transposed else 2]
    z = rows * inner * (2 if experts.has_gate else 1) * 4
    routes = rows * 8 * 2 + experts.num_experts * 4
    assert sum(kept.values()) == z + routes + 2 * rows * rank * 4 + rows * (4 + 1)
    y.sum().backward()


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("form", ["dense", "nested", "stand-in points"])
def test_weights_that_change_after_forward(form, name):
    """They are refused in backward with the words that linear layers have."""
    message, hidden = "changed in place between forward and backward", quantised_experts.HIDDEN
    if form == "dense":
        message, hidden = "modified by an inplace operation", HIDDEN
        model = mixture(BIASES, dtype=F32)
    else:
        model = quantised_experts.two_mixtures(form=form)[0]
    model = lora_ext.accelerate(model)
    x, index, weights = make_routes(9, dtype=F32, hidden=hidden)
    base = experts_of(model)
    weight = decorated.weight_of(base, name)
    is_dense = isinstance(weight, torch.Tensor)
    for changed in [weight, base.get_parameter(f"{name}_bias")] if is_dense else weight.tensors():
        y = model(x.requires_grad_(), index, weights)
        with torch.no_grad():
            changed.copy_(changed.clone())
        with pytest.raises(RuntimeError, match=message):
            y.sum().backward()
    model(x, index, weights).sum().backward()
