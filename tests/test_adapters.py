"""Adapters on disk: PEFT's folders load here, and the folders written here load in PEFT."""

import copy
import os

import pytest
import torch
from adapter_helpers import (
    CONFIG,
    WEIGHTS,
    assert_unchanged,
    from_peft,
    make_ids,
    make_zoo,
    output,
    peft_model,
    randomize,
    read_config,
    read_tensors,
    save_peft,
    state_of,
    write_config,
)
from torch import nn

from lora_ext import LoRAConfig, apply_lora, delete_adapter, lora_layers, merge, set_adapter
from lora_ext.adapters import (
    AdapterError,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from lora_ext.config import AdapterSpec
from lora_ext.modules import LoRAMergedLinear

EVERYTHING = ["emb", "q_proj", "mlp", "c_attn", "conv"]
LINEAR = ["q_proj", "mlp", "c_attn"]

CONFIGS = {
    "linear": {"target_modules": ["q_proj", "mlp"], "r": 4, "lora_alpha": 6},
    "embedding": {"target_modules": ["emb"], "r": 3},
    "conv1d": {"target_modules": ["c_attn"], "r": 5, "fan_in_fan_out": True},
    "conv2d": {"target_modules": ["conv"], "r": 2},
    "everything": {"target_modules": EVERYTHING, "r": 4, "lora_alpha": 7},
    "rslora": {"target_modules": EVERYTHING, "use_rslora": True, "r": 4},
    "rank_pattern": {
        "target_modules": EVERYTHING,
        "r": 4,
        "rank_pattern": {r"layers\.[01]\.q_proj": 6, "^emb": 2, "mlp": 1},
    },
    "alpha_pattern": {
        "target_modules": EVERYTHING,
        "r": 4,
        "alpha_pattern": {"q_proj": 3, r".*\.(mlp|none)": 11, "conv": 1},
        "rank_pattern": {"conv": 3},
    },
    "rslora with patterns": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.mlp": 5},
    },
    "lora_bias": {"target_modules": [*LINEAR, "conv"], "lora_bias": True, "r": 3},
    "bias all": {"target_modules": ["q_proj", "emb"], "bias": "all"},
    "bias lora_only": {"target_modules": ["q_proj", "c_attn"], "bias": "lora_only"},
    "modules_to_save": {"target_modules": LINEAR, "modules_to_save": ["head", "score"]},
    "bias all and modules_to_save": {
        "target_modules": LINEAR,
        "modules_to_save": ["head"],
        "bias": "all",
    },
    "regex": {"target_modules": r".*\.[01]\.(q_proj|mlp)$|c_\w+"},
    "all-linear": {"target_modules": "all-linear"},
    "layers_to_transform": {
        "target_modules": ["q_proj", "layers.1.mlp"],  # a whole path is meant as it is
        "layers_to_transform": [0, 2],
        "layers_pattern": ["h", "layers"],
    },
    "one layer of a pattern": {
        "target_modules": ["q_proj", "mlp"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "exclude names": {"target_modules": LINEAR, "exclude_modules": ["layers.0.mlp"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r"head\..*"},
    "dropout": {"target_modules": LINEAR, "lora_dropout": 0.25},
    "init False": {"target_modules": LINEAR, "init_lora_weights": False},
    "init gaussian": {"target_modules": LINEAR, "init_lora_weights": "gaussian"},
    "init orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "init eva": {"target_modules": ["q_proj"], "init_lora_weights": "eva"},
}
# PEFT initializes these from float32 weights only.
FLOAT32_CONFIGS = {
    "mica": {"target_modules": ["q_proj", "emb"], "init_lora_weights": "mica"},
    "pissa": {"target_modules": [*LINEAR, "emb"], "init_lora_weights": "pissa", "r": 4},
    "pissa rslora": {
        "target_modules": LINEAR,
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "lora_alpha": 3,
        "rank_pattern": {"q_proj": 3},
    },
    "olora": {"target_modules": ["q_proj", "mlp", "emb"], "init_lora_weights": "olora", "r": 4},
}


def case(table, *names):
    return pytest.mark.parametrize("config", [pytest.param(table[n], id=n) for n in names or table])


# ---- both ways ----


@case(CONFIGS)
def test_a_folder_of_peft_loads_and_goes_back(config, tmp_path):
    base = make_zoo()
    theirs = peft_model(base, **config)
    save_peft(theirs, tmp_path / "theirs")
    wanted = output(theirs)
    assert (wanted - output(base)).abs().max() > 1e-3

    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), wanted, rtol=1e-12, atol=1e-12)

    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(output(from_peft(base, tmp_path / "ours")), wanted)
    again = load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(output(again), output(ours))


@case(FLOAT32_CONFIGS)
def test_inits_that_need_the_weight(config, tmp_path):
    """PEFT keeps W - scaling B0 A0 as the weight, rounded; here the weight stays."""
    base = make_zoo(torch.float32)
    theirs = peft_model(base, **config)
    save_peft(theirs, tmp_path / "theirs")
    wanted = output(theirs)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.layers[0].q_proj.weight, base.layers[0].q_proj.weight)

    save_adapter(ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["init_lora_weights"] is True
    back = from_peft(base, tmp_path / "ours")
    torch.testing.assert_close(output(back), wanted, rtol=1e-4, atol=1e-5)


def test_a_half_base_gets_float32_factors(tmp_path):
    base = make_zoo(torch.bfloat16)
    theirs = peft_model(base, target_modules=EVERYTHING, r=4)
    save_peft(theirs, tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    dtypes = {layer.lora_a["default"].dtype for _, layer in lora_layers(ours)}
    assert dtypes == {torch.float32}
    torch.testing.assert_close(output(ours), output(theirs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_the_dtype_of_factors_does_not_depend_on_the_file(stored, tmp_path):
    from safetensors.torch import save_file

    base = make_zoo(torch.float32)
    save_peft(peft_model(base, target_modules=LINEAR), tmp_path)
    tensors = {key: value.to(stored) for key, value in read_tensors(tmp_path).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    for wanted, given in ((torch.float32, None), (torch.bfloat16, torch.bfloat16)):
        ours = load_adapter(copy.deepcopy(base), tmp_path, adapter_dtype=given)
        layer = ours.layers[0].q_proj
        key = "base_model.model.layers.0.q_proj.lora_A.weight"
        assert layer.lora_a["default"].dtype == layer.lora_b["default"].dtype == wanted
        assert torch.equal(layer.lora_a["default"], tensors[key].to(wanted))


def test_the_dtype_of_factors_is_floating(tmp_path):
    save_peft(peft_model(make_zoo(), target_modules=LINEAR), tmp_path)
    with pytest.raises(AdapterError, match=r"a floating adapter_dtype, but got torch\.int8"):
        load_adapter(make_zoo(), tmp_path, adapter_dtype=torch.int8)


def test_a_config_of_an_old_version(tmp_path):
    theirs = peft_model(make_zoo(), target_modules=LINEAR, r=2)
    save_peft(theirs, tmp_path)
    old = {
        "base_model_name_or_path": "some/model",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": LINEAR,
        "task_type": "CAUSAL_LM",
    }
    write_config(tmp_path, old)
    torch.testing.assert_close(output(load_adapter(make_zoo(), tmp_path)), output(theirs))


def test_loaded_in_inference_mode_and_trained_outside(tmp_path):
    theirs = peft_model(make_zoo(), target_modules=EVERYTHING, bias="all", modules_to_save=["norm"])
    save_peft(theirs, tmp_path)
    ours = make_zoo()
    with torch.inference_mode():
        load_adapter(ours, tmp_path, trainable=True)
    loss = ours(make_ids()).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


# ---- transformers ----


def tiny_llama(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **config)).double().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=make_ids()).logits


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        {"target_modules": None},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
        {"target_modules": ["v_proj", "embed_tokens"]},  # PEFT stores the embedding's weight too
        {"target_modules": ["v_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        {
            "target_modules": r"\b(?:.*?(?:self_attn).*?(?:q_proj|o_proj).*?)|"
            r"(?:\bmodel\.layers\.[\d]{1,}\.mlp\.(?:gate_proj))"
        },
    ],
    ids=lambda config: str(config["target_modules"])[:20],
)
def test_a_language_model(config, tmp_path):
    base = tiny_llama(tie_word_embeddings=False)
    theirs = peft_model(base, **config)
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-11, atol=1e-11)
    save_adapter(ours, tmp_path / "ours", task_type="CAUSAL_LM")
    torch.testing.assert_close(logits(from_peft(base, tmp_path / "ours")), logits(theirs))


def test_all_linear_written_by_hand(tmp_path):
    """PEFT itself stores the names that it stands for."""
    base = tiny_llama()
    theirs = peft_model(base, target_modules="all-linear", task_type="CAUSAL_LM")
    save_peft(theirs, tmp_path)
    write_config(tmp_path, {**read_config(tmp_path), "target_modules": "all-linear"})
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-11, atol=1e-11)
    assert not hasattr(ours.lm_head, "adapters")


