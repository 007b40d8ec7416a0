"""PEFT's folders of adapters on parameters: both ways, its versions, Unsloth's, hostile ones."""

import copy
import json
import warnings

import peft
import pytest
import torch
from mixture_helpers import KINDS, mixture, peft_mixture, randomized, some_ids
from safetensors.torch import load_file, save_file

import lora_ext
from lora_ext import LoRAConfig, apply_lora, load_adapter, save_adapter
from lora_ext.adapters import AdapterError
from lora_ext.nn import LoRAExperts, LoRAParameter

EXPERTS = "base_model.model.model.layers.0.mlp.experts."
INNER, OUTER = EXPERTS + "base_layer.", EXPERTS
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def loaded_by_peft(base, folder):
    with warnings.catch_warnings():  # PEFT looks for its patterns' keys among modules alone
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


def logits(model):
    with torch.no_grad():
        return model(some_ids()).logits


def edit(folder, tensors=None, **fields):
    """Rewrites a folder's tensors by a function, and fields of its config."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    if tensors is not None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        tensors(found)
        save_file({key: value.contiguous() for key, value in found.items()}, path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_here_is_the_same_in_peft(kind, tmp_path):
    base = mixture(kind)
    model = randomized(apply_lora(copy.deepcopy(base), LoRAConfig("all-linear", r=3, alpha=6)))
    save_adapter(model, tmp_path)
    expected = logits(model)
    torch.testing.assert_close(logits(loaded_by_peft(base, tmp_path)), expected)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again), expected)
    assert (expected - logits(base)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        *((kind, BOTH) for kind in ("qwen2_moe", "gpt_oss", "olmoe")),
        ("granitemoe", BOTH[:1]),
        ("mixtral", BOTH[1:]),
    ],
)
def test_what_peft_saves_is_the_same_here(kind, parameters, tmp_path):
    model = peft_mixture(kind, target_parameters=parameters, use_rslora=kind == "olmoe")
    model.save_pretrained(tmp_path)
    ours = load_adapter(mixture(kind), tmp_path)
    torch.testing.assert_close(logits(ours), logits(model))


def test_all_linear_of_peft_with_the_router(tmp_path):
    model = peft_mixture("qwen3_moe", "all-linear")
    model.save_pretrained(tmp_path)
    ours = load_adapter(mixture("qwen3_moe"), tmp_path, trainable=True)
    torch.testing.assert_close(logits(ours), logits(model))
    count = lora_ext.models.trainable_parameters(ours)
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path / "again")
    found = loaded_by_peft(mixture("qwen3_moe"), tmp_path / "again")
    torch.testing.assert_close(logits(found), logits(model))


def test_names_that_peft_takes_for_experts_are_saved_as_parameters(tmp_path):
    """Of a dense layer in a mixture, whose gate_proj PEFT would take for the experts'."""
    base = mixture("qwen3_moe", mlp_only_layers=[1])
    config = LoRAConfig(["gate_proj", "up_proj", "q_proj"], r=2)
    model = randomized(apply_lora(copy.deepcopy(base), config))
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(loaded_by_peft(base, tmp_path)), logits(model))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again), logits(model))


def stacks_of(version, transposed, square, r=2, count=3):
    """(module, A, B, what PEFT of a version adds to its weight) of a stack by that version's rule:
    einsum over PEFT's own views, with `in` as it was then."""
    rows, columns = (4, 4) if square else (4, 6)
    swapped = {"0.17.1": False, "0.18.1": False, "0.19.0": transposed}.get(version, not transposed)
    d_in, d_out = (columns, rows) if swapped else (rows, columns)
    lora_a, lora_b = torch.randn(count * r, d_in), torch.randn(d_out, r * count)
    views = lora_b.reshape(d_out, r, count), lora_a.reshape(count, r, d_in)
    delta = torch.einsum("ore,eri->eoi" if swapped else "ore,eri->eio", *views)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(count, rows, columns))
    module.is_transposed = transposed
    return module, lora_a, lora_b, delta


