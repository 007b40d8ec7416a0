"""Models with packed weights on a CPU: `warmup`, `explain`, `pack=`, and what ends a pack."""

import copy
import inspect

import pytest
import torch
from helpers import BF16, F32, max_error, packable
from peft import LoraConfig, get_peft_model
from peft_helpers import (
    HEIGHT,
    WIDTH,
    accelerated,
    exact_model,
    make_ids,
    net,
    plain_copy,
    randomize,
    step,
)
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import lora_ext
from lora_ext.autotune import session
from lora_ext.nn import LoRALinear
from lora_ext.packing import pack, pack_weights

pytestmark = pytest.mark.skipif(not packable(F32), reason="this torch has no oneDNN")


def own_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    return lora_ext.apply_lora(model, lora_ext.LoraConfig("all-linear", r=4, lora_alpha=8))


def test_warmup_packs_a_model_on_the_cpu(ratios):
    model = own_model()
    said = []
    found = lora_ext.warmup(model, rows=(2, 64), progress=said.append)
    assert found.packing is not None and str(found) == str(found.packing)
    assert len(said) == 4
    assert repr([found]) == f"[Warmup(Packing(4 packs, {found.packing.nbytes / 2**20:.3g} MiB))]"
    kinds = [(kind.kind.in_features, kind.packed) for kind in found.packing.kinds]
    assert sorted(kinds) == [(24, 1), (24, 1), (40, 1), (40, 1)]
    assert lora_ext.warmup(model, rows=2, pack_budget=0, progress=False).packing.nbytes == 0
    assert all(layer.path == "fused" for layer in lora_ext.explain(model))


