"""Adapters in the layouts of other programs: written, read by their rules, converted from each into
each."""

import contextlib
import copy
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from mixture_helpers import loaded_by_peft, logits, mixture, randomized
from safetensors import safe_open
from safetensors.torch import load_file

import lora_ext.adapters.save
from lora_ext import LoraConfig, apply_lora, load_adapter, save_adapter
from lora_ext.adapters import AdapterError, read_adapter_config
from lora_ext.adapters.__main__ import convert
from lora_ext.adapters.layouts import LAYOUTS
from lora_ext.nn import LoRALayer, LoRAParameter

KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
PREFIX = "base_model.model."
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def weights_of(model):
    """name -> W + s B A in float64, of all layers with adapters."""
    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoRALayer):
            continue
        if isinstance(layer, LoRAParameter):
            found[layer.name_at(path)] = layer.matrix(layer.effective_weight())
        else:
            spec = layer.spec_of("default")
            lora_a, lora_b = layer.factors("default")
            found[path] = layer.weight + spec.scaling * lora_b @ lora_a
    return {name: value.detach() for name, value in found.items()}


def apart(model):
    """The model with B of gate and up block-diagonal, as two adapters have it."""
    for layer in model.modules():
        if isinstance(layer, LoRAParameter) and layer.parameter == "gate_up_proj":
            lora_b = layer.lora_b["default"].data
            blocks = lora_b.view(len(lora_b), 2, -1, layer.count)
            rows = torch.arange(len(lora_b))
            is_up = rows >= len(rows) // 2 if layer.module.is_concatenated else rows % 2 == 1
            blocks[is_up, 0], blocks[~is_up, 1] = 0, 0
    return model


def adapted(base, *targets, **words):
    config = LoraConfig(list(targets) or ["all-linear"], **{"r": 3, "lora_alpha": 6, **words})
    return randomized(apply_lora(copy.deepcopy(base), config))


def save(model, folder, layout, base=None):
    save_adapter(model, folder, layout=layout, base_model_name_or_path=base and str(base))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """kind -> (model, folder of its checkpoint)."""
    found = {}
    for kind in KINDS:
        found[kind] = mixture(kind), tmp_path_factory.mktemp(kind)
        found[kind][0].save_pretrained(found[kind][1])
    return found


def as_an_engine(folder, base, kind):
    """name -> W + s B A of a folder by the rules of vLLM and SGLang: one scaling, alpha / r, and
    names of checkpoints."""
    config, tensors = read_adapter_config(folder), tensors_of(folder)
    parameters = dict(base.named_parameters())
    names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        lora_b = tensors.pop(key.replace("lora_A", "lora_B"))
        delta = config.lora_alpha / config.r * lora_b @ tensors.pop(key)
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        path = path.replace(".block_sparse_moe.", ".mlp.")
        found[path] = delta
    assert not tensors
    deltas = {}
    for path in [path for path in found if ".experts." in path]:
        start, _, rest = path.partition(".experts.")
        e, _, name = rest.rpartition(".")
        place = (names if e else ("w1", "w3", "w2")).index(name)
        delta = found.pop(path)
        for number in [int(e)] if e else range(5):
            own = deltas.setdefault(start, {}).setdefault(number, {})
            own[place] = delta if e else delta[number % len(delta)]
    for start, of_experts in deltas.items():
        every = [of_experts[e] for e in range(5)]
        both = [torch.stack([each[i] for each in every]) for i in range(3)]
        up = torch.stack(both[:2], 2).flatten(1, 2) if kind == "gpt_oss" else torch.cat(both[:2], 1)
        found |= {f"{start}.experts.gate_up_proj": up, f"{start}.experts.down_proj": both[2]}
    for name, delta in found.items():
        weight = parameters.get(name, parameters.get(f"{name}.weight"))
        is_transposed = kind == "gpt_oss" and ".experts." in name
        found[name] = delta + (weight.mT if is_transposed else weight)
    return found


def assert_same(found, expected, **words):
    found = {name.removesuffix(".weight"): value for name, value in found.items()}
    expected = {name.removesuffix(".weight"): value for name, value in expected.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **words)