def test_a_classifier(tmp_path):
    """PEFT adds "classifier" and "score" to modules_to_save, of which the model has one."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, intermediate_size=24, num_labels=3, **sizes)
    base = BertForSequenceClassification(config).double().eval()
    theirs = peft_model(base, target_modules=["query", "value"], task_type="SEQ_CLS")
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-11, atol=1e-11)
    assert read_adapter_config(tmp_path / "theirs").modules_to_save == ("classifier", "score")

    save_adapter(ours, tmp_path / "ours", task_type="SEQ_CLS")
    assert read_config(tmp_path / "ours")["modules_to_save"] == ["classifier"]
    torch.testing.assert_close(logits(from_peft(base, tmp_path / "ours")), logits(theirs))


def test_gpt2_with_tied_embeddings(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    base = base.double().eval()
    theirs = peft_model(base, target_modules=["c_attn", "c_proj", "wte"], bias="lora_only")
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert ours.lm_head.weight is ours.transformer.wte.weight
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-11, atol=1e-11)
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(from_peft(base, tmp_path / "ours")), logits(theirs))


def test_an_adapter_for_another_embedding_is_refused(tmp_path):
    """PEFT stores the embedding that it targets, and on loading overwrites the model's."""
    base = tiny_llama()
    save_peft(peft_model(base, target_modules=["v_proj", "embed_tokens"]), tmp_path)
    with torch.no_grad():
        base.model.embed_tokens.weight[3] += 1
    before = state_of(base)
    with pytest.raises(AdapterError, match=r"embed_tokens.*expected the model's own weight"):
        load_adapter(base, tmp_path)
    assert_unchanged(base, before)


