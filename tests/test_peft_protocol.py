"""An accelerated model is PEFT's model still: state, files, adapters, copies, hooks, errors."""

import copy
import filecmp
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import BF16, F32, F64
from layer_helpers import assert_same_state, snapshot
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Embedding, Linear, LoraLayer, LoraModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_helpers import (
    ADAPTERS,
    TARGETS,
    Net,
    accelerated,
    layer_model,
    make_ids,
    make_x,
    net,
    paths,
    peft_model,
    randomize,
    reasons,
    step,
)
from torch import nn
from torch.func import functional_call

import lora_ext

FAST = {"fused", "added", "library"}
OTHER = {"b": {"r": 4, "lora_alpha": 7}}


def same(model, other, ids=None):
    """Both compute the same in float64."""
    ids = make_ids() if ids is None else ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(ids), rtol=1e-10, atol=1e-10)


def lora_modules(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


# ---- state ----


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
    same(lora_ext.accelerate(loaded), model.double())


def test_load_adapter_into_an_accelerated_model(tmp_path):
    source = net("one", F64)
    randomize(source, seed=8)
    source.save_pretrained(tmp_path)
    model = lora_ext.accelerate(net("dora", F64))
    model.load_adapter(tmp_path / "a", "loaded")
    model.set_adapter("loaded")
    assert set(paths(model).values()) <= FAST
    same(model.double(), source)


# ---- adapters ----


def test_switching_adding_deleting_disabling():
    model = net("one", F64)
    fast = accelerated(model)
    for one in (model, fast):
        one.add_adapter("b", LoraConfig(target_modules=TARGETS, **OTHER["b"]))
        randomize(one.double(), seed=9)
    for action in (
        lambda m: m.set_adapter("b"),
        lambda m: m.base_model.set_adapter(["a", "b"]),
        lambda m: m.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", "linear"),
        lambda m: m.set_adapter("sum"),
        lambda m: m.delete_adapter("a"),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
    ):
        for one in (model, fast):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action(one)
        same(fast, model)
    with model.disable_adapter(), fast.disable_adapter():
        assert set(paths(fast).values()) == {"base"}
        same(fast, model)
    assert set(paths(fast).values()) <= FAST
    assert_same_state(fast, snapshot(model))


def test_a_later_adapter_on_other_layers_is_accelerated():
    model = lora_ext.accelerate(net("one", F64, targets=["up"]))
    plain = lora_ext.decelerate(copy.deepcopy(model))
    for one in (model, plain):
        one.add_adapter("b", LoraConfig(target_modules=["down", "embed"], **OTHER["b"]))
        one.base_model.set_adapter(["a", "b"])
        randomize(one.double(), seed=9)
    assert paths(model).keys() == {"up", "down", "embed"}
    assert set(paths(model).values()) <= FAST
    same(model, plain)
    lora_ext.decelerate(model)
    assert {layer.path for layer in lora_ext.explain(model)} == {"peft"}


@pytest.mark.parametrize("adapters", ["one", "three", "dora"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload(adapters, safe):
    model = net(adapters, F64)
    fast = accelerated(model)
    wanted = model(make_ids())
    merged, theirs = fast.merge_and_unload(safe_merge=safe), model.merge_and_unload(safe_merge=safe)
    assert_same_state(merged, snapshot(theirs))
    assert type(merged.up) is nn.Linear and not lora_modules(merged)
    torch.testing.assert_close(merged(make_ids()), wanted, rtol=1e-10, atol=1e-10)


def test_unload_gives_the_base_back():
    model = net("one")
    base = {name: p for name, p in model.named_parameters() if "base_layer.weight" in name}
    unloaded = lora_ext.accelerate(model).unload()
    assert type(unloaded.up) is nn.Linear
    assert unloaded.up.weight is base["base_model.model.up.base_layer.weight"]


def test_a_mixed_batch_is_pefts_own():
    """adapter_names: a serial loop that only PEFT defines; same bits."""
    model = net("three").eval()
    fast = accelerated(model)
    names = ["a", "__base__", "c", "b", "a", "c"]
    with torch.no_grad():
        assert torch.equal(
            fast(make_ids(), adapter_names=names), model(make_ids(), adapter_names=names)
        )


def test_hotswap(tmp_path):
    targets = ["up", "gate", "down"]  # PEFT cannot swap an embedding's adapter
    source = net("one", F64, targets=targets)
    randomize(source, seed=12)
    source.save_pretrained(tmp_path)
    model = lora_ext.accelerate(net("one", F64, targets=targets))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    layer = model.base_model.model.up
    assert isinstance(layer.scaling["a"], torch.Tensor)
    before = model(make_ids()).detach()
    hotswap_adapter(model, str(tmp_path / "a"), "a")
    assert set(paths(model).values()) <= FAST
    assert not torch.allclose(model(make_ids()), before)
    # The hub's format holds float64 here; PEFT makes scaling tensors float32.
    torch.testing.assert_close(model(make_ids()), source(make_ids()), rtol=1e-5, atol=1e-5)


def test_scaling_changes_are_seen_at_once():
    model, ids = net("one", F64), make_ids()
    fast = accelerated(model)
    for change in (lambda m: m.set_scale("a", 3.0), lambda m: m.scale_layer(0.5)):
        for one in (model, fast):
            for module in lora_modules(one).values():
                change(module)
        same(fast, model, ids)


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
    same(other, model)
    y = model(make_ids()).detach()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(make_ids()), y)


def test_without_a_peft_model_around_it():
    base = Net().double()
    model = inject_adapter_in_model(LoraConfig(target_modules=TARGETS, r=3), base, "a")
    model = randomize(model.double())
    same(accelerated(model), model)
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


# ---- what others attach ----


def attach_forward(module, seen):
    return module.register_forward_hook(lambda m, i, y: seen.append(y))


def attach_pre(module, seen):
    return module.register_forward_pre_hook(lambda m, i: seen.append(i[0]))


def attach_backward(module, seen):
    return module.register_full_backward_hook(lambda m, i, o: seen.append(o[0]))


PARTS = {
    "base": lambda layer: layer.base_layer,
    "A": lambda layer: layer.lora_A["a"],
    "B": lambda layer: layer.lora_B["a"],
    "dropout": lambda layer: layer.lora_dropout["a"],
}


@pytest.mark.parametrize("attach", [attach_forward, attach_pre, attach_backward])
@pytest.mark.parametrize("part", PARTS)
def test_hooks_on_the_parts_are_called(part, attach):
    model = layer_model("linear", "one", F64, lora_dropout=0.2)
    fast, x = accelerated(model), make_x("linear", F64)
    calls = {}
    for name, one in (("fast", fast), ("peft", model)):
        calls[name] = []
        handle = attach(PARTS[part](one.base_model.model[0]), calls[name])
        step(one.eval(), x)
        if name == "fast":
            assert paths(one)["0"] == ("added" if part == "base" else "peft")
        handle.remove()
    assert len(calls["fast"]) == len(calls["peft"]) == 1
    torch.testing.assert_close(calls["fast"][0], calls["peft"][0], rtol=1e-11, atol=1e-11)
    assert set(paths(fast).values()) <= FAST - {"added"}


def test_a_hook_that_changes_the_bases_output_is_obeyed():
    model = layer_model("linear", "one", F64)
    fast, x = accelerated(model), make_x("linear", F64)
    for one in (model, fast):
        one.base_model.model[0].base_layer.register_forward_hook(lambda m, i, y: 3 * y)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-11, atol=1e-11)


def test_hooks_on_the_layer_and_on_all_modules():
    model, x, seen = layer_model("linear"), make_x("linear"), []
    fast = accelerated(model)
    fast.base_model.model[0].register_forward_hook(lambda m, i, y: seen.append(type(m).__name__))
    assert paths(fast)["0"] == "fused"
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, y: seen.append(type(m).__name__)
    )
    try:
        assert reasons(fast) == {("peft", "hooks on all modules are registered")}
        fast(x)
    finally:
        handle.remove()
    assert seen.count("Linear") == 5  # the base, A, B, and the layer by both hooks


