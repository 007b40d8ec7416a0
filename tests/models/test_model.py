"""Functions for the adapters of a whole model: choosing, counting, storing, explaining."""

import copy
import threading

import pytest
import torch
from adapter_helpers import make_ids, make_zoo
from helpers import BF16, F32, F64, KERNEL_ROWS, by_pickle, by_torch_save
from layer_helpers import make_layer, randomize
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lora_ext
from lora_ext import LoraConfig, LoRALinear, apply_lora
from lora_ext.models import lora_layers
from lora_ext.nn import AdapterSpec


def model_with(*adapters):
    model = make_zoo()
    for name in adapters:
        apply_lora(model, LoraConfig(["q_proj", "c_attn", "emb"], 2, lora_bias=False), name)
    return randomize(model)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- choosing ----


def test_disabling_in_two_threads_that_overlap():
    model, ids = model_with("a"), make_ids()
    base, entered, left = make_zoo()(ids), threading.Event(), threading.Event()

    def other():
        with lora_ext.disable_adapter(model):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with lora_ext.disable_adapter(model):
        thread.start()
        assert entered.wait(10)
    assert torch.equal(model(ids), base)
    left.set()
    thread.join()
    assert not torch.equal(model(ids), base)


@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_made_while_adapters_are_disabled_have_theirs(way):
    model, ids = model_with("a"), make_ids()
    wanted = model(ids)
    with lora_ext.disable_adapter(model):
        other = way(model)
        assert not torch.equal(model(ids), wanted)
    assert torch.equal(other(ids), wanted)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_mark_only_lora_as_trainable(bias):
    model = model_with("a", "b")
    apply_lora(
        model, LoraConfig("conv", 2, init_lora_weights="pissa", modules_to_save="head.1"), "bias"
    )
    lora_ext.set_adapter(model, ["a", "bias"])
    lora_ext.merge_adapter(model, "a")
    merged = [layer.merged_adapters for _, layer in lora_layers(model)]
    model.requires_grad_(True)
    lora_ext.models.mark_only_lora_as_trainable(model, bias)
    assert [layer.merged_adapters for _, layer in lora_layers(model)] == merged
    lora = {n for n in dict(model.named_parameters()) if n.endswith((".a", "conv.lora_a.bias"))}
    lora |= {"conv.lora_b.bias", "head.1.weight", "head.1.bias"}
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias") and ".lora_" not in n}
    adapted = {f"layers.{i}.q_proj.bias" for i in range(3)} | {"c_attn.bias", "conv.bias"}
    assert trained(model) == lora | {"none": set(), "all": biases, "lora_only": adapted}[bias]


@pytest.mark.parametrize("function", ["mark_only_lora_as_trainable", "lora_state_dict"])
def test_bias_has_three_values(function):
    with pytest.raises(ValueError, match=f"{function}: expected bias in .* but got 'some'"):
        getattr(lora_ext.models, function)(model_with("a"), bias="some")


# ---- storing ----


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("adapter", [None, "a", "bias"])
def test_lora_state_dict(bias, adapter):
    model = model_with("a")
    apply_lora(
        model, LoraConfig("conv", 2, init_lora_weights="pissa", modules_to_save="norm"), "bias"
    )
    state = lora_ext.models.lora_state_dict(model, bias, adapter)
    keys = {key for key in model.state_dict() if ".lora_" in key}
    if adapter:
        keys = {key for key in keys if key.endswith(f".{adapter}")}
    biases = {k for k in model.state_dict() if k.endswith("bias") and ".lora_" not in k}
    adapted = {f"layers.{i}.q_proj.bias" for i in range(3)} | {"c_attn.bias", "conv.bias"}
    keys |= {"none": set(), "all": biases, "lora_only": adapted}[bias]
    if adapter != "a":
        keys |= {"norm.weight", "norm.bias"}
    assert set(state) == keys
    full = model.state_dict()
    assert all(value.data_ptr() == full[key].data_ptr() for key, value in state.items())