# ---- what a saved config says ----


class Tree(nn.Module):
    """Linear layers at the given paths."""

    def __init__(self, paths) -> None:
        super().__init__()
        self.paths = paths
        for path in paths:
            parent = self
            *parents, last = path.split(".")
            for name in parents:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent._modules[name]
            parent.add_module(last, nn.Linear(4, 4))

    def forward(self, x):
        for path in self.paths:
            x = torch.tanh(self.get_submodule(path)(x))
        return x


@pytest.mark.parametrize(
    ("paths", "adapted", "targets", "excluded"),
    [
        (["a.q", "b.q", "b.k"], ["a.q", "b.q"], ["q"], None),
        (["a.q", "b.q", "b.k"], ["a.q"], ["a.q"], None),
        (["a.q", "x.a.q"], ["a.q"], ["a.q"], ["x.a.q"]),
        (["b", "a.b", "x.a.b"], ["b", "x.a.b"], r"b|x\.a\.b", None),
        (["layers.0", "layers.1", "0"], ["layers.0"], ["layers.0"], None),
        (["a+.q(", "aa.q("], ["a+.q("], ["a+.q("], None),
    ],
    ids=["last name", "path", "exclude", "expression", "numbers", "special"],
)
def test_target_modules_select_exactly_the_layers(paths, adapted, targets, excluded, tmp_path):
    base = Tree(paths).double()
    torch.manual_seed(0)
    patterns = ["re:" + "".join(f"[{c}]" for c in path) for path in adapted]
    ours = apply_lora(copy.deepcopy(base), LoRAConfig(patterns, r=2))
    assert [path for path, _ in lora_layers(ours)] == adapted
    randomize(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path)
    config = read_config(tmp_path)
    assert config["target_modules"] == targets
    assert config["exclude_modules"] == excluded
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(output(from_peft(base, tmp_path), x), output(ours, x))
    assert torch.equal(output(load_adapter(base, tmp_path), x), output(ours, x))