def test_a_model_on_the_cpu_of_a_machine_with_a_gpu_is_packed_if_asked(ratios, monkeypatch):
    asked = []
    monkeypatch.setattr(session._C, "with_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session, "indexed", lambda device: asked.append(device) or 1 / 0)
    monkeypatch.setattr(session, "_device_of", lambda model: torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        lora_ext.warmup(own_model(), rows=64, progress=False)
    assert asked == [torch.device("cuda")]
    assert lora_ext.warmup(own_model(), rows=64, device="cpu", progress=False).packing.nbytes


def test_explain_says_what_a_pack_costs_and_wins(ratios):
    ratios[False, 1] = 1.4
    model = own_model()
    lora_ext.warmup(model, rows=(1, 64), progress=False)
    few, many = lora_ext.explain(model, 1)[0], lora_ext.explain(model, 64)[0]
    assert few.path == "fused" and "packed, 1.40 of the time without" in few.reason
    assert many.path == "packed" and "0.50 of the time without as measured" in many.reason
    assert "MiB" in many.reason
    explained = lora_ext.explain(model, 64)
    assert explained.packed_bytes == 2 * 2 * 24 * 40 * 4
    assert str(explained).splitlines()[-1] == "packed weights: 0.0146 MiB"


@pytest.mark.parametrize("make", ["own", "peft"])
def test_pack_in_one_word(ratios, make):
    if make == "own":
        torch.manual_seed(0)
        bare = nn.Sequential(nn.Linear(24, 40))
        model = lora_ext.apply_lora(bare, lora_ext.LoraConfig("all-linear", r=4), pack=(3, 64))
        rows = (3, 64)
    else:
        model = lora_ext.accelerate(net(), pack=True)
        rows = pack.DECODE_AND_TRAINING
    packs = {m.packed for m in model.modules() if getattr(m, "packed", None) is not None}
    assert len(packs) == (1 if make == "own" else 3)
    for each in packs:
        assert tuple(n for n, _ in each.wins.forward) == rows


@pytest.mark.parametrize("words", ["yes", 0, (), (4, 0), 1.5, (2.5,)], ids=str)
def test_pack_takes_a_bool_or_rows(words):
    with pytest.raises((TypeError, ValueError), match="lora_ext: expected"):
        lora_ext.accelerate(net(), pack=words)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_accelerated_model_gives_the_same_from_packs(ratios, dtype):
    """Linear, a Linear without bias and a Conv1D, whose weight is [in, out]."""
    if not packable(dtype):
        pytest.skip("oneDNN does not pack bfloat16 on this processor")
    model = accelerated(net(dtype=dtype))
    plain, exact = copy.deepcopy(model), exact_model(model)
    lora_ext.warmup(model, rows=(54,), progress=False)
    paths = {layer.name[-4:]: layer.path for layer in lora_ext.explain(model)}
    assert paths == {"mbed": paths["mbed"], "l.up": "packed", "gate": "packed", "down": "packed"}
    ids = make_ids()
    found, unpacked, wanted = (step(each, ids, dtype=dtype) for each in (model, plain, exact))
    assert found.keys() == unpacked.keys() == wanted.keys() and len(found) > 6
    for name, right in wanted.items():
        floor = torch.finfo(dtype).eps * right.abs().max().item()
        assert max_error(found[name], right) <= 2 * max_error(unpacked[name], right) + floor, name


def test_state_dicts_and_copies_know_nothing_of_packs(ratios):
    model = accelerated(net())
    before = model.state_dict()
    lora_ext.warmup(model, rows=(54,), progress=False)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    other = copy.deepcopy(model)
    layer = other.base_model.model.up
    assert layer.packed is None or not layer.packed.is_packed
    assert {each.path for each in lora_ext.explain(other) if "embed" not in each.name} == {"fused"}
    torch.testing.assert_close(other(make_ids()), model(make_ids()))
    assert plain_copy(model).base_model.model.up.__dict__.get("packed") is None


def begin_olora(layer):
    """The adapter anew, in PEFT's words; before 0.20 each field was an argument."""
    words = {"config": LoraConfig(init_lora_weights="olora")}
    if "config" not in inspect.signature(layer.update_layer).parameters:
        words = {"lora_dropout": 0.0, "init_lora_weights": "olora", "use_rslora": False}
    layer.update_layer("a", r=4, lora_alpha=6, **words)


CHANGES = {
    "merged safely": lambda model: (model.merge_adapter(safe_merge=True), model.unmerge_adapter()),
    "loaded": lambda model: model.load_state_dict(
        {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    ),
    "another base": lambda model: setattr(
        model.base_model.model.up, "base_layer", nn.Linear(WIDTH, HEIGHT).requires_grad_(False)
    ),
    "OLoRA": lambda model: model.add_adapter(
        "olora", LoraConfig(target_modules=["up"], init_lora_weights="olora")
    ),
    "OLoRA of the layer": lambda model: begin_olora(model.base_model.model.up),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fast", [True, False])
def test_a_pack_does_not_outlive_a_change_of_an_accelerated_model(
    ratios, monkeypatch, change, fast
):
    model = accelerated(net())
    lora_ext.warmup(model, rows=(54,), progress=False)
    layer = model.base_model.model.up
    assert layer.packed.is_packed
    with torch.no_grad():
        CHANGES[change](model)
    plain = plain_copy(model)
    if not fast:
        monkeypatch.setattr("lora_ext.peft.linear.fast_path_operands", lambda layer, x: None)
    x = torch.randn(54, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain.base_model.model.up(x))
    assert layer.packed is None or not layer.packed.is_packed
    assert layer.path(54)[0] == "fused"


@pytest.mark.parametrize("kind", [torch.clone, nn.Parameter])
def test_another_weight_of_one_call_leaves_the_pack(ratios, kind):
    model = accelerated(net())
    lora_ext.warmup(model, rows=(54,), progress=False)
    up = model.base_model.model.up
    pack, other, x = up.packed, kind(torch.randn(HEIGHT, WIDTH)), torch.randn(54, WIDTH)
    with torch.no_grad():
        found = functional_call(up, {"base_layer.weight": other.requires_grad_(False)}, (x,))
        plain = up(x) + x @ (other - up.base_layer.weight).t()
    torch.testing.assert_close(found, plain)
    assert up.packed is pack and pack.is_packed and up.path(54)[0] == "packed"


def test_a_further_adapter_leaves_packs(ratios):
    """Of an initialization that changes no weight."""
    model = accelerated(net())
    lora_ext.warmup(model, rows=(54,), progress=False)
    model.add_adapter("other", LoraConfig(target_modules=["up", "down"]))
    assert all(getattr(model.base_model.model, name).packed.is_packed for name in ("up", "down"))


class Tied(nn.Module):
    """An embedding and three layers over its weight; one layer has it as [in, out]."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.gate = nn.Embedding(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.down = Conv1D(24, 24)
        self.up.weight = self.gate.weight = self.down.weight = self.embed.weight


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("writer", ["embed", "up", "gate", "down"])
def test_packs_of_a_tied_weight_go_with_whoever_merges(ratios, writer):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["embed", "up", "gate", "down"], fan_in_fan_out=True)
    model = randomize(get_peft_model(Tied(), config))
    model = lora_ext.accelerate(model)
    layers = model.base_model.model
    x = torch.randn(54, 24)

    def outputs(model):
        layers = model.base_model.model
        with torch.no_grad():
            return [getattr(layers, name)(x) for name in ("up", "gate", "down")]

    for change in (lambda: None, getattr(layers, writer).merge, getattr(layers, writer).unmerge):
        lora_ext.warmup(model, rows=(54,), progress=False)
        assert layers.up.packed is layers.gate.packed and layers.up.packed.is_packed
        assert layers.down.packed.transposed and not layers.up.packed.transposed
        change()
        torch.testing.assert_close(outputs(model), outputs(plain_copy(model)))


def test_rows_with_a_bias_of_their_own_go_beside_a_conv1d_that_is_packed(ratios):
    """The base alone, whose weight is [in, out] and here square."""
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(24, 24, fan_in_fan_out=True, r=4, lora_bias=True))
    with torch.no_grad():
        for parameter in model[0].lora_b.parameters():
            parameter.normal_()
    x, names = torch.randn(64, 24), ["default"] * 64
    with torch.no_grad(), lora_ext.use_adapters(model, names):
        plain = model(x)
        pack_weights(model, (64,))
        assert model[0].packed.transposed
        torch.testing.assert_close(model(x), plain)