class Doubling(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input):
        return 2 * super().forward(input)


class Tanh(nn.Linear):
    """Its output is what tanh saves for backward: writing to it would spoil the gradient."""

    def forward(self, input):
        return torch.tanh(super().forward(input))


@pytest.mark.parametrize("kind", [Doubling, Tanh])
@pytest.mark.parametrize("adapters", ["one", "three", "lora_bias"])
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_a_subclass_of_linear_is_called_as_it_is(kind, adapters, dtype):
    torch.manual_seed(0)
    model = peft_model(nn.Sequential(kind(24, 40)), ADAPTERS[adapters], ["0"], dtype)
    fast, x = accelerated(model), make_x("linear", dtype)
    assert reasons(fast) == {("added", "the base layer is not exactly nn.Linear or Conv1D")}
    found, wanted = step(fast, x), step(model, x)
    for name, value in wanted.items():
        tolerance = 1e-11 if dtype == F64 else 2e-2
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


class OneRow(nn.Linear):
    """Returns a row for all of x, which PEFT's sum broadcasts."""

    def forward(self, input):
        return super().forward(input[:1])


def test_a_base_that_changes_the_shape():
    torch.manual_seed(0)
    model = peft_model(nn.Sequential(OneRow(24, 40)), ADAPTERS["three"], ["0"], F64)
    fast, x = accelerated(model), make_x("linear", F64)
    assert torch.equal(fast(x), model(x)) and fast(x).shape == (60, 40)