def test_layers_that_differ(tmp_path):
    """Ranks and alphas as exact patterns; one convention of scaling for all."""
    base = Tree(["a.q", "b.q", "x.b.q", "c+.k", "d"]).double()
    ours = copy.deepcopy(base)
    apply_lora(ours, LoRAConfig(["q", "c+.k", "d"], r=2, alpha=3))
    for path, spec in {
        "b.q": AdapterSpec(3, 5.5),
        "c+.k": AdapterSpec(2, 9, use_rslora=True),
        "d": AdapterSpec(4, 3, use_rslora=True),
    }.items():
        layer = ours.get_submodule(path)
        layer.delete_adapter("default")
        layer.add_adapter("default", spec)
    randomize(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path)
    config = read_config(tmp_path)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 3, False)
    assert config["rank_pattern"] == {r"^b\.q": 3, "^d": 4}
    assert config["alpha_pattern"].keys() == {r"^b\.q", r"^c\+\.k", "^d"}
    assert config["alpha_pattern"]["^d"] == 6
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(output(from_peft(base, tmp_path), x), output(ours, x))
    torch.testing.assert_close(output(load_adapter(base, tmp_path), x), output(ours, x))


def test_dropouts_that_differ_are_reported(tmp_path):
    model = apply_lora(Tree(["a", "b", "c"]), LoRAConfig(["a", "b"], dropout=0.1))
    apply_lora(model, LoRAConfig(["c"], dropout=0.2), adapter="other")
    layer = model.c
    layer.add_adapter("default", AdapterSpec(8, 8, 0.2))
    with pytest.warns(UserWarning, match=r"one dropout for all layers; of \[0.1, 0.2\]"):
        save_adapter(model, tmp_path)
    assert read_config(tmp_path)["lora_dropout"] == 0.1


def test_information(tmp_path):
    model = apply_lora(Tree(["a"]), LoRAConfig(["a"]))
    names = {
        "base_model_name_or_path": "some/model",
        "revision": "refs/pr/1",
        "task_type": "CAUSAL_LM",
    }
    save_adapter(model, tmp_path, **names)
    config = read_adapter_config(tmp_path)
    assert {name: getattr(config, name) for name in names} == names
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nbase_model: "some/model"\nlibrary_name: peft\n')
    with pytest.raises(AdapterError, match="expected task_type in"):
        save_adapter(model, tmp_path, task_type="chess")
    with pytest.raises(AdapterError, match="expected revision to be a printable string"):
        save_adapter(model, tmp_path, revision="a\nb")


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    model = apply_lora(Tree(["a"]), LoRAConfig(["a"]))
    for name in ("README.md", "tokenizer.json", "notes.tmp", "x.next"):
        (tmp_path / name).write_text(name)
    save_adapter(model, tmp_path)
    for name in ("README.md", "tokenizer.json", "notes.tmp", "x.next"):
        assert (tmp_path / name).read_text() == name
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md",
        "tokenizer.json",
        "notes.tmp",
        "x.next",
        CONFIG,
        WEIGHTS,
    }


def test_the_same_adapter_has_the_same_bytes(tmp_path):
    model = apply_lora(make_zoo(), LoRAConfig("*_proj", r=2))
    save_adapter(model, tmp_path / "one")
    save_adapter(copy.deepcopy(model), tmp_path / "two")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_safetensors_reads_the_file(tmp_path):
    from safetensors import safe_open

    model = apply_lora(
        make_zoo(torch.bfloat16), LoRAConfig(EVERYTHING, r=3, modules_to_save="norm")
    )
    model.norm.register_buffer("steps", torch.tensor(7))
    model.norm.register_buffer("empty", torch.zeros(0, 3))
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("base_model.model.norm.steps") == 7
        a = file.get_tensor("base_model.model.conv.lora_A.weight")
        assert torch.equal(a, model.conv.lora_a["default"].reshape(3, 24, 1, 1))


# ---- what is no plain LoRA ----


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_inits_are_saved_as_plain_lora_of_twice_the_rank(init, use_rslora, tmp_path):
    base = make_zoo(torch.float32)
    ours = apply_lora(
        copy.deepcopy(base), LoRAConfig(LINEAR, r=4, alpha=6, init=init, use_rslora=use_rslora)
    )
    randomize(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path)
    config = read_config(tmp_path)
    assert config["r"] == 8
    assert config["lora_alpha"] == pytest.approx(6 * (2**0.5 if use_rslora else 2))
    torch.testing.assert_close(output(from_peft(base, tmp_path)), output(ours))
    torch.testing.assert_close(output(load_adapter(base, tmp_path)), output(ours))


