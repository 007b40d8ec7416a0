"""apply_lora: which modules get an adapter, which are refused; a failure changes nothing."""

import ast
import copy
import inspect
import re
import types

import peft
import pytest
import torch
from adapter_helpers import assert_unchanged, make_ids, make_zoo, state_of
from helpers import BF16, F32, F64
from layer_helpers import assert_same_state, randomize, snapshot
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoRALinear, apply_lora
from lora_ext.models import find, lora_layers
from lora_ext.nn import LoRAConv2d, LoRAEmbedding


def adapted(model, *patterns, **words):
    """The paths that patterns choose in a copy of the model."""
    model = apply_lora(copy.deepcopy(model), LoraConfig(patterns, **words))
    return [path for path, _ in lora_layers(model)]


BLOCKS = [f"layers.{i}" for i in range(3)]


def test_all_linear():
    linear = [f"{block}.{name}" for block in BLOCKS for name in ("q_proj", "mlp")]
    linear += ["c_attn", "head.0", "head.1"]
    zoo = make_zoo()
    assert adapted(zoo, "all-linear") == linear
    assert adapted(zoo, "emb", "all-linear", "conv") == ["emb", *linear[:7], "conv", *linear[7:]]
    assert adapted(zoo, "all-linear", exclude_modules="layers.*", modules_to_save="head.1") == [
        "c_attn",
        "head.0",
    ]
    zoo.get_output_embeddings = lambda: zoo.head[1]
    apply_lora(zoo, LoraConfig("all-linear"))
    assert type(zoo.head[1]) is nn.Linear
    assert type(zoo.head[0]) is LoRALinear
    with pytest.raises(ValueError, match="'all-linear', but the Embedding has none left"):
        apply_lora(nn.Embedding(3, 3), LoraConfig("all-linear"))
    with pytest.raises(ValueError, match="'all-linear', but the Zoo has none left"):
        adapted(make_zoo(), "all-linear", modules_to_save=["layers", "c_attn", "head"])


@pytest.mark.parametrize(
    ("patterns", "words", "message"),
    [
        (["q_prj"], {}, r"'q_prj' to match a module.*similar names: 'q_proj'"),
        (["layers.0.q_pro"], {}, r"similar names: 'layers.0.q_proj'"),
        (["zzz"], {}, r"matches none of \d+; layers are: 'c_attn', 'conv', 'emb', 'mlp', 'q_proj'"),
        ([r".*\.(q|v)_prj"], {}, r"; a regular expression begins .*; (similar names|layers are): "),
        (
            ["q_proj", "norm"],
            {},
            r"'norm' names 'norm', a torch.nn.modules.normalization.LayerNorm",
        ),
        (["layers"], {}, r"names 'layers', a torch.nn.modules.container.ModuleList"),
        (["q_proj"], {"exclude_modules": "*q_proj"}, "leave out all that it matches"),
        (["head.0"], {"modules_to_save": "head"}, "leave out all that it matches"),
        (["q_proj"], {"modules_to_save": "haed"}, r"modules_to_save 'haed'.*similar names: 'head'"),
        (["re:(a+)+b|norm.*"], {}, "names 'norm'"),
        (["emb", "q_proj"], {"lora_bias": True}, r"lora_bias is for linear.*\(at 'emb'\)"),
        (
            ["conv", "q_proj"],
            {"r": 11, "init_lora_weights": "pissa"},
            r"at most 10, but got 11 \(at 'conv'\)",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_changes_nothing(patterns, words, message):
    model = make_zoo(F32)
    model.norm.requires_grad_(False)
    before, modules = state_of(model), list(model.modules())
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoraConfig(patterns, **words))
    assert_unchanged(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


class Sub(nn.Linear):
    pass


# What a layer itself refuses is in layers/test_module_construction: here two of them.
REFUSED = {
    "subclass": (lambda: Sub(4, 4), "Sub; expected nn.Linear"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "ParametrizedLinear; expected nn.Linear",
    ),
    "spectral_norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
        r"its weight is computed.*\(at 'odd'\)",
    ),
    "conv3x3": (lambda: nn.Conv2d(4, 4, 3), "Conv2d; expected .* 1x1 nn.Conv2d without groups"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), r"without max_norm.*\(at 'odd'\)"),
    "lazy": (lambda: nn.LazyLinear(4), "LazyLinear; expected nn.Linear"),
    "rnn": (lambda: nn.LSTM(4, 4), "LSTM; expected nn.Linear"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_modules_that_are_refused_by_name(make, message):
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": make()})
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoraConfig(["plain", "odd"]))
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert model.plain.weight.requires_grad


def test_a_glob_passes_over_what_a_name_may_not_say():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    assert adapted(model, "*") == ["0", "3"]
    assert adapted(model, "re:[0-3]") == ["0", "3"]


def test_out_proj_of_multihead_attention():
    """It is a subclass that torch's attention reads without calling it."""
    model = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match=r"'out_proj', a .*NonDynamicallyQuantizableLinear"):
        apply_lora(model, LoraConfig("out_proj"))
    assert adapted(nn.TransformerDecoderLayer(8, 2, 16), "all-linear") == ["linear1", "linear2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("second", [False, True])
def test_an_interrupt_changes_nothing(monkeypatch, error, second):
    model = make_zoo(BF16)
    if second:
        apply_lora(model, LoraConfig(["q_proj", "emb"]), "first")
        lora_ext.merge_adapter(model)
    before, modules, inits = state_of(model), list(model.modules()), []

    def fail_at_the_third(self, name):
        inits.append(name)
        if len(inits) == 3:
            raise error

    monkeypatch.setattr(LoRALinear, "initialize", fail_at_the_third)
    with pytest.raises(error):
        apply_lora(model, LoraConfig(["emb", "q_proj", "mlp"]), "second")
    assert_unchanged(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(layer.merged == second for _, layer in lora_layers(model))


# ---- what is replaced ----


def test_replaced_in_place_with_shared_parameters():
    model, ids = make_zoo(), make_ids()
    parameters = {name: p for name, p in model.named_parameters()}
    y, state = model(ids), snapshot(model)
    assert apply_lora(model, LoraConfig(["emb", "q_proj", "c_attn", "conv"])) is model
    assert [type(layer) for _, layer in lora_layers(model)] == [
        LoRAEmbedding,
        *[LoRALinear] * 4,
        LoRAConv2d,
    ]
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.allclose(model(ids), y)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        name for name in after if ".lora_" in name
    }


def test_a_module_at_two_paths_stays_one():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.ModuleList([shared])})
    apply_lora(model, LoraConfig("a.0", r=2))
    assert isinstance(model["a"][0], LoRALinear)
    assert model["b"][0] is model["a"][0]
    assert len(list(lora_layers(model))) == 1
    assert [path for path, _ in lora_layers(model, remove_duplicate=False)] == ["a.0", "b.0"]
    assert len({id(p) for p in model.parameters()}) == len(list(model.named_parameters())) == 4
    keys = set(lora_ext.models.lora_state_dict(model))
    assert keys == {f"{p}.lora_{t}.default" for p in ("a.0", "b.0") for t in "ab"}
    lora_ext.merge_and_unload(model)
    assert model["b"][0] is model["a"][0]
    assert type(model["a"][0]) is nn.Linear