def test_a_base_weight_that_is_trained_gets_its_gradient():
    model = layer_model("linear", "one", F64)
    fast, x = accelerated(model), make_x("linear", F64)
    for one in (model, fast):
        one.base_model.model[0].base_layer.weight.requires_grad_()
    assert reasons(fast) == {("added", "the base weight is trained")}
    found, wanted = step(fast, x), step(model, x)
    assert found.keys() == wanted.keys() and any("base_layer.weight" in name for name in found)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_base_bias_that_is_trained_gets_its_gradient(bias):
    model = net("one", F64, bias=bias)
    fast, ids = accelerated(model), make_ids()
    found, wanted = step(fast, ids), step(model, ids)
    assert found.keys() == wanted.keys() and any("base_layer.bias" in name for name in found)
    assert paths(fast)["up"] in ("fused", "library")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


# ---- what only PEFT computes ----


def parametrized(layer):
    nn.utils.parametrizations.weight_norm(layer.lora_A["a"])


def variant(layer):
    layer.lora_variant["a"] = type(layer.lora_variants[("mica",)], (), {})()


REASONS = {
    "a factor is not a plain nn.Linear": parametrized,
    "the dropout is not nn.Dropout": lambda m: m.lora_dropout.update({"a": nn.AlphaDropout(0.0)}),
    "the dropout drops everything": lambda m: m.lora_dropout.update({"a": nn.Dropout(1.0)}),
    "the factors' dtypes are not the same floating dtype": lambda m: m.lora_A["a"].to(F32),
    "a factor's forward is replaced on the instance": lambda m: setattr(
        m.lora_B["a"], "forward", m.lora_B["a"].forward
    ),
    "casting the input is turned off (cast_input_dtype_enabled)": lambda m: setattr(
        m, "cast_input_dtype_enabled", False
    ),
    "the layer's forward is replaced on the instance": lambda m: setattr(m, "forward", m.forward),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_for_pefts_forward(reason):
    """Each is named, and the result is PEFT's, errors included."""
    model = layer_model("linear", "one", F64)
    fast, x = accelerated(model), make_x("linear", F64)
    for one in (model, fast):
        REASONS[reason](one.base_model.model[0])
    if "casting" not in reason:  # which holds for an x of another dtype too
        assert reasons(fast) == {("peft", reason)}
    outcomes = []
    for one in (model, fast):
        try:
            outcomes.append(one(x))
        except RuntimeError as error:
            outcomes.append(str(error))
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        assert torch.equal(*outcomes)


@pytest.mark.parametrize(
    ("adapters", "words", "reason"),
    [
        ("three", {"use_dora": True}, "several active adapters, one of them DoRA"),
        ("one", {"init_lora_weights": "mica"}, "a variant of LoRA other than DoRA"),
    ],
)
def test_variants_that_only_peft_computes(adapters, words, reason):
    model = layer_model("linear", adapters, **words)
    fast, x = accelerated(model), make_x("linear")
    assert reasons(fast) == {("peft", reason)}
    assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("change", ["hook", "lora_bias", "offload"])
def test_dora_that_only_peft_computes(change):
    model = layer_model("linear", "dora")
    layer = model.base_model.model[0]
    if change == "hook":
        layer.lora_magnitude_vector["a"].register_forward_hook(lambda *_: None)
    elif change == "lora_bias":
        layer.lora_B["a"].bias = nn.Parameter(torch.ones(40))
    else:
        layer.ephemeral_gpu_offload = True
    fast, x = accelerated(model), make_x("linear")
    assert set(paths(fast).values()) == {"peft"}
    assert torch.equal(fast(x), model(x))


def test_layers_without_a_faster_forward_are_listed():
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 5)),
        LoraConfig(target_modules=["0", "2"], r=2),
    )
    lora_ext.accelerate(model)
    assert next((layer.path, layer.reason) for layer in lora_ext.explain(model)) == (
        "peft",
        "no faster forward for peft's Conv2d",
    )
    assert "Conv2d" in str(lora_ext.explain(model))


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_an_adapter_that_is_not_in_the_layer(kind):
    model = layer_model(kind, "one")
    fast, x = accelerated(model), make_x(kind)
    fast.base_model.model[0]._active_adapter = model.base_model.model[0]._active_adapter = "other"
    assert {layer.path for layer in lora_ext.explain(fast)} == {"base"}
    assert torch.equal(fast(x), model(x))


# ---- transforms and derivatives that the op refuses ----


def test_torch_func_and_forward_mode_take_pefts_forward():
    model = layer_model("linear", "one", F64)
    fast, x = accelerated(model), make_x("linear", F64, 3)
    tangent = torch.randn_like(x)
    for transform in (
        lambda m: torch.func.vmap(m)(x),
        lambda m: torch.func.grad(lambda x: m(x).square().sum())(x),
        lambda m: torch.func.jvp(m, (x,), (tangent,))[1],
        lambda m: torch.func.jacrev(m)(x),
    ):
        torch.testing.assert_close(transform(fast), transform(model), rtol=1e-11, atol=1e-11)


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