def test_merged_projections_are_saved_as_one_dense_pair(tmp_path):
    base = nn.Sequential(nn.Linear(6, 12).double())
    layer = LoRAMergedLinear.around(copy.deepcopy(base[0]))
    layer.enable_groups([True, False, True])
    layer.add_adapter("default", AdapterSpec(2, 3))
    randomize([layer.lora_a["default"], layer.lora_b["default"]])
    ours = nn.Sequential(layer)
    save_adapter(ours, tmp_path)
    assert read_config(tmp_path)["r"] == 4
    x = torch.randn(5, 6).double()
    torch.testing.assert_close(output(from_peft(base, tmp_path), x), output(ours, x))
    before = state_of(ours)
    with pytest.raises(AdapterError, match="'0', but it is a LoRAMergedLinear"):
        load_adapter(ours, tmp_path, "other")
    assert_unchanged(ours, before)


def test_a_merged_model_saves_its_factors(tmp_path):
    model = apply_lora(make_zoo(), LoRAConfig(LINEAR, r=2))
    randomize(p for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path / "before")
    merge(model)
    save_adapter(model, tmp_path / "after")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


# ---- several adapters, training ----


@pytest.fixture
def two_folders(tmp_path):
    base = make_zoo()
    first = peft_model(base, target_modules=["q_proj", "emb"], r=2, lora_dropout=0.5)
    second = peft_model(base, target_modules=["q_proj", "mlp", "conv"], r=3, use_rslora=True)
    save_peft(first, tmp_path / "first")
    save_peft(second, tmp_path / "second")
    return base, tmp_path / "first", tmp_path / "second", output(first), output(second)


def test_several_adapters(two_folders, tmp_path):
    base, first, second, first_output, second_output = two_folders
    model = copy.deepcopy(base)
    load_adapter(model, first, "one")
    load_adapter(model, second, "two")
    torch.testing.assert_close(output(model), first_output)
    set_adapter(model, "two")
    torch.testing.assert_close(output(model), second_output)
    save_adapter(model, tmp_path / "again", "one")
    set_adapter(model, "one")
    again = load_adapter(copy.deepcopy(base), tmp_path / "again")
    assert torch.equal(output(model), output(again))
    delete_adapter(model, "one")
    delete_adapter(model, "two")
    torch.testing.assert_close(output(model), output(base))
    load_adapter(model, second, "one")
    torch.testing.assert_close(output(model), second_output)


def test_a_name_that_is_taken(two_folders):
    base, first, second, *_ = two_folders
    model = load_adapter(base, first)
    before = state_of(model)
    with pytest.raises(AdapterError, match="the model has 'default'; delete_adapter it first"):
        load_adapter(model, second)
    for name in ("", "a.b", "keys"):
        with pytest.raises(AdapterError, match="expected a name that is not empty"):
            load_adapter(model, second, name)
    assert_unchanged(model, before)


def trainable_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_trainable(two_folders):
    base, first, second, *_ = two_folders
    assert trainable_names(load_adapter(copy.deepcopy(base), first)) == set()
    model = load_adapter(base, first, "one", trainable=True)
    names = trainable_names(model)
    assert names
    assert all(name.endswith((".lora_a.one", ".lora_b.one")) for name in names)
    load_adapter(model, second, "two")
    assert trainable_names(model) == names
    load_adapter(model, second, "three", trainable=True)
    added = trainable_names(model) - names
    assert len(added) == 14
    assert all(name.endswith((".lora_a.three", ".lora_b.three")) for name in added)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_and_modules_to_save_are_trainable(bias, tmp_path):
    base = make_zoo()
    theirs = peft_model(base, target_modules=["q_proj"], bias=bias, modules_to_save=["norm"])
    save_peft(theirs, tmp_path)
    assert trainable_names(load_adapter(copy.deepcopy(base), tmp_path)) == set()
    model = load_adapter(base, tmp_path, trainable=True)
    names = {name for name in trainable_names(model) if "lora_" not in name}
    wanted = {f"layers.{i}.q_proj.bias" for i in range(3)} | {"norm.weight", "norm.bias"}
    if bias == "all":
        wanted |= {"c_attn.bias", "conv.bias", "head.0.bias", "head.1.bias"}
    assert names == wanted


def test_training_goes_on_as_in_peft(tmp_path):
    base = make_zoo()
    theirs = peft_model(base, target_modules=EVERYTHING, r=2)
    save_peft(theirs, tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path, trainable=True)
    for model in (theirs, ours):
        model(make_ids()).square().sum().backward()
    layer = theirs.base_model.model.c_attn
    torch.testing.assert_close(
        ours.c_attn.lora_a["default"].grad, layer.lora_A["default"].weight.grad
    )
    layer = theirs.base_model.model.emb
    torch.testing.assert_close(
        ours.emb.lora_b["default"].grad, layer.lora_embedding_B["default"].grad
    )


