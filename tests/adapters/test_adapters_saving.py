"""What save_adapter writes, and what it refuses to write."""

import copy

import pytest
import torch
from adapter_helpers import (
    CONFIG,
    EVERYTHING,
    LINEAR,
    WEIGHTS,
    Tree,
    assert_unchanged,
    from_peft,
    make_zoo,
    output,
    randomize,
    read_config,
    state_of,
)
from torch import nn

from lora_ext import LoraConfig, apply_lora, merge_adapter
from lora_ext.adapters import AdapterError, load_adapter, read_adapter_config, save_adapter
from lora_ext.models import lora_layers
from lora_ext.nn import AdapterSpec, LoRAMergedLinear

# ---- what a saved config says ----


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
    ours = apply_lora(copy.deepcopy(base), LoraConfig(patterns, r=2))
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
    apply_lora(ours, LoraConfig(["q", "c+.k", "d"], r=2, lora_alpha=3))
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
    model = apply_lora(Tree(["a", "b", "c"]), LoraConfig(["a", "b"], lora_dropout=0.1))
    apply_lora(model, LoraConfig(["c"], lora_dropout=0.2), adapter_name="other")
    layer = model.c
    layer.add_adapter("default", AdapterSpec(8, 8, 0.2))
    with pytest.warns(UserWarning, match=r"one dropout for all layers; of \[0.1, 0.2\]"):
        save_adapter(model, tmp_path)
    assert read_config(tmp_path)["lora_dropout"] == 0.1


def test_information(tmp_path):
    model = apply_lora(Tree(["a"]), LoraConfig(["a"]))
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


# ---- files ----


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    model = apply_lora(Tree(["a"]), LoraConfig(["a"]))
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
    model = apply_lora(make_zoo(), LoraConfig("*_proj", r=2))
    save_adapter(model, tmp_path / "one")
    save_adapter(copy.deepcopy(model), tmp_path / "two")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_safetensors_reads_the_file(tmp_path):
    from safetensors import safe_open

    model = apply_lora(
        make_zoo(torch.bfloat16), LoraConfig(EVERYTHING, r=3, modules_to_save="norm")
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
        copy.deepcopy(base),
        LoraConfig(LINEAR, r=4, lora_alpha=6, init_lora_weights=init, use_rslora=use_rslora),
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
    model = apply_lora(make_zoo(), LoraConfig(LINEAR, r=2))
    randomize(p for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path / "before")
    merge_adapter(model)
    save_adapter(model, tmp_path / "after")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"adapter_name": "other"}, r"one of the adapters \['default'\], but got 'other'"),
        (None, {"bias": "some"}, "expected bias to be None or one of"),
        ("nan", {}, r"q_proj.lora_B.weight: expected finite values"),
        ("meta", {}, r"q_proj.lora_A.weight: expected a tensor with values"),
        ("lora_bias", {}, "expected no lora_bias beside embeddings.*'emb' is an embedding"),
        ("rank", {}, r"'layers.0.q_proj' as a plain LoRA: .*1 to 512, but got 600"),
        ("nested", {}, r"'layers.0' holds layers with adapters"),
    ],
)
def test_errors_of_saving_leave_the_folder_alone(change, arguments, message, tmp_path):
    model = apply_lora(make_zoo(), LoraConfig(["q_proj", "emb"], r=2))
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
    layer = apply_lora(nn.Sequential(nn.Linear(2, 2)), LoraConfig("0"))[0]
    with pytest.raises(AdapterError, match="but got a single layer"):
        save_adapter(layer, tmp_path)


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_file_in_the_place_of_the_folder(tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoraConfig("0", r=2))
    with pytest.raises(AdapterError, match=r"expected a folder.* but there is a file"):
        save_adapter(model, tmp_path / "file" / inside)
    assert (tmp_path / "file").read_text() == "mine"
