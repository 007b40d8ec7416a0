"""Models and state dicts of the real loralib: converted, trained on, and back."""

import copy

import loralib
import pytest
import torch
from adapter_helpers import assert_unchanged, state_of
from helpers import F64
from layer_helpers import assert_same_state, snapshot
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoRALinear
from lora_ext.models import lora_layers
from lora_ext.nn import LoRAEmbedding, LoRAMergedLinear

IN, OUT, VOCAB = 12, 18, 20

LAYERS = {
    "linear": lambda: loralib.Linear(IN, OUT, r=3, lora_alpha=5),
    "linear without bias": lambda: loralib.Linear(IN, OUT, r=3, bias=False),
    "linear fan_in_fan_out": lambda: loralib.Linear(IN, OUT, r=3, fan_in_fan_out=True),
    "linear r=0": lambda: loralib.Linear(IN, OUT, r=0),
    "linear kept apart": lambda: loralib.Linear(IN, OUT, r=3, merge_weights=False),
    "embedding": lambda: loralib.Embedding(VOCAB, OUT, r=3, lora_alpha=2),
    "embedding padded": lambda: loralib.Embedding(VOCAB, OUT, r=3, padding_idx=2),
    "embedding r=0": lambda: loralib.Embedding(VOCAB, OUT, r=0),
    **{
        f"merged {enable}{' fan_in_fan_out' * fan}": lambda enable=enable, fan=fan: (
            loralib.MergedLinear(
                IN, OUT, r=2, lora_alpha=3, enable_lora=enable, fan_in_fan_out=bool(fan)
            )
        )
        for enable in ([True], [True, False], [False, True, True], [True, True, True])
        for fan in (0, 1)
    },
    "merged r=0": lambda: loralib.MergedLinear(IN, OUT, r=0, enable_lora=[True, False]),
}


@torch.no_grad()
def make(name):
    """A model of one layer, in float64, as after some training."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name]()).double()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    return model


def make_x(name):
    generator = torch.Generator().manual_seed(1)
    if "embedding" in name:
        return torch.randint(0, VOCAB, (4, 5), generator=generator)
    return torch.randn(4, 5, IN, generator=generator, dtype=F64)


def adapted(name):
    return "r=0" not in name


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_converted_layers_compute_the_same(name, mode):
    """Outputs, gradients and Parameter objects; from training, and from a merged eval mode."""
    theirs, x = make(name), make_x(name)
    y = theirs(x)
    ours = copy.deepcopy(theirs).train(mode)
    parameters = set(ours.parameters())
    assert lora_ext.loralib.convert_loralib(ours, "task") is ours
    assert ours[0].training == mode
    assert set(ours.parameters()) == parameters
    assert not ours[0].merged
    kinds = {"linear": LoRALinear, "merged": LoRAMergedLinear, "embedding": LoRAEmbedding}
    assert type(ours[0]) is kinds[name.split()[0]]
    assert list(ours[0].adapters) == ["task"] * adapted(name)
    assert torch.allclose(ours(x), y, rtol=1e-12, atol=1e-12)
    theirs.train()
    grad = torch.randn_like(y)
    theirs(x).backward(grad)
    ours(x).backward(grad)
    named = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        old = named[key.replace("lora_a.task", "lora_A").replace("lora_b.task", "lora_B")]
        assert parameter.requires_grad == old.requires_grad
        assert (parameter.grad is None) == (old.grad is None)
        if old.grad is not None:
            assert torch.allclose(parameter.grad, old.grad, rtol=1e-11, atol=1e-11)
    lora_ext.merge_adapter(ours)
    theirs.eval()
    assert torch.allclose(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    weight = lora_ext.merge_and_unload(ours)[0].weight
    if "apart" not in name:  # where loralib merges
        wanted = theirs[0].weight.t() if "fan_in" in name else theirs[0].weight
        assert torch.allclose(weight, wanted, rtol=1e-11, atol=1e-11)


def test_dropout_and_scaling_come_along():
    model = nn.Sequential(loralib.Linear(IN, OUT, r=4, lora_alpha=6, lora_dropout=0.25)).double()
    model[0].scaling = 0.3  # by hand, as for task arithmetic
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(3, IN, dtype=F64)
    y = model.eval()(x)
    lora_ext.loralib.convert_loralib(model)
    spec = model[0].adapters["default"]
    assert spec.lora_dropout == 0.25
    assert spec.scaling == pytest.approx(0.3)
    assert torch.allclose(model(x), y)


def test_an_optimizer_goes_on():
    """Adam's state belongs to the Parameter objects: both trajectories are the same."""
    models, losses = [make("linear"), make("linear")], [[], []]
    for model, found in zip(models, losses, strict=True):
        loralib.mark_only_lora_as_trainable(model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
        for step in range(6):
            if step == 3 and model is models[1]:
                lora_ext.loralib.convert_loralib(model)
            optimizer.zero_grad()
            loss = model(make_x("linear")).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_a_module_at_two_paths():
    shared = loralib.Linear(IN, IN, r=2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}).double()
    state = loralib.lora_state_dict(model)
    lora_ext.loralib.convert_loralib(model)
    assert model["a"] is model["b"][0]
    assert lora_ext.loralib.loralib_state_dict(model).keys() == state.keys()
    lora_ext.loralib.load_loralib_state_dict(model, state)