def test_saved_modules_are_saved_again(tmp_path):
    """They came from a folder and are frozen, but belong to the adapter."""
    base = make_zoo()
    theirs = peft_model(base, target_modules=["q_proj"], bias="all", modules_to_save=["norm"])
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    config = read_config(tmp_path / "ours")
    assert config["bias"] == "all"
    assert config["modules_to_save"] == ["norm"]
    torch.testing.assert_close(output(from_peft(base, tmp_path / "ours")), output(theirs))
    save_adapter(ours, tmp_path / "none", bias="none")
    assert read_config(tmp_path / "none")["bias"] == "none"


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["norm"]}, {"bias": "all"}, {"bias": "lora_only"}], ids=str
)
def test_one_adapter_does_not_overwrite_what_another_stored(config, tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=["q_proj"], **config), tmp_path / "one")
    two = peft_model(base, target_modules=["q_proj", "mlp"], **config)
    randomize(p for p in two.parameters() if p.requires_grad)
    save_peft(two, tmp_path / "two")
    model = load_adapter(base, tmp_path / "one", "one")
    load_adapter(model, tmp_path / "one", "equal")
    before = state_of(model)
    with pytest.raises(AdapterError, match="adapter 'one' has other values there"):
        load_adapter(model, tmp_path / "two", "two")
    assert_unchanged(model, before)


def test_modules_to_save_that_hold_adapters(tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=["q_proj"], modules_to_save=["mlp"]), tmp_path)
    model = apply_lora(base, LoRAConfig("mlp"), adapter="other")
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"modules_to_save without adapters, but 'layers.0.mlp'"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.lin = nn.Linear(8, 8)
        self.last = nn.Linear(8, 20, bias=False)
        self.last.weight = self.emb.weight

    def forward(self, ids):
        return self.last(torch.tanh(self.lin(self.emb(ids))))


def test_a_tied_module_to_save(tmp_path):
    """PEFT copies the module, and the other keeps the old weight; here both would change."""
    base = Tied().double()
    theirs = peft_model(base, target_modules=["lin"], modules_to_save=["emb"])
    save_peft(theirs, tmp_path / "theirs")
    before = state_of(base)
    with pytest.raises(AdapterError, match=r"emb.weight.*is tied to 'last.weight'.*untie"):
        load_adapter(base, tmp_path / "theirs")
    assert_unchanged(base, before)
    untied = copy.deepcopy(base)
    untied.last.weight = nn.Parameter(untied.last.weight.detach().clone())
    load_adapter(untied, tmp_path / "theirs")
    torch.testing.assert_close(output(untied), output(theirs))

    ours = apply_lora(copy.deepcopy(base), LoRAConfig("lin", modules_to_save=("emb",)))
    randomize(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["modules_to_save"] == ["emb", "last"]
    torch.testing.assert_close(output(from_peft(base, tmp_path / "ours")), output(ours))
    assert torch.equal(output(load_adapter(base, tmp_path / "ours")), output(ours))


def test_modules_to_save_whose_names_end_alike(tmp_path):
    """PEFT compares the ends of paths, at a dot or not: "head" means "overhead" too."""
    base = Tree(["head", "overhead", "q"]).double()
    ours = apply_lora(copy.deepcopy(base), LoRAConfig("q", modules_to_save=("head",)))
    randomize(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path)
    x = torch.randn(2, 4).double()
    torch.testing.assert_close(output(from_peft(base, tmp_path), x), output(ours, x))
    assert torch.equal(output(load_adapter(base, tmp_path), x), output(ours, x))


def test_a_module_to_save_that_peft_would_look_for_in_its_own_layers(tmp_path):
    """The end of "lora_dropout"."""
    model = apply_lora(Tree(["out", "q"]), LoRAConfig("q", modules_to_save=("out",)))
    with pytest.raises(AdapterError, match="'out', with which PEFT's 'lora_dropout' ends"):
        save_adapter(model, tmp_path)


# ---- errors of saving ----


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"adapter": "other"}, r"one of the adapters \['default'\], but got 'other'"),
        (None, {"bias": "some"}, "expected bias to be None or one of"),
        ("nan", {}, r"q_proj.lora_B.weight: expected finite values"),
        ("meta", {}, r"q_proj.lora_A.weight: expected a tensor with values"),
        ("lora_bias", {}, "expected no lora_bias beside embeddings.*'emb' is an embedding"),
        ("rank", {}, r"'layers.0.q_proj' as a plain LoRA: .*1 to 512, but got 600"),
        ("nested", {}, r"'layers.0' holds layers with adapters"),
    ],
)
def test_errors_of_saving_leave_the_folder_alone(change, arguments, message, tmp_path):
    model = apply_lora(make_zoo(), LoRAConfig(["q_proj", "emb"], r=2))
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    layer = model.layers[0].q_proj
    randomize(p for p in model.parameters() if p.requires_grad)
    if change == "nan":
        layer.lora_b["default"].data[3] = float("nan")
    elif change == "meta":
        layer.lora_a["default"] = nn.Parameter(torch.empty(2, 16, device="meta"))
    elif change == "lora_bias":
        layer.delete_adapter("default")
        layer.add_adapter("default", AdapterSpec(2, 2, lora_bias=True))
    elif change == "rank":
        layer.rank = lambda name: 600
    elif change == "nested":
        model.layers[0].lora_ext_saved_by = ("default",)
    with pytest.raises(AdapterError, match=message):
        save_adapter(model, tmp_path, **arguments)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_layer_alone_has_no_path(tmp_path):
    layer = apply_lora(nn.Sequential(nn.Linear(2, 2)), LoRAConfig("0"))[0]
    with pytest.raises(AdapterError, match="but got the layer itself"):
        save_adapter(layer, tmp_path)