ADAPTERS = {
    "gate and up apart": (lambda base: apart(adapted(base)), True),
    "together": (lambda base: adapted(base, use_rslora=True), False),
    "several scalings": (
        lambda base: adapted(
            base, *BOTH, "o_proj", rank_pattern={"o_proj": 5}, alpha_pattern={BOTH[1]: 7}
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_layout_into_each(kind, name, bases, tmp_path):
    base, at = bases[kind]
    make, keeps_ranks = ADAPTERS[name]
    expected = weights_of(model := make(base))
    folders = {layout: save(model, tmp_path / layout, layout, at) for layout in LAYOUTS}
    for source, folder in folders.items():
        assert_same(weights_of(load_adapter(copy.deepcopy(base), folder)), expected)
        if source != "peft":
            assert_same(as_an_engine(folder, base, kind), expected)
        following = LAYOUTS[LAYOUTS.index(source) - 2]
        for layout in set(LAYOUTS) - {source} if keeps_ranks else [following]:
            target = tmp_path / f"{source} to {layout}"
            convert(folder, target, layout)
            if keeps_ranks:
                found, own = tensors_of(target), tensors_of(folders[layout])
                assert found.keys() == own.keys()
                assert all(torch.equal(found[key], own[key]) for key in own)
            else:
                assert_same(weights_of(load_adapter(copy.deepcopy(base), target)), expected)


def test_the_bias_of_a_router_comes_with_its_adapter(bases, tmp_path):
    """As in PEFT, whose wrapper has it as any other layer."""
    base, _ = bases["gpt_oss"]
    model = adapted(base, "router")
    save_adapter(model, tmp_path, bias="lora_only")
    assert any(key.endswith(".router.base_layer.bias") for key in tensors_of(tmp_path))
    assert_same(weights_of(load_adapter(copy.deepcopy(base), tmp_path)), weights_of(model))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_names_are_those_of_checkpoints(kind, bases, tmp_path):
    """Which transformers writes; of gpt-oss they are stacks."""
    base, at = bases[kind]
    save(adapted(base), tmp_path, "per-expert")
    with safe_open(at / "model.safetensors", "pt") as file:
        known = set(file.keys())
    for key in tensors_of(tmp_path):
        assert key.removeprefix(PREFIX).partition(".lora_")[0] + ".weight" in known


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_peft_converts_the_layers_of_experts(kind, use_rslora, bases, tmp_path):
    base = bases[kind][0]
    model = adapted(base, use_rslora=use_rslora)
    save(model, tmp_path, "per-expert")
    torch.testing.assert_close(logits(loaded_by_peft(base, tmp_path)), logits(model))


def in_dtype(model, dtype):
    for layer in model.modules():
        for table in (layer.lora_a, layer.lora_b) if isinstance(layer, LoRALayer) else ():
            table["default"].data = table["default"].data.to(dtype)
    return model


def test_the_dtype_is_kept(bases, tmp_path):
    base, at = bases["qwen3_moe"]
    folder = save(in_dtype(adapted(base), torch.bfloat16), tmp_path / "own", "peft", at)
    convert(folder, tmp_path / "other", "stacked")
    assert {value.dtype for value in tensors_of(tmp_path / "other").values()} == {torch.bfloat16}


@pytest.mark.parametrize(("alpha", "is_exact"), [(7, False), (24, True)])
def test_a_factor_that_would_be_rounded_becomes_a_float(alpha, is_exact, bases, tmp_path):
    """B of the down projection is multiplied by alpha / 6."""
    model = adapted(bases["qwen3_moe"][0], *BOTH, "o_proj", alpha_pattern={BOTH[1]: alpha})
    save(in_dtype(model, torch.bfloat16), tmp_path, "per-expert")
    for key, value in tensors_of(tmp_path).items():
        is_rounded = key.endswith("down_proj.lora_B.weight") and not is_exact
        assert value.dtype == (torch.float32 if is_rounded else torch.bfloat16)


# ---- what is read back ----


def on(*ends):
    """The keys with these ends, of the first layer."""
    return [f"{PREFIX}model.layers.0.mlp.experts.{end}.weight" for end in ends]


def swap(first, second):
    def change(tensors):
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def each(*changes):
    return lambda tensors: [change(tensors) for change in changes]


def onto(key, function):
    return lambda tensors: tensors.__setitem__(key, function(tensors[key]).contiguous())


def peft_transposed(tensors):
    """A^T as B and B^T as A, as PEFT before 0.19.1 has it."""
    key_a, key_b = on("lora_A", "lora_B")
    lora_a, lora_b = tensors[key_a].view(5, 3, 16), tensors[key_b].view(16, 3, 5)
    tensors[key_a] = lora_b.permute(2, 1, 0).reshape(15, 16)
    tensors[key_b] = lora_a.permute(2, 1, 0).reshape(16, 15)


def transposed(end, count):
    """A^T as B and B^T as A of projections whose sides are equal."""
    keys = [on(f"{number}{end}.lora_A", f"{number}{end}.lora_B") for number in count]

    def change(tensors):
        for key_a, key_b in keys:
            lora_a, lora_b = tensors[key_a], tensors[key_b]
            tensors[key_a], tensors[key_b] = lora_b.mT.contiguous(), lora_a.mT.contiguous()

    return change


EVERY = [f"{e}." for e in range(5)]
GATE_UP_B = on("base_layer.lora_B")[0]
FAULTS = {
    "transposed in PEFT's": ("peft", peft_transposed),
    "gate and up swapped in PEFT's": ("peft", onto(GATE_UP_B, lambda b: b.roll(16, 0))),
    "expert slowest in PEFT's B": (
        "peft",
        onto(GATE_UP_B, lambda b: b.view(32, -1, 5).transpose(1, 2).reshape(b.shape)),
    ),
    "transposed per expert": ("per-expert", transposed("down_proj", EVERY)),
    "gate and up swapped per expert": (
        "per-expert",
        each(
            *(
                swap(*on(f"{e}gate_proj.lora_{f}", f"{e}up_proj.lora_{f}"))
                for e in EVERY
                for f in "AB"
            )
        ),
    ),
    "experts in another order": (
        "per-expert",
        each(*(swap(*on(f"0.down_proj.lora_{f}", f"4.down_proj.lora_{f}")) for f in "AB")),
    ),
    "one left out": ("per-expert", lambda t: [t.pop(key) for key in on("3.up_proj.lora_A")]),
    "one that nothing reads": (
        "per-expert",
        lambda t: t.__setitem__(on("5.up_proj.lora_A")[0], torch.ones(3, 16)),
    ),
    "transposed in one tensor": ("stacked", transposed("w2", [""])),
    "gate and up swapped in one tensor": (
        "stacked",
        each(*(swap(*on(f"w1.lora_{f}", f"w3.lora_{f}")) for f in "AB")),
    ),
    "expert slowest in one tensor": (
        "stacked",
        onto(on("w3.lora_B")[0], lambda b: b.permute(1, 2, 0).reshape(b.shape)),
    ),
}


@pytest.fixture(scope="module")
def square():
    """A model whose experts' down projections have as many inputs as outputs."""
    return adapted(mixture("qwen3_moe", moe_intermediate_size=16), *BOTH, "o_proj")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_not_put_in_place(name, square, tmp_path, monkeypatch):
    layout, change = FAULTS[name]
    save(square, tmp_path, layout)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = lora_ext.adapters.save.laid_out

    def faulty(*args):
        config, tensors = real(*args)
        change(tensors)
        return config, tensors

    monkeypatch.setattr(lora_ext.adapters.save, "laid_out", faulty)
    with pytest.raises(AdapterError, match=r"that reads back as .* folder is unchanged"):
        save(square, tmp_path, layout)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("peft", {"lora_alpha": 7}),
        ("stacked", {"lora_alpha": 7}),
        ("stacked", {"r": 4}),
        ("per-expert", {"use_rslora": True}),
        ("per-expert", {"lora_alpha": 7, "alpha_pattern": {".*": 6}}),  # which some engines ignore
    ],
)
def test_a_fault_of_the_config(layout, fields, square, tmp_path, monkeypatch):
    real = lora_ext.adapters.save.laid_out

    def faulty(*args):
        config, tensors = real(*args)
        return replace(config, **fields), tensors

    monkeypatch.setattr(lora_ext.adapters.save, "laid_out", faulty)
    with pytest.raises(AdapterError, match=r"but got .*(other values|scaling|shape)"):
        save(square, tmp_path, layout)


# ---- errors, and the command ----


def test_what_a_layout_cannot_say(bases, tmp_path):
    base, at = bases["qwen3_moe"]
    with pytest.raises(AdapterError, match=r"layout to be one of \('peft', .*but got 'vllm'"):
        save(adapted(base, "o_proj"), tmp_path, "vllm")
    assert not list(tmp_path.iterdir())
    save(adapted(base, "o_proj"), tmp_path, "peft")
    with pytest.raises(AdapterError, match="expected the name of the base, --base, but got none"):
        convert(tmp_path, tmp_path / "other", "stacked")
    convert(tmp_path, tmp_path / "other", "stacked", str(at))


def test_the_command(bases, tmp_path, monkeypatch):
    base, at = bases["qwen3_moe"]
    folder = save(adapted(base), tmp_path / "own", "peft", at)
    words = ["convert", str(folder), str(tmp_path / "other"), "--layout", "per-expert"]
    monkeypatch.setattr(sys, "argv", ["lora_ext.adapters", *words])
    runpy.run_module("lora_ext.adapters", run_name="__main__")
    save(adapted(base), tmp_path / "expected", "per-expert")
    found, expected = (tensors_of(tmp_path / name) for name in ("other", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    monkeypatch.setattr(sys, "argv", ["lora_ext.adapters", *words[:-1], "vllm"])
    with pytest.raises(SystemExit), contextlib.redirect_stderr(None):
        runpy.run_module("lora_ext.adapters", run_name="__main__")
