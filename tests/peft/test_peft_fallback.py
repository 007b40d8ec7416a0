"""What only PEFT computes: its own forward runs, and explain says why."""

import warnings

import pytest
import torch
from helpers import F32, F64
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft_helpers import accelerated, layer_model, make_x, paths, reasons
from torch import nn

import lora_ext
from lora_ext.peft import variants


def parametrized(layer):
    nn.utils.parametrizations.weight_norm(layer.lora_A["a"])


REASONS = {
    "lora_A or lora_B is not a plain nn.Linear": parametrized,
    "lora_dropout is not nn.Dropout": lambda m: m.lora_dropout.update({"a": nn.AlphaDropout(0.0)}),
    "lora_dropout is 1, which drops everything": lambda m: m.lora_dropout.update(
        {"a": nn.Dropout(1.0)}
    ),
    "lora_A and lora_B do not have the same floating dtype": lambda m: m.lora_A["a"].to(F32),
    "lora_A's or lora_B's forward was replaced, as by an offload hook": lambda m: setattr(
        m.lora_B["a"], "forward", m.lora_B["a"].forward
    ),
    "x has another dtype than the adapter, and cast_input_dtype_enabled is off": lambda m: setattr(
        m, "cast_input_dtype_enabled", False
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_for_pefts_forward(reason):
    """Each is named, and the result is PEFT's, errors included."""
    model = layer_model("linear", "one", F64)
    fast, x = accelerated(model), make_x("linear", F64)
    for one in (model, fast):
        REASONS[reason](one.base_model.model[0])
    if "cast_input" not in reason:  # which holds for an x of another dtype too
        assert reasons(fast) == {("peft", reason)}
    outcomes = []
    for one in (model, fast):
        try:
            outcomes.append(one(x))
        except RuntimeError as error:
            outcomes.append(str(error))
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes)


def test_a_model_without_a_layer_that_has_a_fast_forward_warns():
    """AdaLoRA's layers are LoRA layers of PEFT; the model computes what it did."""
    config = AdaLoraConfig(target_modules=["0"], init_r=4, target_r=2, total_step=10)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.warns(UserWarning, match=r"nothing was accelerated.*SVDLinear\); PEFT computes"):
        lora_ext.accelerate(model)
    assert torch.equal(model(x), before)
    lora = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_ext.accelerate(lora_ext.accelerate(lora))


@pytest.mark.parametrize(
    ("adapters", "words", "reason"),
    [
        ("three", {"use_dora": True}, "several active adapters, one of them DoRA"),
        ("one", {"init_lora_weights": "mica"}, "a variant of LoRA other than DoRA"),
    ],
)
def test_variants_that_only_peft_computes(adapters, words, reason):
    model = layer_model("linear", adapters, **words)
    fast, x = accelerated(model), make_x("linear")
    assert reasons(fast) == {("peft", reason)}
    assert torch.equal(fast(x), model(x))


def test_a_variant_in_the_table_is_computed_here(monkeypatch):
    """MiCA trains A alone: its forward is LoRA's."""
    from peft.tuners.lora.variants import MiCALinearVariant

    def forward(layer, x, weight, bias, update):
        factors = update.lora_a, update.lora_b
        return lora_ext.lora_linear(x, weight, *factors, bias, update.scaling)

    entry = variants.Variant("MiCA", lambda layer, name: "", forward)
    monkeypatch.setitem(variants.LINEAR, MiCALinearVariant, entry)
    model = layer_model("linear", "one", init_lora_weights="mica")
    fast, x = accelerated(model), make_x("linear")
    assert reasons(fast) == {("added", "MiCA: added to x W^T by torch")}
    torch.testing.assert_close(fast(x), model(x))


OF_DORA = {
    "hook": lambda m: m.lora_magnitude_vector["a"].register_forward_hook(lambda *_: None),
    "lora_bias": lambda m: setattr(m.lora_B["a"], "bias", nn.Parameter(torch.ones(40))),
    "offload": lambda m: setattr(m, "ephemeral_gpu_offload", True),
}


@pytest.mark.parametrize("change", OF_DORA)
def test_dora_that_only_peft_computes(change):
    model = layer_model("linear", "dora")
    OF_DORA[change](model.base_model.model[0])
    fast, x = accelerated(model), make_x("linear")
    assert set(paths(fast).values()) == {"peft"}
    assert torch.equal(fast(x), model(x))


def test_layers_without_a_faster_forward_are_listed():
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 5)),
        LoraConfig(target_modules=["0", "2"], r=2),
    )
    lora_ext.accelerate(model)
    assert next((layer.path, layer.reason) for layer in lora_ext.explain(model)) == (
        "peft",
        "lora_ext has no forward for PEFT's Conv2d",
    )
    assert "Conv2d" in str(lora_ext.explain(model))


class PackedLinear(nn.Module):
    """With the tensors of GPTQ's and AWQ's layers: eight codes in each int32."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        codes = torch.zeros(in_features // 8, out_features, dtype=torch.int32)
        self.register_buffer("qweight", codes)
        self.register_buffer("scales", torch.ones(1, out_features))


def test_weights_that_are_packed_as_nothing_here_reads_are_named():
    from peft.tuners.lora.gptq import GPTQLoraLinear

    model = get_peft_model(nn.Sequential(nn.Linear(16, 8)), LoraConfig(target_modules=["0"]))
    config = model.peft_config["default"]
    model.base_model.model[0] = GPTQLoraLinear(PackedLinear(16, 8), "default", config, r=2)
    (layer,) = lora_ext.explain(lora_ext.accelerate(model))
    assert layer.path == "peft" and layer.reason.startswith(
        "lora_ext has no forward for PEFT's GPTQLoraLinear: its weight is packed, in 'qweight' of "
        "torch.int32, as lora_ext does not read"
    )
    ours = nn.Sequential(nn.Linear(16, 16), PackedLinear(16, 8))
    with pytest.raises(ValueError, match="of '1', a PackedLinear, its weight is packed"):
        lora_ext.apply_lora(ours, lora_ext.LoraConfig("all-linear"))
    lora_ext.apply_lora(ours, lora_ext.LoraConfig("all-linear", exclude_modules="1"))
    assert [layer.name for layer in lora_ext.explain(ours)] == ["0"]


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_an_adapter_that_is_not_in_the_layer(kind):
    model = layer_model(kind, "one")
    fast, x = accelerated(model), make_x(kind)
    fast.base_model.model[0]._active_adapter = model.base_model.model[0]._active_adapter = "other"
    assert {layer.path for layer in lora_ext.explain(fast)} == {"base"}
    assert torch.equal(fast(x), model(x))


def test_torch_func_and_forward_mode_take_pefts_forward():
    model = layer_model("linear", "one", F64)
    fast, x = accelerated(model), make_x("linear", F64, 3)
    tangent = torch.randn_like(x)
    for transform in (
        lambda m: torch.func.vmap(m)(x),
        lambda m: torch.func.grad(lambda x: m(x).square().sum())(x),
        lambda m: torch.func.jvp(m, (x,), (tangent,))[1],
        lambda m: torch.func.jacrev(m)(x),
    ):
        torch.testing.assert_close(transform(fast), transform(model), rtol=1e-11, atol=1e-11)