# ---- wrappers and sharding ----


def test_a_compiled_model(tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=LINEAR), tmp_path / "theirs")
    model = torch.compile(copy.deepcopy(base), backend="eager")
    assert load_adapter(model, tmp_path / "theirs") is model
    save_adapter(model, tmp_path / "ours")
    ours = read_tensors(tmp_path / "ours")
    theirs = read_tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def one_rank():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parameters_are_gathered(one_rank, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = apply_lora(
        make_zoo(torch.float32), LoRAConfig(EVERYTHING, r=2, modules_to_save="norm", bias="all")
    )
    pissa = apply_lora(make_zoo(torch.float32), LoRAConfig(LINEAR, r=2, init="pissa"))
    for number, one in enumerate((model, pissa)):
        randomize(p for p in one.parameters() if p.requires_grad)
        save_adapter(one, tmp_path / f"whole{number}")
        for layer in one.layers:
            fully_shard(layer, mesh=one_rank)
        fully_shard(one, mesh=one_rank)
        save_adapter(one, tmp_path / f"sharded{number}")
        whole, sharded = (read_tensors(tmp_path / f"{n}{number}") for n in ("whole", "sharded"))
        assert whole.keys() == sharded.keys()
        assert all(torch.equal(whole[key], sharded[key]) for key in whole)
    with pytest.raises(AdapterError, match="it is sharded; load adapters after the weights"):
        load_adapter(model, tmp_path / "whole0", "other")


def save_on_one_of_two_ranks(rank, folder):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    config = LoRAConfig(EVERYTHING, r=3, modules_to_save="norm", bias="all")
    model = apply_lora(make_zoo(torch.float32), config)
    randomize(p for p in model.parameters() if p.requires_grad)
    if rank == 0:
        save_adapter(model, f"{folder}/whole")
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    output(model)  # leaves the root's parameters gathered
    save_adapter(model, f"{folder}/sharded")
    error = FileExistsError if rank == 0 else AdapterError
    with pytest.raises(error, match=f"{folder}/store"):
        save_adapter(model, f"{folder}/store")  # a file: rank 0 fails, and the other hears of it
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may be alive, and would abort an orderly exit


@pytest.mark.slow
def test_two_ranks(tmp_path):
    torch.multiprocessing.spawn(save_on_one_of_two_ranks, (str(tmp_path),), nprocs=2)
    whole, sharded = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[key], sharded[key]) for key in whole)
    assert read_config(tmp_path / "whole") == read_config(tmp_path / "sharded")


def test_a_model_without_values(tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=LINEAR), tmp_path)
    with pytest.raises(AdapterError, match=r"the weight of 'layers.0.q_proj'.*on the meta device"):
        load_adapter(base.to("meta"), tmp_path)