def test_tied_parameters_stay_tied():
    model = nn.ModuleDict({"emb": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model.head.weight = model.emb.weight
    apply_lora(model, LoraConfig(["emb", "head"], r=2))
    assert model.emb.weight is model.head.weight
    assert not model.emb.weight.requires_grad


def test_the_model_itself_may_not_be_the_layer():
    with pytest.raises(ValueError, match="expected target_modules"):
        apply_lora(nn.Linear(4, 4), LoraConfig("*"))


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, BF16, F32], ids=str)
def test_adapter_dtype(dtype, adapter_dtype):
    model = make_zoo(dtype)
    apply_lora(model, LoraConfig(["q_proj", "emb"]), adapter_dtype=adapter_dtype)
    expected = adapter_dtype or (F64 if dtype == F64 else F32)
    assert {model.emb.lora_a["default"].dtype, model.emb.lora_b["default"].dtype} == {expected}


def test_rank_and_alpha_patterns():
    model = make_zoo()
    ranks, alphas = {"layers.1.q_proj": 2, "q_proj": 3, "*": 5}, {"re:layers.*": 10.0}
    apply_lora(
        model,
        LoraConfig(["q_proj", "conv"], rank_pattern=ranks, alpha_pattern=alphas, lora_alpha=1.0),
    )
    found = {path: (s.r, s.lora_alpha) for path, s in specs_of(model)}
    assert found == {
        "layers.0.q_proj": (3, 10.0),
        "layers.1.q_proj": (2, 10.0),
        "layers.2.q_proj": (3, 10.0),
        "conv": (5, 1.0),
    }


def specs_of(model, adapter="default"):
    return [(path, layer.adapters[adapter]) for path, layer in lora_layers(model)]


# ---- modules to save ----