class Custom(loralib.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: loralib.Conv2d(4, 4, 1, r=2), r"other layers of loralib at \['1'\]"),
        (lambda: Custom(4, 4, r=2), r"other layers of loralib at \['1'\]"),
        (lambda: loralib.Embedding(4, 4, r=2, max_norm=1.0), r"max_norm.*\(at '1'\)"),
        (lambda: loralib.Linear(4, 4, r=600), r"rank r of 1 to 512.*\(at '1'\)"),
        (lambda: loralib.Linear(4, 4, r=2, lora_dropout=1.0), r"dropout in.*\(at '1'\)"),
        (
            lambda: loralib.MergedLinear(4, 4, r=300, enable_lora=[True, True]),
            r"2 enabled groups to be at most 512.*\(at '1'\)",
        ),
    ],
)
def test_a_refusal_changes_nothing(bad, message):
    """The merged layer before the one that is refused stays merged by loralib, to the last bit."""
    model = nn.Sequential(loralib.Linear(4, 4, r=2), bad())
    nn.init.normal_(model[0].lora_B)
    model.eval()
    model[0].weight.requires_grad_(True)
    assert model[0].merged
    before, modules = state_of(model), list(model.modules())
    with pytest.raises(ValueError, match=message):
        lora_ext.loralib.convert_loralib(model)
    assert model[0].merged
    assert_unchanged(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_there_must_be_something_to_convert():
    with pytest.raises(ValueError, match=r"convert_loralib: expected layers .* but got none"):
        lora_ext.loralib.convert_loralib(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="but got none"):
        lora_ext.loralib.convert_loralib(lora_ext.loralib.convert_loralib(make("linear")))


# ---- state dicts ----


def make_pair():
    """(a loralib model, one made by apply_lora) with the same layers and other values."""
    theirs = nn.ModuleDict(
        {
            "emb": loralib.Embedding(VOCAB, IN, r=2),
            "lin": loralib.Linear(IN, OUT, r=2),
            "norm": nn.LayerNorm(OUT),
        }
    )
    ours = nn.ModuleDict(
        {"emb": nn.Embedding(VOCAB, IN), "lin": nn.Linear(IN, OUT), "norm": nn.LayerNorm(OUT)}
    )
    lora_ext.apply_lora(ours, LoraConfig(["emb", "lin"], r=2, lora_alpha=1.0))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter.data)
    return theirs.double(), ours.double()


def run(model):
    ids = torch.randint(0, VOCAB, (4, 5), generator=torch.Generator().manual_seed(1))
    return model["norm"](model["lin"](model["emb"](ids)))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_state_dicts_go_both_ways(bias):
    theirs, ours = make_pair()
    plain = {key: value for key, value in theirs.state_dict().items() if "lora_" not in key}
    ours.load_state_dict(plain, strict=False)
    state = loralib.lora_state_dict(theirs, bias)
    lora_ext.merge_adapter(ours)
    lora_ext.loralib.load_loralib_state_dict(ours, state)
    assert torch.allclose(run(ours), run(theirs))
    back = lora_ext.loralib.loralib_state_dict(ours, bias=bias)
    # loralib takes the LayerNorm's bias for one too, and so does this library.
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    other, _ = make_pair()
    other.load_state_dict({**plain, **back}, strict=False)
    assert torch.allclose(run(other), run(theirs))