def test_a_lora_state_dict_restores_what_was_trained():
    model, other, ids = model_with("a"), model_with("a"), make_ids()
    for each in (model, other):
        apply_lora(
            each, LoraConfig("conv", 2, init_lora_weights="olora", modules_to_save="norm"), "b"
        )
        lora_ext.set_adapter(each, ["a", "b"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    assert not torch.allclose(other(ids), model(ids))
    result = other.load_state_dict(lora_ext.models.lora_state_dict(model), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(other(ids), model(ids))
    with pytest.raises(ValueError, match="lora_state_dict: expected distinct names"):
        lora_ext.models.lora_state_dict(model, adapter_name="z")


def test_state_of_a_layer_that_is_the_model():
    layer = make_layer("linear")
    assert set(lora_ext.models.lora_state_dict(layer)) == {"lora_a.default", "lora_b.default"}
    lora_ext.models.mark_only_lora_as_trainable(layer, "all")
    assert trained(layer) == {"bias", "lora_a.default", "lora_b.default"}


# ---- counting and optimizers ----


def test_trainable_parameters():
    model = model_with("a", "b")
    report = lora_ext.models.trainable_parameters(model)
    size = 3 * 2 * (16 + 16) + 2 * (16 + 24) + 2 * (20 + 16)
    assert report.adapters == {"a": size, "b": size}
    assert report.adapter_bytes == {"a": 8 * size, "b": 8 * size}
    assert report.trainable == size
    assert report.total == 2 * size + sum(p.numel() for p in make_zoo().parameters())
    assert report.percent == pytest.approx(100 * size / report.total)
    assert str(report).startswith(f"trainable: {size:,} of {report.total:,} parameters (")
    assert "adapter 'b':" in str(report)
    empty = lora_ext.models.trainable_parameters(nn.Module())
    assert (empty.percent, str(empty).endswith("no adapters")) == (0.0, True)


def test_trainable_parameters_counts_shared_layers_once():
    shared = nn.Linear(4, 4)
    model = apply_lora(nn.ModuleList([shared, nn.Sequential(shared)]), LoraConfig("0", 2))
    report = lora_ext.models.trainable_parameters(model)
    assert report.adapters == {"default": 16}
    assert report.trainable == 16
    assert report.total == 36


def test_lora_plus_groups():
    model = make_zoo()
    config = LoraConfig(["q_proj", "c_attn"], 2, lora_bias=True, bias="all", modules_to_save="norm")
    apply_lora(model, config, "a")
    apply_lora(model, LoraConfig("emb", 2), "b")
    lora_ext.set_adapter(model, ["a", "b"])
    groups = lora_ext.models.lora_plus_groups(
        model, 1e-3, ratio=8.0, weight_decay=0.1, embedding_lr=2e-6
    )
    rates = {}
    for group in groups:
        assert group["params"]
        for parameter in group["params"]:
            assert parameter not in rates
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
            rates[parameter] = group["lr"]
    assert set(rates) == {p for p in model.parameters() if p.requires_grad}
    for path, layer in lora_layers(model):
        for table in ("lora_a", "lora_b", "lora_bias"):
            for parameter in getattr(layer, table).values():
                expected = {"lora_a": 1e-3}.get(table, 8e-3)
                assert rates[parameter] == (2e-6 if path == "emb" else expected)
    assert rates[model.norm.weight] == rates[model.conv.bias] == 1e-3
    torch.optim.AdamW(groups)
    lora_ext.set_adapter(model, "b")
    names = [group["name"] for group in lora_ext.models.lora_plus_groups(model, 1e-3)]
    assert names == ["embedding", "other"]
    with pytest.raises(ValueError, match="of 0 or more, but got"):
        lora_ext.models.lora_plus_groups(model, -1.0)
    with pytest.raises(ValueError, match="trainable parameters, but all are frozen"):
        lora_ext.models.lora_plus_groups(model.requires_grad_(False), 1e-3)


def test_lora_plus_groups_of_a_peft_model():
    """As PEFT's create_loraplus_optimizer has them."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "emb"], modules_to_save=["norm"])
    model = lora_ext.accelerate(peft.get_peft_model(make_zoo(), config))
    words = {"lr": 1e-3, "weight_decay": 0.1}
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, loraplus_lr_ratio=8.0, loraplus_lr_embedding=2e-6, **words
    )
    ours = lora_ext.models.lora_plus_groups(model, ratio=8.0, embedding_lr=2e-6, **words)
    rates = [
        {p: g["lr"] for g in groups for p in g["params"]} for groups in (theirs.param_groups, ours)
    ]
    vectors = {p for p in rates[0] if p.dim() == 1}  # which PEFT counts to B
    assert {p: rates[0][p] for p in rates[0].keys() - vectors} == {
        p: rates[1][p] for p in rates[1].keys() - vectors
    }
    assert rates[0].keys() == rates[1].keys() and {rates[1][p] for p in vectors} == {1e-3}
    assert {group["name"] for group in ours} == {"lora_a", "lora_b", "embedding", "other"}


# ---- explaining ----


def products(layer, x):
    """How many of ATen's matrix products run in one forward."""
    with profile(activities=[ProfilerActivity.CPU]) as trace, torch.no_grad():
        layer(x)
    names = ("aten::mm", "aten::addmm", "aten::matmul", "aten::linear", "mkldnn::_linear_pointwise")
    return {event.key: event.count for event in trace.key_averages() if event.key in names}


@pytest.mark.parametrize("rows", [4, KERNEL_ROWS, 200])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_explained_path_is_the_one_that_runs(dtype, dropout, rows, packed):
    """axolotl#3806: dropout turned the fused path off in silence. Counted in torch's profiler."""
    layer = LoRALinear(64, 48, r=8, lora_dropout=dropout, dtype=dtype)
    if packed:
        layer.pack_weight()
    path, reason = layer.path(rows)
    assert reason
    ran = products(layer, torch.randn(rows, 64, dtype=dtype))
    assert ("aten::mm" in ran) == (path == "library")  # the shrink, by ATen
    if path == "packed":
        assert ran == {"mkldnn::_linear_pointwise": 1}
    elif path == "fused":
        assert ran.keys() <= {"aten::linear", "aten::addmm"}
    if rows == 200 and dtype != F64:
        assert path == ("packed" if layer.packed and layer.packed.is_packed else "fused")


@pytest.mark.parametrize("rank, dtype, says", [(96, BF16, 0), (97, BF16, 1), (97, F32, 0)], ids=str)
def test_explain_of_a_high_rank_says_which_sums_may_be_slower(rank, dtype, says):
    layer = LoRALinear(128, 128, r=rank, dtype=BF16).to(dtype)  # the adapters, too
    assert ("sums are in float32" in layer.path(200)[1]) == bool(says)


def test_explain_names_every_path():
    model = nn.ModuleDict({f"l{i}": nn.Linear(32, 32) for i in range(7)})
    apply_lora(model, LoraConfig("l*"), "a")
    apply_lora(model, LoraConfig("l3", lora_dropout=0.5), "b")
    lora_ext.set_adapter(model, ["a", "b"])
    model.l1.pack_weight()
    model.l2.merge()
    model.l4.set_adapter([])
    model.l5.delete_adapter("a")
    model.l6.double()
    with model.l0.disable_adapter():
        found = {layer.name: (layer.path, layer.reason) for layer in lora_ext.explain(model)}
    assert found["l0"] == ("base", "adapters are disabled")
    assert found["l1"][0] == ("packed" if model.l1.packed.is_packed else "fused")
    assert found["l2"] == ("merged", "merged: a")
    assert found["l3"] == ("added", "adapters 'a' and 'b' differ in dropout: added by torch")
    assert found["l4"] == ("base", "no adapter is active")
    assert found["l5"] == ("base", "no adapter")
    assert found["l6"][0] == "library"
    assert lora_ext.explain(model.l0)[0].path == "fused"
    assert lora_ext.explain(model.l0, rows=1)[0].path == "fused"
    model.eval()
    assert lora_ext.explain(model.l3)[0].path == "fused"
    model.l3.merge("a")
    assert lora_ext.explain(model.l3)[0].reason.endswith("rank 8; merged: a")


def test_a_weight_that_is_kept_as_in_by_out_can_be_packed():
    """A square one, whose transpose would go unnoticed."""
    layer = LoRALinear(24, 24, fan_in_fan_out=True)
    randomize(layer)
    x = torch.randn(60, 24)
    y = layer(x)
    if not layer.pack_weight(backward=True).is_packed:
        pytest.skip("this torch has no oneDNN")
    torch.testing.assert_close(layer(x), y)
    assert layer.path()[0] == "packed"


def test_the_weight_of_a_convolution_is_not_packed():
    layer = make_layer("conv2d")
    x = torch.randn(2, 12, 8, 8)
    randomize(layer)
    y = layer(x)
    assert "the weight is not a matrix" in layer.pack_weight().reason
    assert torch.equal(layer(x), y)
    assert layer.path()[0] == "fused"


def test_printed_explanation():
    model = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(8, 8) for _ in range(12)])})
    assert str(lora_ext.explain(model)).startswith("no layer has adapters")
    apply_lora(model, LoraConfig("h.*"))
    model.h[3].merge()
    lines = str(lora_ext.explain(model)).splitlines()
    assert len(lines) == 4
    assert lines[0] == "11 of 12 layers accelerated; others: 1 merged"
    assert lines[2].split()[:4] == ["h.*", "11", "LoRALinear", "fused"]
    assert lines[3].split()[:4] == ["h.*", "1", "LoRALinear", "merged"]
    layer = LoRALinear(8, 8, r=0)
    layer.add_adapter("a", AdapterSpec(2, 1.0))
    assert "(itself)" in str(lora_ext.explain(layer))