@pytest.mark.parametrize("square", [True, False], ids=["square", "not square"])
@pytest.mark.parametrize("transposed", [True, False], ids=["[in, out]", "[out, in]"])
@pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"])
def test_files_of_each_version(version, transposed, square, tmp_path):
    module, lora_a, lora_b, delta = stacks_of(version, transposed, square)
    model = torch.nn.ModuleDict({"experts": module})
    prefix = "base_model.model.experts."
    tensors = {prefix + "lora_A.weight": lora_a, prefix + "lora_B.weight": lora_b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_parameters": ["experts.weight"],
        "peft_version": None if version == "0.17.1" else version,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if square and version == "0.17.1":
        with pytest.warns(UserWarning, match="peft_version None does not say"):
            load_adapter(model, tmp_path)
    else:
        load_adapter(model, tmp_path)
    found = model["experts"].lora["weight"].effective_weight() - module.weight
    torch.testing.assert_close(found, delta)


def test_a_development_version_of_square_experts_warns(tmp_path):
    peft_mixture("qwen3_moe", moe_intermediate_size=16).save_pretrained(tmp_path)
    edit(tmp_path, peft_version="0.19.1.dev0@abc")
    with pytest.warns(UserWarning, match="peft_version '0.19.1.dev0@abc' does not say"):
        load_adapter(mixture("qwen3_moe", moe_intermediate_size=16), tmp_path)


def grouped(tensors):
    """B as Unsloth's first versions had it: columns e r to (e + 1) r are expert e's."""
    for key, value in tensors.items():
        if key.endswith("lora_B.weight") and ".experts." in key:
            tensors[key] = value.view(len(value), -1, 5).transpose(1, 2).reshape(value.shape)


@pytest.mark.parametrize("layout", ["grouped_by_expert", "rank_major"])
def test_unsloths_orders(layout, tmp_path):
    model = peft_mixture("qwen3_moe")
    model.save_pretrained(tmp_path)
    fields = {"base_model_name_or_path": "unsloth/x", "lora_B_layout": layout}
    edit(tmp_path, grouped if layout == "grouped_by_expert" else None, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_adapter(mixture("qwen3_moe"), tmp_path)
    torch.testing.assert_close(logits(ours), logits(model))


@pytest.mark.parametrize(
    "sign", [{"base_model_name_or_path": "unsloth/x"}, {"auto_mapping": {"unsloth_fixed": True}}]
)
def test_unsloths_folder_that_does_not_say_its_order_warns(sign, tmp_path):
    model = peft_mixture("qwen3_moe")
    model.save_pretrained(tmp_path)
    edit(tmp_path, **sign)
    with pytest.warns(UserWarning, match='add "lora_B_layout": "grouped_by_expert"'):
        ours = load_adapter(mixture("qwen3_moe"), tmp_path)
    torch.testing.assert_close(logits(ours), logits(model))


# Of experts that were layers before transformers 5: gate, up and down.
LAYERS_OF_EXPERTS = {"mixtral": ("w1", "w3", "w2")}
V4 = {"target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}, "peft_version": "0.15.2"}


def separate(kind, tensors, is_kept=lambda key: True):
    """The factors of each expert's layers in the place of those of stacks, whose rank is 2 r where
    they hold two layers."""
    names = LAYERS_OF_EXPERTS.get(kind, ("gate_proj", "up_proj", "down_proj"))
    for key in [key for key in tensors if ".experts." in key and key.endswith("lora_A.weight")]:
        lora_a = tensors.pop(key)
        lora_b = tensors.pop(key.replace("lora_A", "lora_B"))
        layers = names[:2] if ".base_layer." in key else names[2:]
        every_a = lora_a.view(5, len(layers), 3, -1)
        every_b = lora_b.view(len(layers), -1, len(layers), 3, 5)
        for e in range(5):
            for number, name in enumerate(layers):
                start = f"{key.partition('.experts.')[0]}.experts.{e}.{name}."
                tensors[f"{start}lora_A.weight"] = every_a[e, number]
                tensors[f"{start}lora_B.weight"] = every_b[number, :, number, :, e]
    for key in list(tensors):
        value = tensors.pop(key)
        if is_kept(key):
            place = ".block_sparse_moe." if kind == "mixtral" else ".mlp."
            tensors[key.replace(".mlp.", place)] = value


def of_layers(kind, folder, is_kept=lambda key: True, use_rslora=False, **fields):
    """PEFT's model of a mixture, whose adapter is saved as before transformers 5."""
    model = peft_mixture(kind, "all-linear", use_rslora=use_rslora)
    for module in model.modules():
        if getattr(module, "parameter_name", "") == "gate_up_proj":
            module.scaling["default"] = 6 / 3 ** (0.5 if use_rslora else 1)
            blocks = module.lora_B["default"].weight.data.view(2, -1, 2, 3, 5)
            blocks[0, :, 1], blocks[1, :, 0] = 0, 0
            for number, name in enumerate(("gate_proj", "up_proj")):
                blocks[number] *= is_kept(f".{name}.")
    model.save_pretrained(folder)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", *LAYERS_OF_EXPERTS.get(kind, ())]
    names += [] if kind in LAYERS_OF_EXPERTS else ["gate_proj", "up_proj", "down_proj"]
    edit(folder, lambda t: separate(kind, t, is_kept), target_modules=names, **{**V4, **fields})
    return model


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe"])
def test_experts_that_were_layers_are_as_in_peft(kind, tmp_path):
    model = of_layers(kind, tmp_path)
    expected = logits(model)
    torch.testing.assert_close(logits(load_adapter(mixture(kind), tmp_path)), expected)
    torch.testing.assert_close(logits(loaded_by_peft(mixture(kind), tmp_path)), expected)


@pytest.mark.parametrize(
    ("is_kept", "words"),
    [
        (lambda key: ".gate_proj." not in key, {}),  # which PEFT refuses
        (lambda key: ".up_proj." not in key, {"base_model_name_or_path": "unsloth/x"}),
        (lambda key: ".down_proj." not in key or "layers.1" in key, {"use_rslora": True}),
    ],
    ids=["no gate", "no up", "rsLoRA"],
)
def test_some_layers_of_experts(is_kept, words, tmp_path):
    """rsLoRA's alpha keeps each layer's scaling, where PEFT doubles it."""
    model = of_layers("qwen3_moe", tmp_path, is_kept, **words)
    for path, wrapper in model.named_modules():
        if getattr(wrapper, "parameter_name", "") == "down_proj":
            wrapper.lora_B["default"].weight.data *= is_kept(f"{path}.down_proj.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_adapter(mixture("qwen3_moe"), tmp_path, trainable=True)
    torch.testing.assert_close(logits(ours), logits(model))
    save_adapter(ours, tmp_path / "again")
    found = loaded_by_peft(mixture("qwen3_moe"), tmp_path / "again")
    torch.testing.assert_close(logits(found), logits(model))


def drop(key):
    return lambda tensors: tensors.pop(key)


def put(key, *shape):
    return lambda tensors: tensors.__setitem__(key, torch.ones(shape))


def rename_outer(tensors):
    for key in ("lora_A.weight", "lora_B.weight"):
        tensors[f"{EXPERTS}base_layer.base_layer.{key}"] = tensors.pop(OUTER + key)


HOSTILE = {
    "no inner A": (drop(INNER + "lora_A.weight"), {}, "experts.base_layer.lora_A.weight' is miss"),
    "no outer B": (drop(OUTER + "lora_B.weight"), {}, "mlp.experts.lora_B.weight' is missing"),
    "a third wrapper": (
        put(EXPERTS + "base_layer.base_layer.lora_A.weight", 10, 16),
        {},
        r"each of the parameters \['gate_up_proj', 'down_proj'\].*but the file has 3",
    ),
    "an outer one renamed": (rename_outer, {}, "but the file has 3"),
    "a parameter more": (None, {"target_parameters": ["experts.down_proj"]}, "the file has 2"),
    "no target_parameters": (None, {"target_parameters": None}, "to name weights of .*experts"),
    "a parameter that is no matrix": (
        None,
        {"target_parameters": ["experts.up", "experts.gate"]},
        "expected target_parameters of adapter_config.json to name weights",
    ),
    "a text as target_parameters": (None, {"target_parameters": "x"}, "a list of names"),
    "another r": (None, {"r": 4}, r"expected shape \[20, 16\] \(rank 4 by the config"),
    "experts more": (put(INNER + "lora_A.weight", 18, 16), {}, r"expected shape \[15, 16\]"),
    "another width": (put(INNER + "lora_A.weight", 15, 17), {}, r"expected shape \[15, 16\]"),
    "three dimensions": (put(INNER + "lora_A.weight", 5, 3, 16), {}, r"but got \[5, 3, 16\]"),
    "no dimension": (put(INNER + "lora_A.weight"), {}, r"but got \[\]"),
    "A of the other side": (
        put(INNER + "lora_A.weight", 15, 24),
        {},
        r"lora_B.weight': expected shape \[16, 15\]",
    ),
    "dropout": (None, {"lora_dropout": 0.1}, "expected dropout 0 for an adapter on the experts"),
    "lora_bias": (None, {"lora_bias": True}, "lora_B.bias' is missing|no lora_bias"),
    "pissa": (None, {"init_lora_weights": "pissa"}, "expected init 'kaiming' or 'gaussian'"),
    "an unknown layout": (None, {"lora_B_layout": "?"}, "lora_B_layout to be one of .*but got '?'"),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    peft_mixture("qwen3_moe", target_modules=[]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_change_nothing(name, valid, tmp_path):
    tensors, fields, message = HOSTILE[name]
    for each in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / each).write_bytes((valid / each).read_bytes())
    edit(tmp_path, tensors, **fields)
    with_other = apply_lora(mixture(), LoRAConfig(["experts.down_proj"], r=2), "other")
    for model in (mixture(), with_other):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        types = [type(module) for module in model.modules()]
        with pytest.raises(AdapterError, match=message):
            load_adapter(model, tmp_path)
        assert [type(module) for module in model.modules()] == types
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
    load_adapter(mixture(), valid)  # is well-formed


LAYER = "base_model.model.model.layers.0.mlp.experts."
HOSTILE_LAYERS = {
    "one missing": (drop(LAYER + "3.up_proj.lora_B.weight"), {}, "lora_B of expert 3 is missing"),
    "one too many": (put(LAYER + "5.up_proj.lora_A.weight", 3, 16), {}, "of the 5 experts .*but g"),
    "another rank": (put(LAYER + "0.down_proj.lora_A.weight", 4, 12), {}, r"shape \[3, 12\]"),
    "another width": (put(LAYER + "2.up_proj.lora_B.weight", 13, 3), {}, r"shape \[12, 3\]"),
    "no dimension": (put(LAYER + "0.gate_proj.lora_A.weight"), {}, r"but got \[\]"),
    "another name": (put(LAYER + "0.w1.lora_A.weight", 3, 16), {}, "each tensor once"),
    "today's, too": (put(INNER + "lora_A.weight", 30, 16), {}, "each tensor once"),
    "a second zero": (put(LAYER + "00.up_proj.lora_A.weight", 3, 16), {}, "no other tensors"),
    "several alphas": (None, {"alpha_pattern": {"0.up_proj": 1}}, "one lora_alpha .*'1', '6'"),
}


@pytest.fixture(scope="module")
def valid_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid_layers")
    of_layers("qwen3_moe", folder)
    return folder


@pytest.mark.parametrize("name", HOSTILE_LAYERS)
def test_layers_of_experts_that_do_not_fit(name, valid_layers, tmp_path):
    tensors, fields, message = HOSTILE_LAYERS[name]
    for each in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / each).write_bytes((valid_layers / each).read_bytes())
    edit(tmp_path, tensors, **fields)
    model = mixture()
    types = [type(module) for module in model.modules()]
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, tmp_path)
    assert [type(module) for module in model.modules()] == types


def test_a_name_without_tensors_warns(valid, tmp_path):
    for each in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / each).write_bytes((valid / each).read_bytes())
    edit(tmp_path, target_parameters=[*BOTH, "mlp.gate.weight", "experts.w"])
    with pytest.warns(UserWarning, match="names 'experts.w', 'model.layers.0.mlp.gate.weight', "):
        load_adapter(mixture(), tmp_path)


@pytest.mark.parametrize("with_other", [False, True])
def test_an_error_in_the_middle_leaves_no_adapter(with_other, valid, monkeypatch):
    model = mixture()
    if with_other:
        apply_lora(model, LoRAConfig(["experts.down_proj"], r=2), "other")
    types, keys = [type(m) for m in model.modules()], list(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    add, calls = LoRAParameter.add_adapter, []

    def failing(self, *args):
        calls.append(self)
        if len(calls) == 4:
            raise MemoryError
        add(self, *args)

    monkeypatch.setattr(LoRAParameter, "add_adapter", failing)
    with pytest.raises(MemoryError):
        load_adapter(model, valid)
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_further_adapter_on_other_parameters(valid, tmp_path):
    """PEFT would refuse it: there all adapters are on the same parameters."""
    model = randomized(apply_lora(mixture(), LoRAConfig(["experts.down_proj"], r=2), "down"))
    expected = logits(model)
    load_adapter(model, valid, "both")
    assert torch.equal(logits(model), expected)
    assert isinstance(model.model.layers[0].mlp.experts, LoRAExperts)
    save_adapter(model, tmp_path, "down")
    assert torch.equal(logits(load_adapter(mixture(), tmp_path)), expected)
    lora_ext.models.set_adapter(model, "both")
    torch.testing.assert_close(logits(model), logits(load_adapter(mixture(), valid)))