def test_modules_to_save():
    model = make_zoo()
    apply_lora(model, LoraConfig(["q_proj"], modules_to_save=["head", "norm"]), "a")
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("head", "norm"))}
    assert model.head.lora_ext_saved_by == model.norm.lora_ext_saved_by == ("a",)
    apply_lora(model, LoraConfig(["mlp"], modules_to_save="norm"), "b")
    assert model.norm.lora_ext_saved_by == ("a", "b")
    lora_ext.delete_adapter(model, "a")
    assert not hasattr(model.head, "lora_ext_saved_by")
    assert model.norm.lora_ext_saved_by == ("b",)
    lora_ext.unload(model)
    assert not hasattr(model.norm, "lora_ext_saved_by")


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_belong_to_their_adapter(bias, tmp_path):
    """Saved with it though frozen by now, and free again when it is deleted."""
    model = randomize(apply_lora(make_zoo(), LoraConfig(["q_proj"], bias=bias), "a"))
    model.requires_grad_(False)
    lora_ext.save_adapter(model, tmp_path, "a")
    assert lora_ext.adapters.read_adapter_config(tmp_path).bias == bias
    owned = {path for path, m in model.named_modules() if hasattr(m, "lora_ext_bias_saved_by")}
    adapted = {path for path, _ in lora_layers(model)}
    with_bias = {path for path, m in model.named_modules() if getattr(m, "bias", None) is not None}
    assert owned == {"none": set(), "lora_only": adapted, "all": with_bias}[bias]
    lora_ext.delete_adapter(model, "a")
    assert not any(hasattr(m, "lora_ext_bias_saved_by") for m in model.modules())


@pytest.mark.parametrize(
    "saved", ["layers.0.q_proj", "layers.0", "layers", "layers.*", "re:layers.*"]
)
def test_an_adapted_layer_cannot_be_trained_whole(saved):
    """Its weight would be trained under the adapter, or its forward would raise."""
    model = apply_lora(make_zoo(), LoraConfig(["q_proj"]), "a")
    before = state_of(model)
    with pytest.raises(ValueError, match="modules_to_save without adapted layers, but a"):
        apply_lora(model, LoraConfig(["emb"], modules_to_save=saved), "b")
    assert_unchanged(model, before)


