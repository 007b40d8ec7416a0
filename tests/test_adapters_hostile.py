"""Broken and hostile adapter folders: each a clear error that names the culprit, and no change.

Every case takes a folder that PEFT wrote, breaks one thing, and loads it into a plain model and
into one that has an adapter already.
"""

import copy
import json
import os
import pickle
import shutil
import signal
import socket
import sys

import pytest
import torch
from adapter_helpers import (
    CONFIG,
    WEIGHTS,
    assert_unchanged,
    make_zoo,
    output,
    peft_model,
    read_config,
    read_tensors,
    save_peft,
    state_of,
    write_config,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lora_ext import LoRAConfig, apply_lora
from lora_ext.adapters import AdapterError, load_adapter, read_adapter_config
from lora_ext.modules import LoRALayer

Q0 = "base_model.model.layers.0.q_proj."
BIN = "adapter_model.bin"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A valid folder: 3 x q_proj of rank 2, the norm stored whole, biases of the layers."""
    folder = tmp_path_factory.mktemp("pristine")
    config = {
        "target_modules": ["q_proj"],
        "r": 2,
        "bias": "lora_only",
        "modules_to_save": ["norm"],
    }
    save_peft(peft_model(make_zoo(torch.float32), **config), folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "adapter")


@pytest.fixture(autouse=True)
def no_hang():
    """A FIFO in the place of a file, or a pattern, would wait for ever."""

    def stop(*_):
        raise TimeoutError("this hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def assert_refused(folder, message, base=None):
    """Into a plain model, and into one with an adapter, whose layers are there already."""
    base = make_zoo(torch.float32) if base is None else base
    adapted = apply_lora(copy.deepcopy(base), LoRAConfig("q_proj", r=3), adapter="other")
    for model in (base, adapted):
        before = state_of(model)
        with pytest.raises(AdapterError, match=message) as caught:
            load_adapter(model, folder)
        assert str(caught.value).startswith(f"lora_ext.load_adapter: {folder}: ")
        assert len(str(caught.value)) < 1500
        assert_unchanged(model, before)


def test_the_folder_is_valid_before_it_is_broken(folder):
    load_adapter(make_zoo(torch.float32), folder)


# ---- adapter_config.json ----


def fields(**changes):
    return pytest.param(changes, id=", ".join(f"{k}={str(v)[:30]}" for k, v in changes.items()))


class Raw(str):
    """JSON text for a value that json.dumps would not write."""


BAD_FIELDS = [
    # r
    (fields(r=0), "r to be an integer of 1 to 512, but got 0"),
    (fields(r=-2), "r to be an integer"),
    (fields(r=2.0), r"r to be an integer of 1 to 512, but got 2\.0"),
    (fields(r=True), "r to be an integer of 1 to 512, but got True"),
    (fields(r="2"), "r to be an integer of 1 to 512, but got '2'"),
    (fields(r=None), "r to be an integer"),
    (fields(r=513), "r to be an integer of 1 to 512, but got 513"),
    (fields(r=200_000), "but got 200000"),
    (fields(r=10**400), "r to be an integer of 1 to 512"),
    (fields(r=3), r"q_proj.lora_A.weight': expected shape \[3, 16\] \(rank 3 by the config"),
    # numbers
    (
        fields(lora_alpha="8"),
        "lora_alpha to be a number of at most 1e.09 .*got '8'",
    ),
    (fields(lora_alpha=True), "lora_alpha"),
    (fields(lora_alpha=None), "lora_alpha"),
    (fields(lora_alpha=Raw("NaN")), f"{CONFIG}: expected finite numbers, but got NaN"),
    (fields(lora_alpha=Raw("-Infinity")), "expected finite numbers, but got -Infinity"),
    (fields(lora_alpha=Raw("1e999")), "expected finite numbers, but got '1e999'"),
    (fields(lora_alpha=Raw("9" * 5000)), f"{CONFIG}: expected JSON, but got"),
    (fields(lora_alpha=10**400), "lora_alpha to be a number of at most"),
    (fields(lora_alpha=1e300), "lora_alpha to be a number of at most"),
    (fields(lora_dropout=1.0), r"lora_dropout in \[0, 1\), but got 1\.0"),
    (fields(lora_dropout=-0.1), "lora_dropout"),
    (fields(lora_dropout=True), "lora_dropout"),
    (fields(lora_dropout="0"), "lora_dropout"),
    # patterns
    (fields(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\] to be an integer of 1 to 512"),
    (fields(rank_pattern={"q_proj": 200_000}), r"rank_pattern\['q_proj'\].*but got 200000"),
    (fields(rank_pattern={"q_proj": True}), r"rank_pattern\['q_proj'\]"),
    (fields(rank_pattern={"q_proj": 5}), r"\[5, 16\] \(rank 5 by the config"),
    (fields(rank_pattern=["q_proj"]), "rank_pattern to be an object"),
    (fields(rank_pattern={"(a+)+$(": 2}), r"has a group that is not closed"),
    (fields(rank_pattern={"(?=q)q_proj": 2}), "has a lookahead at 2"),
    (fields(rank_pattern={"a" * 1025: 2}), "a key of rank_pattern .* at most 1024 characters"),
    (fields(alpha_pattern={"q_proj": "3"}), r"alpha_pattern\['q_proj'\] to be a number"),
    (fields(alpha_pattern={"q_proj": Raw("NaN")}), "expected finite numbers, but got NaN"),
    (fields(alpha_pattern={r"(q)\1": 3}), "a backreference"),
    # names
    (fields(target_modules=None), "target_modules to be names or an expression, but got None"),
    (fields(target_modules=[]), r"target_modules to be names or an expression, but got \[\]"),
    (fields(target_modules=["q_proj", 3]), "target_modules to be a printable string"),
    (fields(target_modules={"q_proj": 1}), "target_modules to be a list of names"),
    (fields(target_modules=["query"]), r"target_modules to match modules of the Zoo.*\('query',\)"),
    (fields(target_modules=["../../q_proj"]), r"module names in target_modules.*got '\.\./\.\./q_"),
    (fields(target_modules=["layers..q_proj"]), r"names in target_modules.*'layers\.\.q_"),
    (fields(target_modules=["a\u0000b"]), "target_modules to be a printable string"),
    (
        fields(target_modules="(.*)*x"),
        r"target_modules to match .*'\(\.\*\)\*x' matches none",
    ),
    (fields(target_modules="(a|a)*b"), "matches none"),
    (fields(target_modules=r"(?!a).*q_proj"), "has a lookahead"),
    (fields(target_modules=r"((.{64}){64}){64}"), "has more than 4096 states"),
    (fields(target_modules="[" * 600), "a class that is not closed"),
    (fields(target_modules="(" * 1000), "more than 64 groups inside each other"),
    (
        fields(target_modules=["q_proj", "mlp"]),
        r"layers.0.mlp.lora_A.weight'.*2 more is missing",
    ),
    (
        fields(target_modules=["q_proj", "head"]),
        r"at 'head', but the config targets a torch.nn.mod",
    ),
    (
        fields(target_modules=["layers"]),
        "'layers', but the config targets a torch.nn",
    ),
    (
        fields(target_modules=["layers.0.q_proj"]),
        r"layers.1.q_proj.lora_A.*does not target",
    ),
    (
        fields(exclude_modules=["layers.1.q_proj"]),
        r"layers.1.q_proj.lora_A.*does not target",
    ),
    (fields(exclude_modules="(?i)Q"), "has a flag"),
    (fields(modules_to_save=["../norm"]), "module names in modules_to_save"),
    (fields(modules_to_save="norm"), "modules_to_save to be a list of names, but got 'norm'"),
    (fields(modules_to_save=None), "no other tensors, but got 'base_model.model.norm.bias'"),
    (fields(modules_to_save=["norm", "head"]), r"'base_model.model.head.0.bias'.*is missing"),
    (fields(modules_to_save=["m"] * 1025), "at most 1024 names in modules_to_save"),
    (fields(layers_to_transform=[0, "1"]), "layers_to_transform to be indices"),
    (fields(layers_to_transform=True), "layers_to_transform to be indices"),
    (fields(layers_to_transform=-1), "layers_to_transform to be indices"),
    (fields(layers_to_transform=0, target_modules="q_proj"), "a list in target_modules beside"),
    (fields(layers_pattern="(a|b)*"), "names without an expression in layers_pattern"),
    # choices
    (fields(peft_type="IA3"), "peft_type 'LORA', but got 'IA3'"),
    (fields(peft_type="lora"), "peft_type 'LORA', but got 'lora'"),
    (fields(peft_type=None), "peft_type 'LORA', but got None"),
    (fields(bias="some"), "bias to be one of"),
    (fields(bias=["none"]), "bias to be one of"),
    (
        fields(bias="none"),
        r"no other tensors, but got .*layers.0.q_proj.base_layer",
    ),
    (fields(bias="all"), r"'base_model.model.c_attn.bias'.*is missing"),
    (fields(use_rslora=1), "use_rslora to be true or false, but got 1"),
    (fields(lora_bias="yes"), "lora_bias to be true or false"),
    (fields(lora_bias=True), r"q_proj.lora_B.bias'.*is missing"),
    (fields(fan_in_fan_out="x"), "fan_in_fan_out to be true or false"),
    (fields(inference_mode=0), "inference_mode to be true or false"),
    (fields(init_lora_weights="corda"), "init_lora_weights='corda' .*by the result of data"),
    (fields(init_lora_weights="loftq"), "init_lora_weights='loftq' .*of a quantization"),
    (fields(init_lora_weights="lora_ga"), "init_lora_weights='lora_ga' .*of gradients"),
    (fields(init_lora_weights="pissa_niter_16"), "'pissa_niter_16' .*of a random decomposition"),
    (fields(init_lora_weights="new"), "plain LoRA, but got init_lora_weights='new'"),
    (fields(init_lora_weights=[1]), r"plain LoRA, but got init_lora_weights=\[1\]"),
    (fields(init_lora_weights="pissa", lora_alpha=-1), "'pissa' for linear layers with a positive"),
    # information
    (fields(auto_mapping=["os.system"]), "auto_mapping to be an object"),
    (
        fields(auto_mapping={"parent_library": {"x": 1}}),
        r"auto_mapping\['parent_library'\]",
    ),
    (fields(auto_mapping={"base_model_class": "a" * 5000}), "at most 4096 characters"),
    (fields(base_model_name_or_path=3), "base_model_name_or_path to be a printable string"),
    (fields(base_model_name_or_path="a\nb"), "base_model_name_or_path to be a printable string"),
    (fields(revision="\u001b[2J"), "revision to be a printable string"),
    (fields(task_type="\ud800"), "task_type to be a printable string"),
    (fields(peft_version=["0.21.2"]), "peft_version to be a printable string"),
    # variants, at anything but their default
    (fields(use_dora=True), r"plain LoRA, but got use_dora=True \(DoRA\)"),
    (fields(use_dora=1), "use_dora=1"),
    (fields(use_qalora=True), "use_qalora=True"),
    (fields(use_bdlora={"nblocks": 2}), "use_bdlora="),
    (fields(velora_config={"num_groups": 4}), "velora_config="),
    (fields(kasa_config={"beta": 0.1}), "kasa_config="),
    (fields(arrow_config={"top_k": 3}), "arrow_config="),
    (fields(monteclora_config={"num_samples": 8}), "monteclora_config="),
    (fields(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens=\[1, 2\] \(aLoRA\)"),
    (fields(layer_replication=[[0, 2]]), "layer_replication="),
    (fields(target_parameters=["experts.w"]), "target_parameters="),
    (fields(trainable_token_indices=[1]), "trainable_token_indices="),
    (fields(trainable_token_indices={"emb": [1]}), "trainable_token_indices="),
    (fields(megatron_config={"x": 1}), "megatron_config="),
    (fields(megatron_core="os"), "megatron_core='os'"),
    (fields(loftq_config={"loftq_bits": 4}), "loftq_config="),
    (fields(ensure_weight_tying=True), "ensure_weight_tying=True"),
    (fields(use_dora=True, kasa_config={"a": 1}), "kasa_config=.*; use_dora=True"),
    (
        fields(brand_new_variant={"x": 1}),
        "fields of PEFT 0.21.2, but got 'brand_new_variant'",
    ),
    (fields(R=2), "fields of PEFT 0.21.2, but got 'R': 2"),
]


def write_raw(folder, table):
    text = json.dumps(table, ensure_ascii=True)
    for value in [
        *table.values(),
        *(v for t in table.values() if isinstance(t, dict) for v in t.values()),
    ]:
        if isinstance(value, Raw):
            text = text.replace(json.dumps(value), value)
    (folder / CONFIG).write_text(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [(p.values[0], m) for p, m in BAD_FIELDS],
    ids=[p.id for p, _ in BAD_FIELDS],
)
def test_a_bad_field(changes, message, folder):
    write_raw(folder, {**read_config(folder), **changes})
    assert_refused(folder, message)


def test_a_field_at_its_default_or_off_is_no_reason(folder):
    off = {
        "use_dora": False,
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "layer_replication": [],
        "rank_pattern": None,
        "brand_new_variant": None,
        "another": False,
        "eva_config": {"rho": 2.0},
        "corda_config": {"cache_file": "../../etc/passwd"},
        "runtime_config": {"ephemeral_gpu_offload": True},
        "qalora_group_size": 32,
    }
    write_config(folder, {**read_config(folder), **off})
    load_adapter(make_zoo(torch.float32), folder)


def test_fields_that_are_missing_have_peft_s_defaults(folder):
    write_config(folder, {"peft_type": "LORA", "target_modules": ["q_proj"]})
    config = read_adapter_config(folder)
    assert (config.r, config.alpha, config.bias, config.use_rslora) == (8, 8, "none", False)


NOT_JSON = [
    ("empty", b"", "expected JSON"),
    ("not an object", b'["peft_type", "LORA"]', "expected an object, but got"),
    ("a number", b"3", "expected an object"),
    ("cut short", b'{"peft_type": "LORA", "r', "expected JSON"),
    ("byte order mark", b'\xef\xbb\xbf{"peft_type": "LORA"}', "a byte order mark; remove it"),
    ("UTF-16", '{"peft_type": "LORA"}'.encode("utf-16"), "expected UTF-8"),
    ("not UTF-8", b'{"peft_type": "LORA\xff"}', "expected UTF-8"),
    ("duplicate key", b'{"peft_type": "LORA", "r": 2, "r": 4}', "each key once, but got 'r' twice"),
    (
        "duplicate key inside",
        b'{"peft_type": "LORA", "rank_pattern": {"q": 2, "q": 4}}',
        "each key once, but got 'q' twice",
    ),
    ("nesting of 17", b'{"a":' * 17 + b"1" + b"}" * 17, "at most 16 levels of nesting"),
    ("endless nesting", b"[" * 400_000, "at most 16 levels of nesting"),
    ("endless nesting, closed", b'{"a":' * 90_000 + b"1" + b"}" * 90_000, "levels of nesting"),
    ("2 MiB", b'{"peft_type": "' + b"a" * (2 << 20) + b'"}', "at most 1048576 bytes, but it has"),
    ("NUL", b'{"peft_type": "LORA\x00"}', "expected JSON"),
    ("comment", b'{"peft_type": "LORA"} // ok', "expected JSON"),
]


@pytest.mark.parametrize(
    ("data", "message"), [c[1:] for c in NOT_JSON], ids=[c[0] for c in NOT_JSON]
)
def test_a_config_that_is_no_plain_json(data, message, folder):
    (folder / CONFIG).write_bytes(data)
    assert_refused(folder, f"{CONFIG}: .*{message}")


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern"])
def test_catastrophic_expressions_end(field, folder):
    """With `re` any of these would take longer than the universe has existed."""
    table = read_config(folder)
    expressions = [r"([a-z0-9._]+)+!", r"(\w|\.|\w)*!", "(.*)*!", "((a|.)*)*!"]
    if field == "target_modules":
        for expression in expressions:
            write_config(folder, {**table, "target_modules": expression})
            assert_refused(folder, "matches none")
    else:
        write_config(folder, {**table, "rank_pattern": dict.fromkeys(expressions, 4)})
        load_adapter(make_zoo(torch.float32), folder)


@pytest.mark.parametrize(
    "pattern",
    ["(.|a|.)*{:05d}", "(a{{64}}){{60}}{:05d}", "{:05d}(a|b)?"],
    ids=["slow", "large", "many"],
)
def test_very_many_patterns_end(pattern, folder):
    """Within 1 MiB of config; what would take minutes or gigabytes is refused."""
    patterns = {pattern.format(number): 2 for number in range(40_000)}
    write_config(folder, {**read_config(folder), "rank_pattern": patterns})
    assert (folder / CONFIG).stat().st_size < 1 << 20
    base = make_zoo(torch.float32)
    with pytest.raises(AdapterError, match="the patterns of the config to take at most"):
        load_adapter(base, folder)


def test_very_many_layers_with_a_rank_of_their_own(folder):
    """One look-up a layer for the keys that are written here, which name one path each."""
    patterns = {rf"^model\.layers\.{n}\.q_proj": 4 for n in range(20_000)}
    write_config(folder, {**read_config(folder), "rank_pattern": patterns})
    load_adapter(make_zoo(torch.float32), folder)


# ---- adapter_model.safetensors ----


def edit_tensors(folder, edit):
    tensors = read_tensors(folder)
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS)


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


def change(key, function):
    return lambda tensors: tensors.__setitem__(key, function(tensors[key]))


def rename(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def rename_all(function):
    def edit(tensors):
        for key in list(tensors):
            tensors[function(key)] = tensors.pop(key)

    return edit


def fill(value, place=(0, 0)):
    def function(tensor):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return function


A, B = Q0 + "lora_A.weight", Q0 + "lora_B.weight"
NORM = "base_model.model.norm.weight"
BAD_TENSORS = {
    # keys
    "no lora_B": (lambda t: t.pop(B), r"q_proj.lora_B.weight' is missing"),
    "no lora_A": (lambda t: t.pop(A), r"q_proj.lora_A.weight' is missing"),
    "no bias": (lambda t: t.pop(Q0 + "base_layer.bias"), "base_layer.bias' is missing"),
    "no norm": (lambda t: t.pop(NORM), "norm.weight' is missing"),
    "nothing": (lambda t: t.clear(), r"q_proj.base_layer.bias', .* and 7 more is missing"),
    "one more": (put("base_model.model.extra", torch.ones(1)), "no other tensors.*model.extra'"),
    "one of no module": (
        put("base_model.model.layers.9.q_proj.lora_A.weight", torch.ones(2, 16)),
        "no other tensors, but got 'base_model.model.layers.9",
    ),
    "one of another module": (
        put("base_model.model.c_attn.lora_A.weight", torch.ones(2, 16)),
        r"c_attn.lora_A.weight', of a transformers.pytorch_utils.Conv1D that the config does not",
    ),
    "one of a module of no use": (
        put("base_model.model.norm.lora_A.weight", torch.ones(2, 10)),
        r"norm.lora_A.weight', of a torch.nn.modules.normalization.LayerNorm that the config",
    ),
    "DoRA": (
        put(Q0 + "lora_magnitude_vector", torch.ones(16)),
        "magnitude_vector': DoRA",
    ),
    "lora_bias": (put(Q0 + "lora_B.bias", torch.ones(16)), "lora_B.bias', of a"),
    "no key matches": (
        rename_all(lambda key: key.replace("base_model.model.", "transformer.")),
        "expected tensors such as 'base_model.model.layers.* but none matches; got 'transformer",
    ),
    "no prefix": (
        rename_all(lambda key: key.split(".", 2)[2]),
        "none matches; got 'layers",
    ),
    "lower case": (
        rename(A, A.replace("lora_A", "lora_a")),
        r"A.weight' is missing; there are",
    ),
    "two cases": (
        put(A.replace("q_proj", "Q_proj"), torch.ones(2, 16)),
        "got .*layers.0.Q_proj",
    ),
    "two spellings": (
        put(A.replace("lora_A", "lora_a"), torch.ones(2, 16)),
        "lora_a.weight', of a",
    ),
    "with an adapter's name": (
        rename(A, Q0 + "lora_A.default.weight"),
        "lora_A.weight' is missing",
    ),
    "an empty component": (
        rename(A, A.replace("layers.0", "layers..0")),
        "lora_A.weight' is missing",
    ),
    "a leading dot": (put(f".{A}", torch.ones(2, 16)), "no other tensors"),
    "traversal": (
        put("base_model.model.../../x.lora_A.weight", torch.ones(2, 16)),
        "no other tensors",
    ),
    "an embedding's key": (rename(A, Q0 + "lora_embedding_A"), "lora_A.weight' is missing"),
    "an empty name": (put("", torch.ones(1)), "no other tensors, but got ''"),
    # shapes
    "rank": (change(A, lambda a: a.repeat(2, 1)), r"\[2, 16\] \(rank 2 by .*but got \[4, 16\]"),
    "rank of B": (change(B, lambda b: b[:, :1]), r"lora_B.weight': expected shape \[16, 2\]"),
    "both ranks": (
        lambda t: (change(A, lambda a: a[:1])(t), change(B, lambda b: b[:, :1])(t)),
        r"rank 2 by the config",
    ),
    "transposed": (change(A, lambda a: a.t()), r"expected shape \[2, 16\].*but got \[16, 2\]"),
    "in features": (
        change(A, lambda a: a[:, :15]),
        r"16 in and 16 out .*got \[2, 15\]",
    ),
    "out features": (change(B, lambda b: b.repeat(2, 1)), r"but got \[32, 2\]"),
    "one dimension": (change(A, lambda a: a.flatten()), r"but got \[32\]"),
    "four dimensions": (change(A, lambda a: a[..., None, None]), r"but got \[2, 16, 1, 1\]"),
    "no elements": (
        lambda t: (put(A, torch.ones(0, 16))(t), put(B, torch.ones(16, 0))(t)),
        r"but got \[0, 16\]",
    ),
    "scalar": (put(A, torch.tensor(1.0)), r"but got \[\]"),
    "bias": (change(Q0 + "base_layer.bias", lambda b: b[:3]), r"expected shape \[16\].*got \[3\]"),
    "norm": (change(NORM, lambda w: w[:3]), r"norm.weight': expected shape \[10\].*but got \[3\]"),
    # dtypes and values
    "int8": (
        change(A, lambda a: a.to(torch.int8)),
        "lora_A.weight': expected a floating dtype",
    ),
    "int64": (change(B, lambda b: b.to(torch.int64)), "lora_B.weight': expected a floating dtype"),
    "bool": (change(A, lambda a: a > 0), "but got torch.bool"),
    "uint8 norm": (change(NORM, lambda w: w.to(torch.uint8)), "norm.weight': expected a floating"),
    "complex": (
        change(A, lambda a: a.to(torch.complex64)),
        "dtype to be one of F64.*got 'C64'",
    ),
    "NaN": (
        change(A, fill(float("nan"))),
        "lora_A.weight': expected finite values",
    ),
    "infinity": (change(B, fill(float("inf"), (-1, -1))), "lora_B.weight': expected finite values"),
    "NaN in half": (change(A, lambda a: fill(float("nan"))(a.half())), "expected finite values"),
    "NaN in float8": (
        change(A, lambda a: fill(float("nan"))(a).to(torch.float8_e5m2)),
        "expected finite values",
    ),
    "too large for float32": (
        change(A, lambda a: fill(1e300)(a.double())),
        "expected finite values",
    ),
    "NaN in a bias": (
        change(Q0 + "base_layer.bias", fill(float("nan"), 0)),
        "base_layer.bias': exp",
    ),
    "NaN in the norm": (
        change(NORM, fill(float("nan"), 0)),
        "norm.weight': expected finite values",
    ),
}


@pytest.mark.parametrize(("edit", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_bad_tensors(edit, message, folder):
    """vllm#34186: with keys that matched nothing, the base model was served in silence."""
    edit_tensors(folder, edit)
    assert_refused(folder, f"{WEIGHTS}: .*{message}")


def split(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def edit_entry(key=A, **changes):
    def edit(data):
        header, rest = split(data)
        header[key] = {**header[key], **changes}
        return joined(header, rest)

    return edit


def edit_header(function):
    def edit(data):
        header, rest = split(data)
        return joined(function(header), rest)

    return edit


def same_offsets(header):
    header[A]["data_offsets"] = header[B]["data_offsets"]
    return header


def with_gap(data):
    header, rest = split(data)
    end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][1] == end:
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    return joined(header, rest + b"1234")


def without(field):
    def function(header):
        del header[A][field]
        return header

    return edit_header(function)


BAD_FILES = {
    "empty": (lambda d: b"", "expected a safetensors file, but it has 0 bytes"),
    "four bytes": (lambda d: d[:4], "but it has 4 bytes"),
    "cut in the header": (lambda d: d[:100], "its length says .* the file is cut short"),
    "cut in the data": (lambda d: d[:-1], "bytes of data, but the file has .* it is cut short"),
    "appended": (lambda d: d + b"x", "or has something appended"),
    "length of 2^63": (
        lambda d: bytes(7) + b"\x80" + d[8:],
        "says 922337203685477580",
    ),
    "length of 2^64 - 1": (lambda d: b"\xff" * 8 + d[8:], "says 18446744073709551615"),
    "length of 0": (lambda d: bytes(8) + d[8:], r"does not begin with '\{'"),
    "length one short": (
        lambda d: (int.from_bytes(d[:8], "little") - 40).to_bytes(8, "little") + d[8:],
        "expected JSON",
    ),
    "not JSON": (edit_header(lambda h: b"{this is no header}"), "expected JSON"),
    "a list": (edit_header(lambda h: b"[1, 2]"), r"does not begin with '\{'"),
    "leading space": (edit_header(lambda h: b" " + json.dumps(h).encode()), "does not begin with"),
    "not UTF-8": (edit_header(lambda h: b'{"\xff": 1}'), "expected UTF-8"),
    "duplicate key": (
        edit_header(lambda h: json.dumps(h).encode()[:-1] + b', "' + A.encode() + b'": {}}'),
        "expected each key once",
    ),
    "nesting": (edit_header(lambda h: b'{"a":' * 50_000), "levels of nesting"),
    "NaN": (edit_header(lambda h: b'{"a": NaN}'), "expected finite numbers"),
    "metadata": (
        edit_header(lambda h: {**h, "__metadata__": {"a": 1}}),
        "__metadata__ to be",
    ),
    "metadata list": (edit_header(lambda h: {**h, "__metadata__": ["a"]}), "__metadata__ to be"),
    "entry of another kind": (
        edit_header(lambda h: {**h, A: 3}),
        "A.weight': expected an object",
    ),
    "no dtype": (without("dtype"), "expected an object of dtype, shape and data_offsets"),
    "no shape": (without("shape"), "expected an object of dtype, shape and data_offsets"),
    "one field more": (
        edit_entry(strides=[1, 2]),
        "expected an object of dtype, shape and data_off",
    ),
    "unknown dtype": (edit_entry(dtype="F7"), "dtype to be one of .*, but got 'F7'"),
    "dtype of another kind": (edit_entry(dtype=["F32"]), "dtype to be one of"),
    # onnxruntime and llama.cpp trusted such shapes and read beyond the data
    "a larger shape": (edit_entry(shape=[4, 16]), "expected 256 bytes for F32 of shape .*span 128"),
    "a huge shape": (edit_entry(shape=[1 << 40, 1 << 40]), "data_offsets span 128"),
    "an overflowing shape": (edit_entry(shape=[1 << 32, 1 << 32, 2]), "data_offsets span 128"),
    "a size of 2^70": (edit_entry(shape=[1 << 70, 1]), "expected a shape of sizes"),
    "a negative size": (edit_entry(shape=[-2, -16]), "expected a shape of sizes"),
    "a size of true": (edit_entry(shape=[True, 32]), "expected a shape of sizes"),
    "a size of 2.0": (edit_entry(shape=[2.0, 16]), "expected a shape of sizes"),
    "nine dimensions": (
        edit_entry(shape=[2, 16, 1, 1, 1, 1, 1, 1, 1]),
        "expected a shape of sizes",
    ),
    "another shape of the size": (edit_entry(shape=[16, 2]), r"expected shape \[2, 16\]"),
    "another dtype of the size": (edit_entry(dtype="I32"), "expected a floating dtype"),
    "half the dtype": (edit_entry(dtype="F16"), "expected 64 bytes for F16"),
    "offsets exchanged": (edit_entry(data_offsets=[128, 0]), "expected its data at"),
    "offsets beyond": (edit_entry(data_offsets=[1 << 40, (1 << 40) + 128]), "expected its data at"),
    "negative offsets": (edit_entry(data_offsets=[-128, 0]), r"data_offsets \[begin, end\]"),
    "three offsets": (edit_entry(data_offsets=[0, 1, 2]), r"data_offsets \[begin, end\]"),
    "overlapping": (edit_header(same_offsets), "tensors overlap or leave a gap"),
    "gap": (with_gap, "tensors overlap or leave a gap"),
    "pickle": (
        lambda d: pickle.dumps({"a": torch.ones(2)}),
        "its length says .* is no safetensors",
    ),
    "zip": (lambda d: b"PK\x03\x04" + bytes(400), "its length says|does not begin"),
}


@pytest.mark.parametrize(("edit", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file(edit, message, folder):
    path = folder / WEIGHTS
    path.write_bytes(edit(path.read_bytes()))
    assert_refused(folder, f"{WEIGHTS}: .*{message}")


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_damage_is_refused_or_harmless(data, pristine, tmp_path):
    """What loads after damage is a valid safetensors file of finite values."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = bytearray((pristine / WEIGHTS).read_bytes())
    header = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, min(len(content) - 1, header + 40)))
        content[where] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789"[]{},:'))
    shutil.copy(pristine / CONFIG, tmp_path / CONFIG)
    (tmp_path / WEIGHTS).write_bytes(content)
    model = nn.Module()
    model.layers = make_zoo(torch.float32).layers
    model.norm = nn.LayerNorm(10)
    before = state_of(model)
    try:
        load_adapter(model, tmp_path)
    except AdapterError:
        assert_unchanged(model, before)
        return
    try:
        tensors = load(bytes(content))
    except SafetensorError:
        pytest.fail("safetensors refuses what was loaded")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


# ---- files ----


def test_files_that_are_missing(folder, tmp_path):
    (folder / WEIGHTS).rename(folder / "elsewhere")
    assert_refused(folder, f"expected {WEIGHTS}, but the folder has none")
    (folder / BIN).write_bytes(pickle.dumps({}))
    assert_refused(folder, f"there is only {BIN}, a pickle, which can run any code")
    (folder / "elsewhere").rename(folder / WEIGHTS)
    load_adapter(make_zoo(torch.float32), folder)  # beside a pickle that is not looked at
    (folder / CONFIG).unlink()
    assert_refused(folder, f"expected {CONFIG}, but the folder has none")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", f"expected {CONFIG}, but the folder has none")
    assert_refused(tmp_path / "none", f"a folder with {CONFIG} .*, but got nothing there")
    assert_refused(folder / WEIGHTS, "expected a folder .*, but got a file")
    assert_refused("a\0b", "but got nothing there")


def test_a_file_of_another_case_is_not_taken(folder):
    (folder / WEIGHTS).rename(folder / WEIGHTS.capitalize())
    assert_refused(folder, f"expected {WEIGHTS}, but the folder has none")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["directory", "FIFO", "socket"])
def test_something_else_in_the_place_of_a_file(name, kind, folder, monkeypatch):
    (folder / name).unlink()
    monkeypatch.chdir(folder)  # the path of a socket is short
    if kind == "directory":
        (folder / name).mkdir()
    elif kind == "FIFO":
        os.mkfifo(folder / name)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    assert_refused(folder, f"{name}: expected a (regular|readable) file, but got")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["absolute", "relative", "chain", "loop", "dangling", "device"])
def test_links_out_of_the_folder(name, kind, folder, tmp_path):
    outside = tmp_path / "outside" / name
    outside.parent.mkdir()
    (folder / name).rename(outside)
    targets = {
        "absolute": outside,
        "relative": f"../outside/{name}",
        "chain": "inner",
        "loop": name,
        "dangling": "nowhere",
        "device": "/dev/zero",
    }
    if kind == "chain":
        (folder / "inner").symlink_to(outside)
    (folder / name).symlink_to(targets[kind])
    message = {
        "loop": "expected a readable file, but got Too many levels of symbolic links",
        "dangling": f"expected {name}, but the folder has none",
    }.get(kind, f"{name}: expected a file in the folder, but it is a link to ")
    assert_refused(folder, message)


def test_links_that_are_allowed(folder, tmp_path):
    """Inside the folder, to the folder, and those of the Hugging Face cache."""
    (folder / CONFIG).rename(folder / "real.json")
    (folder / CONFIG).symlink_to("real.json")
    (tmp_path / "link").symlink_to(folder)
    load_adapter(make_zoo(torch.float32), tmp_path / "link")

    cache = tmp_path / "models--some--adapter"
    for sub in ("", "sub"):
        snapshot = cache / "snapshots" / "0123abc" / sub
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir(exist_ok=True)
        for name, source in ((CONFIG, "real.json"), (WEIGHTS, WEIGHTS)):
            shutil.copy(folder / source, cache / "blobs" / f"blob-{name}")
            up = "../../../" if sub else "../../"
            (snapshot / name).symlink_to(f"{up}blobs/blob-{name}")
        load_adapter(make_zoo(torch.float32), snapshot)
    (cache / "blobs" / "deeper").mkdir()
    (cache / "blobs" / f"blob-{WEIGHTS}").rename(cache / "blobs" / "deeper" / "blob")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../../blobs/deeper/blob")
    assert_refused(snapshot, f"{WEIGHTS}: expected a file in the folder, but it is a link")


# ---- nothing is imported, opened or run ----

RECORDED: list | None = None


def record(event, arguments):
    if RECORDED is not None and event in (
        "open",
        "import",
        "exec",
        "subprocess.Popen",
        "os.system",
    ):
        RECORDED.append((event, arguments[0]))


sys.addaudithook(record)  # an audit hook cannot be removed: this one sleeps outside its test


def test_nothing_that_a_config_names_is_imported_or_opened(folder):
    """peft#3085, #2888: a config led to an import."""
    global RECORDED
    names = {
        "auto_mapping": {"base_model_class": "Popen", "parent_library": "antigravity"},
        "base_model_name_or_path": "../../../etc/passwd",
        "revision": "../../main",
        "peft_version": "../1",
        "corda_config": {"cache_file": "/etc/passwd", "covariance_file": "/dev/zero"},
        "runtime_config": {"ephemeral_gpu_offload": "__import__('os').abort()"},
    }
    write_config(folder, {**read_config(folder), **names})
    base = make_zoo(torch.float32)
    load_adapter(copy.deepcopy(base), folder)
    modules = set(sys.modules)
    RECORDED = []
    try:
        load_adapter(base, folder)
    finally:
        events, RECORDED = RECORDED, None
    assert sorted(events) == [("open", str(folder / CONFIG)), ("open", str(folder / WEIGHTS))]
    assert set(sys.modules) == modules
    assert read_adapter_config(folder).base_model_name_or_path == "../../../etc/passwd"


# ---- models that do not fit ----


class Linear8bit(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)


class OwnLinear(nn.Linear):
    pass


def integer_linear():
    layer = nn.Linear(16, 16)
    weight = torch.ones(16, 16, dtype=torch.int8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def hooked_linear():
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Linear8bit, r"at 'layers.1.q_proj', but the config targets a .*\.Linear8bit"),
        (lambda: OwnLinear(16, 16), r"'layers.1.q_proj', but the config targets a .*\.OwnLinear"),
        (lambda: nn.Bilinear(4, 4, 4), r"targets a torch.nn.modules.linear.Bilinear"),
        (integer_linear, r"'layers.1.q_proj': .*expected a floating weight, but got torch.int8"),
        (hooked_linear, r"'layers.1.q_proj' cannot be adapted: .*its forward is replaced"),
        (lambda: nn.Linear(16, 8), r"layers.1.q_proj.lora_B.weight': expected shape \[8, 2\]"),
        (
            lambda: nn.Linear(16, 16, bias=False),
            "no other tensors, .*1.q_proj.base_layer.bias",
        ),
        (lambda: nn.Identity(), "targets a torch.nn.modules.linear.Identity"),
        (lambda: nn.Conv2d(16, 16, 3), "targets a torch.nn.modules.conv.Conv2d"),
    ],
    ids=["8 bit", "subclass", "bilinear", "integer", "hook", "shape", "bias", "identity", "3x3"],
)
def test_a_module_that_cannot_have_the_adapter(make, message, folder):
    base = make_zoo(torch.float32)
    base.layers[1].q_proj = make()
    before = state_of(base)
    with pytest.raises(AdapterError, match=message):
        load_adapter(base, folder)
    assert_unchanged(base, before)


def test_a_model_with_more_layers(folder):
    base = make_zoo(torch.float32)
    base.layers.append(copy.deepcopy(base.layers[0]))
    assert_refused(
        folder, r"layers.3.q_proj.lora_A.weight'.*is missing.*base's result would be", base
    )


# ---- all or nothing ----


class Failure(BaseException):
    pass


def failing(function, count, after=False):
    """The function, which fails in its call number `count`."""
    calls = iter(range(10**6))

    def call(*args, **kwargs):
        number = next(calls)
        if number == count and not after:
            raise Failure
        result = function(*args, **kwargs)
        if number == count:
            raise Failure
        return result

    return call


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "last"),
    [
        (LoRALayer, "add_adapter", 3),
        (torch.Tensor, "copy_", 10),
        ("lora_ext.adapters.load", "install", 1),
    ],
)
def test_a_failure_at_any_point_changes_nothing(owner, name, last, adapted, folder, monkeypatch):
    base = make_zoo(torch.float32)
    if adapted:
        apply_lora(base, LoRAConfig("layers.1.q_proj", r=3), adapter="other")
    expected = output(base)
    before = state_of(base)
    owner = sys.modules[owner] if isinstance(owner, str) else owner
    for count in range(last):
        for after in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing(getattr(owner, name), count, after))
                with pytest.raises(Failure):
                    load_adapter(base, folder)
            assert_unchanged(base, before)
            assert torch.equal(output(base), expected)
    load_adapter(base, folder)
