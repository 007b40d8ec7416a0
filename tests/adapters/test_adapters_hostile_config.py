"""A broken adapter_config.json: the error names the field or says what is no plain JSON."""

import json

import pytest
import torch
from adapter_helpers import CONFIG, make_zoo, read_config, write_config
from hostile_helpers import assert_refused

from lora_ext.adapters import load_adapter, read_adapter_config
from lora_ext.adapters.parameters import without_wrappers
from lora_ext.strict_json import _object_of_unique_keys

pytestmark = pytest.mark.usefixtures("no_hang")


def test_the_folder_is_valid_before_it_is_broken(folder):
    load_adapter(make_zoo(torch.float32), folder)


class Raw(str):
    """JSON text for a value that json.dumps would not write."""


BAD_FIELDS = [
    # r
    (dict(r=0), "r to be an integer of 1 to 512, but got 0"),
    (dict(r=-2), "r to be an integer"),
    (dict(r=2.0), r"r to be an integer of 1 to 512, but got 2\.0"),
    (dict(r=True), "r to be an integer of 1 to 512, but got True"),
    (dict(r="2"), "r to be an integer of 1 to 512, but got '2'"),
    (dict(r=None), "r to be an integer"),
    (dict(r=513), "r to be an integer of 1 to 512, but got 513"),
    (dict(r=200_000), "but got 200000"),
    (dict(r=10**400), "r to be an integer of 1 to 512"),
    (dict(r=3), r"q_proj.lora_A.weight': expected shape \[3, 16\] \(rank 3 by the config"),
    # numbers
    (dict(lora_alpha="8"), "lora_alpha to be a finite number, but got '8'"),
    (dict(lora_alpha=True), "lora_alpha"),
    (dict(lora_alpha=None), "lora_alpha to be a finite number, but got None"),
    (dict(lora_alpha=Raw("NaN")), f"{CONFIG}: expected lora_alpha to be a finite .* got nan"),
    (dict(lora_alpha=Raw("-Infinity")), "lora_alpha to be a finite number, but got -inf"),
    (dict(lora_alpha=Raw("1e999")), "lora_alpha to be a finite number, but got inf"),
    (dict(lora_alpha=Raw("9" * 5000)), f"{CONFIG}: expected JSON, but got"),
    (dict(lora_alpha=10**400), "lora_alpha to be a finite number"),
    (dict(lora_dropout=1.0), r"lora_dropout in \[0, 1\), but got 1\.0"),
    (dict(lora_dropout=-0.1), "lora_dropout"),
    (dict(lora_dropout=True), "lora_dropout"),
    (dict(lora_dropout="0"), "lora_dropout"),
    # patterns
    (dict(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\] to be an integer of 1 to 512"),
    (dict(rank_pattern={"q_proj": 200_000}), r"rank_pattern\['q_proj'\].*but got 200000"),
    (dict(rank_pattern={"q_proj": True}), r"rank_pattern\['q_proj'\]"),
    (dict(rank_pattern=["q_proj"]), "rank_pattern to be an object"),
    (dict(alpha_pattern={"q_proj": "3"}), r"alpha_pattern\['q_proj'\] to be a finite number"),
    (dict(alpha_pattern={"q_proj": Raw("NaN")}), "finite number, but got nan"),
    (dict(alpha_pattern={"q" * (1 << 14) + "q": 3}), "at most 16384 characters .* has 16385"),
    (dict(alpha_pattern={"q_proj(": 3}), r"an expression in alpha_pattern, but got 'q_proj\('"),
    # names
    (dict(target_modules=["q_proj", 3]), "target_modules to be a list of names"),
    (dict(target_modules={"q_proj": 1}), "target_modules to be a list of names"),
    (dict(exclude_modules=3), "exclude_modules to be a list of names"),
    (dict(modules_to_save="norm"), "modules_to_save to be a list of names, but got 'norm'"),
    (dict(modules_to_save=[""]), "names in modules_to_save, none of them empty"),
    (dict(modules_to_save=None), "LoRA tensors alone, but got 'base_model.model.norm.bias'"),
    (dict(modules_to_save=["norm", "head"]), r"'base_model.model.head.0.bias'.*is missing"),
    (dict(modules_to_save=["m"] * 1025), "at most 1024 names in modules_to_save"),
    (dict(target_parameters=["m"] * 1025), "at most 1024 names in target_parameters"),
    (dict(target_parameters=[""]), "names in target_parameters, none of them empty"),
    # choices
    (dict(peft_type="IA3"), "peft_type 'LORA', but got 'IA3'"),
    (dict(peft_type="lora"), "peft_type 'LORA', but got 'lora'"),
    (dict(peft_type=None), "peft_type 'LORA', but got None"),
    (dict(bias="some"), "bias to be one of"),
    (dict(bias=["none"]), "bias to be one of"),
    (dict(bias="none"), r"LoRA tensors alone, but got .*layers.0.q_proj.base_layer"),
    (dict(bias="all"), r"'base_model.model.c_attn.bias'.*is missing"),
    (dict(use_rslora=2), "use_rslora to be true or false, but got 2"),
    (dict(lora_bias="yes"), "lora_bias to be true or false"),
    (dict(lora_bias=True), r"q_proj.lora_B.bias'.*is missing"),
    (dict(init_lora_weights="corda"), "init_lora_weights='corda' .*by the result of data"),
    (dict(init_lora_weights="loftq"), "init_lora_weights='loftq' .*of a quantization"),
    (dict(init_lora_weights="lora_ga"), "init_lora_weights='lora_ga' .*of gradients"),
    (dict(init_lora_weights="pissa_niter_16"), "'pissa_niter_16' .*of a random decomposition"),
    (dict(init_lora_weights="new"), "plain LoRA, but got init_lora_weights='new'"),
    (dict(init_lora_weights=[1]), r"plain LoRA, but got init_lora_weights=\[1\]"),
    (dict(init_lora_weights="pissa", lora_alpha=-1), "'pissa' for linear layers with a positive"),
    # variants, at anything but their default
    (dict(use_dora=True), r"plain LoRA, but got use_dora=True \(DoRA\)"),
    (dict(use_dora=1), "use_dora=1"),
    (dict(use_qalora=True), "use_qalora=True"),
    (dict(use_bdlora={"nblocks": 2}), "use_bdlora="),
    (dict(velora_config={"num_groups": 4}), "velora_config="),
    (dict(kasa_config={"beta": 0.1}), "kasa_config="),
    (dict(arrow_config={"top_k": 3}), "arrow_config="),
    (dict(monteclora_config={"num_samples": 8}), "monteclora_config="),
    (dict(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens=\[1, 2\] \(aLoRA\)"),
    (dict(layer_replication=[[0, 2]]), "layer_replication="),
    (dict(trainable_token_indices=[1]), "trainable_token_indices="),
    (dict(trainable_token_indices={"emb": [1]}), "trainable_token_indices="),
    (dict(megatron_config={"x": 1}), "megatron_config="),
    (dict(megatron_core="os"), "megatron_core='os'"),
    (dict(ensure_weight_tying=True), "ensure_weight_tying=True"),
    (dict(use_dora=True, kasa_config={"a": 1}), "kasa_config=.*; use_dora=True"),
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


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS, ids=lambda one: str(one)[:50])
def test_a_bad_field(changes, message, folder):
    write_raw(folder, {**read_config(folder), **changes})
    assert_refused(folder, message)


def test_a_field_at_its_default_or_off_is_no_reason(folder):
    off = {
        "use_dora": False,
        "megatron_core": "megatron.core",
        "layer_replication": [],
        "rank_pattern": None,
        "brand_new_variant": None,
        "another": False,
        "use_rslora": None,
        "lora_bias": None,
        "lora_dropout": None,
        "init_lora_weights": None,
        "inference_mode": 0,
        "fan_in_fan_out": None,
        "loftq_config": {"loftq_bits": 4},
        "eva_config": {"rho": 2.0},
        "corda_config": {"cache_file": "../../etc/passwd"},
        "runtime_config": {"ephemeral_gpu_offload": True},
        "qalora_group_size": 32,
    }
    write_config(folder, {**read_config(folder), **off})
    load_adapter(make_zoo(torch.float32), folder)


def test_what_chooses_or_describes_is_information(folder):
    """PEFT's loader and its users' trainers write all of these."""
    table = {
        **read_config(folder),
        "auto_mapping": {"base_model_class": ["x"], "unsloth_fixed": True, "deep": {"a": [1]}},
        "target_modules": r"^(?!.*visual).*(q_proj)$" + "|x" * 5000,
        "exclude_modules": [],
        "layers_to_transform": "all",
        "layers_pattern": {"a": 1},
        "base_model_name_or_path": "a\nb\u001b[2J",
        "revision": "\ud800",
        "task_type": ["CHESS"],
        "peft_version": 3,
        "eva_config": {"rho": float("inf")},
        "megatron_core": None,
    }
    write_config(folder, table)
    load_adapter(make_zoo(torch.float32), folder)
    config = read_adapter_config(folder)
    assert config.base_model_name_or_path == "a\nb\u001b[2J"
    assert config.target_modules == table["target_modules"]
    assert config.task_type is None


def test_a_field_that_is_not_known_is_named_in_a_warning(folder):
    write_config(folder, {**read_config(folder), "brand_new_variant": {"x": 1}, "R": 2})
    with pytest.warns(UserWarning, match=r"ignored, as by PEFT: .*'brand_new_variant'.*'R': 2"):
        load_adapter(make_zoo(torch.float32), folder)


def test_fields_that_are_missing_have_peft_s_defaults(folder):
    write_config(folder, {"peft_type": "LORA", "target_modules": ["q_proj"]})
    config = read_adapter_config(folder)
    assert (config.r, config.lora_alpha, config.bias, config.use_rslora) == (8, 8, "none", False)


NOT_JSON = [
    ("empty", b"", "expected JSON"),
    ("not an object", b'["peft_type", "LORA"]', "expected an object, but got"),
    ("a number", b"3", "expected an object"),
    ("cut short", b'{"peft_type": "LORA", "r', "expected JSON"),
    ("byte order mark", b'\xef\xbb\xbf{"peft_type": "LORA"}', "BOM"),
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


class Compared(str):
    """A key that counts with how many others it is compared."""

    count = 0

    def __eq__(self, other):
        Compared.count += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_duplicate_after_many_keys_is_found_in_one_pass():
    names = [*map(str, range(3000)), "2999"]
    Compared.count = 0
    with pytest.raises(KeyError, match="2999"):
        _object_of_unique_keys([(Compared(name), 0) for name in names])
    assert Compared.count < 10 * len(names)


class Copied(str):
    """A path that counts the characters of its copies."""

    count = 0

    def removesuffix(self, suffix):
        Copied.count += len(self)
        return Copied(str.removesuffix(self, suffix))

    def __getitem__(self, part):
        Copied.count += len(self)
        return Copied(str.__getitem__(self, part))


def test_wrappers_in_a_key_are_counted_in_one_pass():
    path = Copied("layers.0.mlp" + 2000 * ".base_layer")
    Copied.count = 0
    assert without_wrappers(path) == ("layers.0.mlp", 2000)
    assert Copied.count <= 2 * len(path)


@pytest.mark.parametrize(
    ("data", "message"), [c[1:] for c in NOT_JSON], ids=[c[0] for c in NOT_JSON]
)
def test_a_config_that_is_no_plain_json(data, message, folder):
    (folder / CONFIG).write_bytes(data)
    assert_refused(folder, f"{CONFIG}: .*{message}")
