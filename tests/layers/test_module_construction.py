"""How a layer is made, around what, and what its first values are."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from helpers import BF16, F32, F64
from layer_helpers import KINDS, make_base, make_input, make_layer
from torch import nn

from lora_ext import LoRALinear
from lora_ext.nn import AdapterSpec, LoRAConv2d, LoRAEmbedding, LoRAMergedLinear

SPEC = AdapterSpec(4, 6.0)


def test_constructor_words():
    layer = LoRALinear(
        6, 5, False, dtype=F64, r=3, lora_alpha=2.0, lora_dropout=0.1, use_rslora=True
    )
    assert layer.adapters == {"default": AdapterSpec(3, 2.0, 0.1, True)}
    assert layer.active_adapters == ("default",)
    assert layer.bias is None
    assert layer.weight.dtype == layer.lora_a["default"].dtype == F64
    assert layer.lora_a["default"].shape == (3, 6)
    assert layer.lora_b["default"].shape == (5, 3)
    assert layer.lora_b["default"].eq(0).all()
    assert LoRALinear(6, 5).adapters["default"] == AdapterSpec(8, 8.0)
    assert LoRALinear(6, 5, lora_bias=True).lora_bias["default"].eq(0).all()
    half = LoRALinear(6, 5, dtype=BF16, adapter_dtype=BF16)
    assert {p.dtype for p in half.parameters()} == {BF16}
    assert LoRALinear(6, 5, fan_in_fan_out=True).weight.shape == (6, 5)
    embedding = LoRAEmbedding(7, 5, -1, r=2, lora_alpha=4.0)
    assert embedding.padding_idx == 6
    assert embedding.lora_a["default"].shape == (2, 7)
    assert embedding.lora_b["default"].shape == (5, 2)
    assert LoRAConv2d(6, 5, 1, stride=2).adapters == {}
    assert LoRAMergedLinear(6, 6).enable_lora == (True,)


def test_rank_zero_is_a_plain_layer_that_trains():
    layer = LoRALinear(6, 5, r=0)
    assert layer.weight.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.path() == ("base", "no adapter")
    assert LoRAEmbedding(6, 5, r=0).weight.requires_grad


def test_the_constructor_draws_as_nn_linear_does():
    torch.manual_seed(3)
    plain = nn.Linear(6, 5)
    torch.manual_seed(3)
    assert torch.equal(LoRALinear(6, 5).weight, plain.weight)


BAD_WORDS = {
    "r": (-1, 513, 2.0, True),
    "lora_alpha": (float("nan"), float("inf"), "8"),
    "lora_dropout": (1.0, -0.1, float("nan")),
    "init_lora_weights": ("zeros", False, 1),
}


@pytest.mark.parametrize(
    "words", [{key: value} for key, values in BAD_WORDS.items() for value in values], ids=str
)
def test_bad_words_are_refused_before_anything_is_allocated(words):
    with pytest.raises(ValueError, match=r"lora_ext\.nn\.AdapterSpec: expected .* but got"):
        LoRALinear(2**30, 2**30, **words)
    linear = nn.Linear(6, 5)
    with pytest.raises(ValueError, match="but got"):
        LoRALinear.from_linear(linear, **words)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_pissa_and_olora_cannot_start_from(init):
    with pytest.raises(ValueError, match="at most 5"):
        LoRALinear(6, 5, r=6, init_lora_weights=init)
    with pytest.raises(ValueError, match="at most 256"):
        LoRALinear(600, 600, r=257, init_lora_weights=init)
    with pytest.raises(ValueError, match="meta device"):
        LoRALinear(6, 5, r=2, init_lora_weights=init, device="meta")
    with pytest.raises(ValueError, match="for layers with one group"):
        make_layer("merged_linear", {"a": AdapterSpec(1, 1.0, init_lora_weights=init)})
    with pytest.raises(ValueError, match="linear layers only"):
        make_layer("embedding", {"a": AdapterSpec(1, 1.0, init_lora_weights=init)})


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_pissa_divides_by_the_scaling(alpha):
    with pytest.raises(ValueError, match="lora_alpha above 0"):
        LoRALinear(6, 5, r=2, lora_alpha=alpha, init_lora_weights="pissa")


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_every_init_starts_at_the_base(init, dtype):
    base = make_base("linear", dtype)
    layer = LoRALinear.from_linear(copy.deepcopy(base), r=3, lora_alpha=5.0, init_lora_weights=init)
    x = make_input("linear", dtype)
    tolerance = {F64: 1e-12, F32: 2e-6, BF16: 2**-7}[dtype]
    torch.testing.assert_close(layer(x), base(x), rtol=tolerance, atol=tolerance)
    assert torch.equal(layer.weight, base.weight)
    layer.merge()
    torch.testing.assert_close(layer(x), base(x), rtol=tolerance, atol=tolerance)


def test_gaussian_has_the_deviation_of_r():
    layer = LoRAMergedLinear.around(nn.Linear(4000, 6))
    layer.enable_groups([True, True, False])
    layer.add_adapter("a", AdapterSpec(4, 1.0, init_lora_weights="gaussian"))
    assert abs(layer.lora_a["a"].std().item() - 0.25) < 0.005


def test_enable_groups():
    layer = LoRAMergedLinear.around(nn.Linear(4, 6))
    for wrong in ([], [False, False], [True] * 4):
        with pytest.raises(ValueError, match="divides out_features"):
            layer.enable_groups(wrong)
    layer.enable_groups([True, True, False])
    with pytest.raises(ValueError, match="2 enabled groups"):
        layer.add_adapter("a", AdapterSpec(300, 1.0))
    layer.add_adapter("a", AdapterSpec(256, 1.0))
    assert layer(torch.randn(2, 4)).shape == (2, 6)
    with pytest.raises(ValueError, match="without adapters"):
        layer.enable_groups([True])


@pytest.mark.parametrize("kind", KINDS)
def test_around_shares_and_freezes(kind):
    if kind == "fan_in_fan_out":
        return
    base = make_base(kind)
    base.eval()
    cls = type(make_layer(kind))
    layer = cls.around(base)
    assert layer.weight is base.weight
    assert getattr(layer, "bias", None) is getattr(base, "bias", None)
    assert not layer.training
    assert layer.weight.requires_grad
    layer.add_adapter("a", SPEC)
    assert not layer.weight.requires_grad
    assert kind == "embedding" or layer.bias.requires_grad
    x = make_input(kind)
    assert torch.equal(layer.as_base(layer.weight, layer.bias)(x), base(x))
    restored = layer.as_base(layer.weight, layer.bias)
    assert type(restored) is type(base)
    assert restored.__dict__.keys() == base.__dict__.keys()


def not_plain():
    class Sub(nn.Linear):
        pass

    yield Sub(4, 4), "expected exactly"
    yield nn.Bilinear(4, 4, 4), "expected exactly"
    yield nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "expected exactly"
    yield nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "expected exactly"
    yield nn.utils.spectral_norm(nn.Linear(4, 4)), "its weight is computed"
    yield nn.utils.prune.identity(nn.Linear(4, 4), "weight"), "its weight is computed"
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x
    yield replaced, "forward was replaced"
    for add in ("parameter", "buffer"):
        more = nn.Linear(4, 4)
        value = nn.Parameter(torch.ones(4)) if add == "parameter" else torch.ones(4)
        getattr(more, f"register_{add}")("gain", value)
        yield more, "holds .*gain"
    hooked = nn.Linear(4, 4)
    hooked.register_state_dict_pre_hook(lambda *args: None)
    yield hooked, "hooks on its state dict"
    loading = nn.Linear(4, 4)
    loading.register_load_state_dict_pre_hook(lambda *args: None)
    yield loading, "hooks on its state dict"


def test_what_would_be_lost_or_is_not_plain_is_refused():
    for module, message in not_plain():
        with pytest.raises(TypeError, match=message):
            LoRALinear.from_linear(module)


def test_settings_that_the_layers_have_not():
    with pytest.raises(ValueError, match="max_norm"):
        LoRAEmbedding.around(nn.Embedding(4, 4, max_norm=1.0))
    for conv in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1)):
        with pytest.raises(ValueError, match=r"lora_ext\.nn\.LoRAConv2d: expected a"):
            LoRAConv2d.around(conv)
    with pytest.raises(ValueError, match="1x1"):
        LoRAConv2d(4, 4, 3)
    layer = LoRALinear(4, 4, r=0)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="floating weight"):
        layer.add_adapter("a", SPEC)
