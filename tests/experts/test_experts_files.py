"""PEFT's folders of adapters on parameters: both ways, its versions, Unsloth's, hostile ones."""

import copy
import json
import warnings

import pytest
import torch
from hostile_helpers import assert_refused
from mixture_helpers import (
    KINDS,
    edit,
    edited,
    loaded_by_peft,
    logits,
    mixture,
    peft_mixture,
    put,
    randomized,
)
from safetensors.torch import save_file

import lora_ext
from lora_ext import LoraConfig, apply_lora, load_adapter, save_adapter
from lora_ext.nn import LoRAExperts, LoRAParameter

EXPERTS = "base_model.model.model.layers.0.mlp.experts."
INNER, OUTER = EXPERTS + "base_layer.", EXPERTS
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_here_is_the_same_in_peft(kind, tmp_path):
    base = mixture(kind)
    model = randomized(apply_lora(copy.deepcopy(base), LoraConfig("all-linear", r=3, lora_alpha=6)))
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
    config = LoraConfig(["gate_proj", "up_proj", "q_proj"], r=2)
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


def drop(key):
    return lambda tensors: tensors.pop(key)


def rename_outer(tensors):
    for key in ("lora_A.weight", "lora_B.weight"):
        tensors[f"{EXPERTS}base_layer.base_layer.{key}"] = tensors.pop(OUTER + key)


HOSTILE = {
    "no inner A": (drop(INNER + "lora_A.weight"), {}, "experts.base_layer.lora_A.weight' is miss"),
    "no outer B": (drop(OUTER + "lora_B.weight"), {}, "mlp.experts.lora_B.weight' is missing"),
    "a third wrapper": (
        put(EXPERTS + "base_layer.base_layer.lora_A.weight", 10, 16),
        {},
        r"lora_B for each of \['gate_up_proj', 'down_proj'\].*but the file has 3",
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
    "lora_bias": (None, {"lora_bias": True}, "lora_B.bias' is missing|no lora_bias"),
    "pissa": (
        None,
        {"init_lora_weights": "pissa"},
        "expected init_lora_weights True or 'gaussian'",
    ),
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
    folder = edited(valid, tmp_path, tensors, **fields)
    assert_refused(folder, message, mixture(), ["experts.down_proj"])
    load_adapter(mixture(), valid)  # is well-formed


def test_a_name_without_tensors_warns(valid, tmp_path):
    edited(valid, tmp_path, target_parameters=[*BOTH, "mlp.gate.weight", "experts.w"])
    with pytest.warns(UserWarning, match="names 'experts.w', 'model.layers.0.mlp.gate.weight', "):
        load_adapter(mixture(), tmp_path)


@pytest.mark.parametrize("with_other", [False, True])
def test_an_error_in_the_middle_leaves_no_adapter(with_other, valid, monkeypatch):
    model = mixture()
    if with_other:
        apply_lora(model, LoraConfig(["experts.down_proj"], r=2), "other")
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
    model = randomized(apply_lora(mixture(), LoraConfig(["experts.down_proj"], r=2), "down"))
    expected = logits(model)
    load_adapter(model, valid, "both")
    assert torch.equal(logits(model), expected)
    assert isinstance(model.model.layers[0].mlp.experts, LoRAExperts)
    save_adapter(model, tmp_path, "down")
    assert torch.equal(logits(load_adapter(mixture(), tmp_path)), expected)
    lora_ext.set_adapter(model, "both")
    torch.testing.assert_close(logits(model), logits(load_adapter(mixture(), valid)))