def test_a_whole_state_dict_of_loralib():
    theirs, ours = make_pair()
    lora_ext.loralib.load_loralib_state_dict(ours, theirs.state_dict())
    assert torch.allclose(run(ours), run(theirs))


def test_merged_layers_have_loralibs_layout():
    theirs = make("merged [False, True, True]")
    ours = lora_ext.loralib.convert_loralib(copy.deepcopy(theirs))
    state = lora_ext.loralib.loralib_state_dict(ours)
    assert all(
        torch.equal(state[key], value) for key, value in loralib.lora_state_dict(theirs).items()
    )
    for parameter in ours[0].lora_b.values():
        nn.init.zeros_(parameter)
    lora_ext.loralib.load_loralib_state_dict(ours, state | loralib.lora_state_dict(theirs))
    x = make_x("merged")
    assert torch.allclose(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("lin.lora_B"), r"missing are \['lin.lora_B'\]"),
        (lambda state: state.update({"lin.lora_C": torch.ones(2)}), r"unknown \['lin.lora_C'\]"),
        (lambda state: state.update({"lin.lora_A": torch.ones(3, IN)}), r"lora_A of shape \[2, 12"),
        (lambda state: state["emb.lora_B"].fill_(float("nan")), "finite values in emb.lora_B"),
        (lambda state: state["emb.lora_B"].fill_(float("inf")), "finite values in emb.lora_B"),
        (lambda state: state.clear(), "missing are"),
    ],
)
def test_state_dicts_that_do_not_fit_write_nothing(change, message):
    theirs, ours = make_pair()
    state, before = copy.deepcopy(loralib.lora_state_dict(theirs)), snapshot(ours)
    change(state)
    lora_ext.merge_adapter(ours)
    with pytest.raises(ValueError, match=message):
        lora_ext.loralib.load_loralib_state_dict(ours, state)
    assert_same_state(ours, before)
    assert all(layer.merged for _, layer in lora_layers(ours))


def test_what_loralib_cannot_store():
    def model(kind, **words):
        inner = nn.Conv2d(4, 4, 1) if kind == "conv" else nn.Linear(4, 4)
        return lora_ext.apply_lora(nn.Sequential(inner), LoraConfig("0", r=2, **words))

    for bad, message in (
        (model("conv"), "is a LoRAConv2d"),
        (model("linear", init_lora_weights="pissa"), "has init 'pissa'"),
        (model("linear", lora_bias=True), "has a lora_bias"),
    ):
        with pytest.raises(ValueError, match=f"'0' {message}.*save_adapter"):
            lora_ext.loralib.loralib_state_dict(bad)
    with pytest.raises(ValueError, match="distinct names"):
        lora_ext.loralib.loralib_state_dict(model("linear"), "other")
    with pytest.raises(ValueError, match="expected bias in"):
        lora_ext.loralib.loralib_state_dict(model("linear"), bias="some")


def test_biases_by_name_not_by_adapter():
    """An adapter of the name "bias" is no bias."""
    model = lora_ext.apply_lora(nn.Sequential(nn.Linear(4, 4)), LoraConfig("0", r=2), "bias")
    lora_ext.apply_lora(model, LoraConfig("0", r=2), "other")
    state = lora_ext.loralib.loralib_state_dict(model, "other", bias="all")
    assert list(state) == ["0.lora_A", "0.lora_B", "0.bias"]


def test_a_layer_that_is_the_model():
    layer = LoRALinear(4, 4, r=2)
    state = lora_ext.loralib.loralib_state_dict(layer, bias="lora_only")
    assert set(state) == {"lora_A", "lora_B", "bias"}
    lora_ext.loralib.load_loralib_state_dict(layer, state)