def test_a_tied_weight_cannot_be_frozen_and_trained():
    model = nn.ModuleDict({"emb": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model.head.weight = model.emb.weight
    with pytest.raises(ValueError, match="a Linear that it names holds 'emb' or shares its weight"):
        apply_lora(model, LoraConfig("emb", modules_to_save="head"))
    assert type(model.emb) is nn.Embedding


# ---- a second adapter ----


def test_an_existing_adapter_is_not_touched():
    """A failing second call deleted what was trained."""
    model = make_zoo()
    apply_lora(model, LoraConfig(["q_proj", "conv"]), "a")
    randomize(model)
    state = snapshot(model)
    for targets in (["q_proj"], ["mlp"], ["mlp", "conv"]):
        with pytest.raises(ValueError, match="but the model has 'a'; delete_adapter it first"):
            apply_lora(model, LoraConfig(targets), "a")
        assert_same_state(model, state)


def test_adapters_after_none_is_active_or_left():
    model = make_zoo()
    apply_lora(model, LoraConfig("q_proj"), "a")
    lora_ext.set_adapter(model, [])
    apply_lora(model, LoraConfig(["q_proj", "conv"]), "b")
    assert {layer.active_adapters for _, layer in lora_layers(model)} == {()}
    lora_ext.delete_adapter(model, "a")
    lora_ext.delete_adapter(model, "b")
    apply_lora(model, LoraConfig(["q_proj", "mlp"], bias="lora_only"), "c")
    layers = [layer for path, layer in lora_layers(model) if path != "conv"]
    assert {layer.active_adapters for layer in layers} == {("c",)}
    assert all(layer.bias is None or layer.bias.requires_grad for layer in layers)


@pytest.mark.parametrize("first", ["none", "all", "lora_only"])
@pytest.mark.parametrize("second", ["none", "all", "lora_only"])
def test_biases_of_two_configs(first, second):
    """Biases exist once: a further config adds to what is trained, and freezes nothing."""
    model = make_zoo()
    apply_lora(model, LoraConfig("q_proj", bias=first), "a")
    apply_lora(model, LoraConfig(["conv", "c_attn"], bias=second), "b")
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    of = {"a": {n for n in biases if "q_proj" in n}, "b": {"conv.bias", "c_attn.bias"}}
    wanted = set()
    for name, mode in (("a", first), ("b", second)):
        wanted |= {"none": set(), "all": biases, "lora_only": of[name]}[mode]
    assert trained == wanted


@pytest.mark.parametrize(
    "words",
    [
        {"target_modules": ["q_proj", "layers.1.mlp"], "exclude_modules": ["layers.2.q_proj"]},
        {"target_modules": r".*\.[02]\.(q_proj|mlp)", "exclude_modules": r".*\.0\.mlp"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "use_rslora": True},
        {"target_modules": ["q_proj", "mlp"], "layers_to_transform": 1, "lora_alpha": 3},
        {"target_modules": ["mlp"], "rank_pattern": {r"[01]\.mlp": 2, "mlp": 3}, "r": 4},
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.q_proj": 2, "q_proj": 5}},
        {"target_modules": ["mlp", "head.0"], "alpha_pattern": {"head.0": 1.0, "mlp": 7.0}},
        {
            "target_modules": ["q_proj"],
            "alpha_pattern": {"^model.layers.0.*": 5},
            "lora_dropout": 0.1,
        },
        {"target_modules": ["q_proj"], "modules_to_save": ["emb"], "task_type": "SEQ_CLS"},
        {"target_modules": ["q_proj"], "bias": "all", "task_type": peft.TaskType.CAUSAL_LM},
    ],
    ids=str,
)
def test_a_config_of_peft_means_here_what_it_means_there(words):
    theirs, *ours = (nn.ModuleDict({"model": make_zoo()}) for _ in range(3))
    peft.inject_adapter_in_model(peft.LoraConfig(**words), theirs)
    expected = {
        path: (m.r["default"], m.scaling["default"], getattr(m.lora_dropout["default"], "p", 0.0))
        for path, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    configs = (peft.LoraConfig(**words), LoraConfig(**in_our_patterns(words)))
    for model, config in zip(ours, configs, strict=True):
        apply_lora(model, config)
        assert {p: (s.r, s.scaling, s.lora_dropout) for p, s in specs_of(model)} == expected
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert ("model.norm.bias" in trained) == (words.get("bias") == "all")
        assert ("model.emb.weight" in trained) == ("modules_to_save" in words)


def in_our_patterns(words):
    """The words for our class, where a regular expression begins with "re:"."""
    words = {name: words[name] for name in words if name != "task_type"}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(words.get(name), str):
            words[name] = f"re:{words[name]}"
    for name in ("rank_pattern", "alpha_pattern"):
        words[name] = {rf"re:(.*\.)?({key})": n for key, n in words.get(name, {}).items()}
    return words


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"use_dora": True}, "use_dora=True; lora_ext.accelerate"),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, "layers_pattern='layers'"),
        ({"inference_mode": True}, "inference_mode=True"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights .*'orthogonal'"),
        ({"init_lora_weights": False}, "init_lora_weights .*False"),
    ],
    ids=str,
)
def test_a_field_of_peft_that_is_not_supported_is_named(words, named):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=named):
        apply_lora(model, peft.LoraConfig(target_modules=["0"], **words))
    assert type(model[0]) is nn.Linear
    if words.keys() - {"init_lora_weights", "layers_to_transform"}:
        with pytest.raises(TypeError, match=list(words)[-1]):
            LoraConfig("0", **words)


@pytest.mark.parametrize(
    ("config", "came"),
    [(peft.LoHaConfig(), "LoHaConfig"), (None, "NoneType"), ({}, "dict")],
)
def test_another_config_is_refused(config, came):
    message = f"lora_ext.apply_lora: expected PEFT's or lora_ext's LoraConfig, but got {came}"
    with pytest.raises(TypeError, match=message):
        apply_lora(nn.Sequential(nn.Linear(2, 2)), config)


def test_mambas_output_is_left_out_as_peft_does():
    """Its kernels read the weight without calling the layer."""
    source = inspect.getsource(peft.tuners.tuners_utils._check_lora_target_modules_mamba)
    theirs = [set(ast.literal_eval(f"{{{each}}}")) for each in re.findall(r" = {(.*)}", source)]
    assert {"LORA", "ADALORA", "XLORA", "RANDLORA"} in theirs
    assert find.MAMBA_TYPES in theirs and find.READ_DIRECTLY in theirs

    def hybrid(kind):
        mixer = {name: nn.Linear(4, 4) for name in ("in_proj", "out_proj")}
        model = nn.ModuleDict({"mixer": nn.ModuleDict(mixer)})
        model.config = types.SimpleNamespace(model_type=kind)
        return model

    for kind in find.MAMBA_TYPES:
        assert adapted(hybrid(kind), "all-linear") == ["mixer.in_proj"]
        with pytest.raises(
            ValueError, match=r"Mamba's kernels read .*exclude_modules=\['out_proj'\]"
        ):
            adapted(hybrid(kind), "*_proj")
        assert adapted(hybrid(kind), "*_proj", exclude_modules="out_proj") == ["mixer.in_proj"]
    assert adapted(hybrid("llama"), "all-linear") == ["mixer.in_proj", "mixer.out_proj"]
