"""`use_adapters` on both kinds of layer beside formulas that are none of ours, in a loop over the
adapters: values and gradients in every dtype, dropout, idle adapters."""

import math

import pytest
import torch
from helpers import BF16, F16, F32, F64, short
from peft_helpers import as_float64

import lora_ext
from contract import bases
from contract.adapters import DIFFERENT
from contract.cases import CALLED, LAYERS, LINEAR, QUANTISED, cases
from contract.row_helpers import assert_equal_steps, assert_errors_at_most_twice, run, run_alone

EVERYTHING = ("net", "linear without bias", *LAYERS, *CALLED)
MIXTURES = tuple(bases.DENSE)
BY_TOKEN = ("linear without bias", *LINEAR, "embedding", *CALLED)
NAMES = (None, "a", "c", "b", "a", None)


def names_of(x, names=NAMES):
    """A name for each sample, in turn."""
    return [names[i % len(names)] for i in range(len(x))]


def tokens_of(subject, dtype=F32):
    """x of 12 samples of 5 tokens, and an adapter for each of those."""
    x = subject.x(60, dtype).unflatten(0, (12, 5))
    generator = torch.Generator().manual_seed(3)
    return x, torch.randint(-1, 3, x.shape[:2], generator=generator, dtype=torch.int32)


def keys_of(subject, name):
    """Names of an adapter's parameters."""
    mine = [id(parameter) for parameter in subject.factors(name)]
    return [key for key, p in subject.model.named_parameters() if id(p) in mine]


@cases((*EVERYTHING, *MIXTURES), ["three", "lora_bias of one"])
def test_equal_to_a_loop_over_the_adapters_in_float64(kind, layer, adapters):
    """Formulas that are none of ours, one adapter after the other."""
    subject = kind.make(layer, adapters, F64)
    x = subject.x(dtype=F64)
    found = run(subject, names_of(x), x)
    wanted = run_alone(subject.holding(subject.in_float64()), names_of(x), x)
    assert_equal_steps(found, wanted, 1e-11)
    assert {name for name in found if "lora" in name} == {name for name in wanted if "lora" in name}


@pytest.mark.parametrize("training", [True, False])
@cases(QUANTISED, ["three"])
def test_equal_to_each_adapter_alone_on_a_quantised_base(kind, layer, adapters, training):
    subject = kind.make(layer, adapters)
    subject.model.train(training)
    x = subject.x(120)
    with lora_ext.use_adapters(subject.model, names_of(x)):
        assert subject.paths() == {"fused"} or not training
    found, wanted = run(subject, names_of(x), x), run_alone(subject, names_of(x), x)
    if layer == "int8" and not training:
        assert found.keys() == wanted.keys()  # x is rounded by its largest number, of all rows
    else:
        assert_equal_steps(found, wanted, 1e-4)


@cases((*BY_TOKEN, *MIXTURES), ["three", "lora_bias of one"])
def test_equal_to_a_loop_by_token(kind, layer, adapters):
    subject = kind.make(layer, adapters, F64)
    x, index = tokens_of(subject, F64)
    found = run(subject, ["a", "b", "c"], x, index)
    wanted = run_alone(subject.holding(subject.in_float64()), ["a", "b", "c"], x, index)
    assert_equal_steps(found, wanted, 1e-11)


@cases(EVERYTHING, ["three", "lora_bias of one"])
def test_equal_to_each_adapter_trained_without_the_others(device, kind, layer, adapters):
    """In float32 and by our own layers, on the same rows."""
    subject = kind.make(layer, adapters)
    subject.model.to(device)
    x = subject.x(120).to(device)
    assert_equal_steps(run(subject, names_of(x), x), run_alone(subject, names_of(x), x), 2e-5)


@pytest.mark.parametrize(
    "mode", [(BF16, F32), (BF16, BF16), (F16, F32)], ids=lambda mode: "-".join(map(short, mode))
)
@cases(["linear without bias", *LAYERS, *CALLED], ["three", "lora_bias of one"])
def test_errors_no_larger_than_those_of_a_loop(kind, layer, adapters, mode):
    """y, dx and each gradient against float64: at most twice a loop of torch's, plus a floor."""
    subject = kind.make(layer, adapters, *mode)
    x = subject.x(400, mode[0])
    names = names_of(x)
    theirs = run_alone(subject.holding(subject.in_peft_order()), names, x)
    exact = run_alone(
        subject.holding(subject.in_float64()), names, as_float64(x), rounded_to=mode[0]
    )
    assert_errors_at_most_twice(run(subject, names, x), theirs, exact, 1e-5)


@cases(["linear", "conv1d", "conv2d", "subclass"], ["three"])
def test_adapters_of_different_dtypes(kind, layer, adapters):
    """Each is computed as it would be alone."""
    subject = kind.make(layer, adapters, BF16)
    for parameter in subject.factors("b"):
        parameter.data = parameter.data.to(BF16)
    x = subject.x(120, BF16)
    found, wanted = run(subject, names_of(x), x), run_alone(subject, names_of(x), x)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        limit = 2**-7 * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=limit, msg=name)


@cases(["linear", "conv2d", "subclass"], ["three"])
def test_under_autocast(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x(120)
    names = names_of(x)

    def autocast(call, *args):
        with torch.autocast("cpu", BF16):
            return call(*args)

    found = autocast(run, subject, names, x)
    theirs = autocast(run_alone, subject.holding(subject.in_peft_order()), names, x)
    exact = run_alone(subject.holding(subject.in_float64()), names, as_float64(x), rounded_to=BF16)
    assert_errors_at_most_twice(found, theirs, exact, 1e-5)


@cases(["embedding"], ["three"])
def test_an_embedding_under_autocast_is_as_without(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x(120)
    with torch.autocast("cpu", BF16):
        found = run(subject, names_of(x), x)
    assert_equal_steps(found, run(subject, names_of(x), x), 0.0)


@pytest.mark.parametrize("ps", [(0.0, 0.9, 0.5), (0.4, 0.4, 0.4)], ids=["other", "same"])
@cases(["linear", "conv2d", "merged_linear", *CALLED], ["three"])
def test_each_adapter_has_its_own_dropout(kind, layer, adapters, ps):
    """A row's update is zero with its own adapter's probability; base rows have none."""
    dropout = dict(zip("abc", ps, strict=True))
    subject = kind.make(layer, adapters, dropout=dropout)
    x = subject.x(600)
    named = {name: [name] * len(x) for name in dropout}
    for name, p in dropout.items():
        first, second = (run(subject, named[name], x)["y"] for _ in range(2))
        assert torch.equal(first, second) == (p == 0.0)
        mean = torch.stack([run(subject, named[name], x)["y"] for _ in range(40)]).mean(0)
        subject.model.eval()
        wanted = run(subject, named[name], x)["y"]
        subject.model.train()
        spread = (first - wanted).std().item() + 1e-6
        assert (mean - wanted).abs().mean() <= spread / 4
    mixed = names_of(x)
    subject.model.train()
    found = run(subject, mixed, x)["y"]
    plain = run_alone(subject, mixed, x)["y"]
    for name, same in ((None, True), *((n, p == 0.0) for n, p in dropout.items())):
        own = [i for i, one in enumerate(mixed) if one == name]
        assert torch.allclose(found[own], plain[own], rtol=0, atol=1e-5) == same, name


@cases(EVERYTHING, ["three", "lora_bias of one"])
def test_nan_of_an_adapter_reaches_its_own_rows_alone(kind, layer, adapters):
    """Nor the gradients of the others."""
    subject = kind.make(layer, adapters)
    x = subject.x(120)
    names = names_of(x)
    clean = run(subject, names, x)
    for broken in ("a", "b"):
        before = [factor.detach().clone() for factor in subject.factors(broken)]
        for factor in subject.factors(broken):
            factor.data.fill_(math.nan)
        found = run(subject, names, x)
        mine = torch.tensor([name == broken for name in names])
        assert found["y"][mine].isnan().flatten(1).all(1).all()
        for name in {"y", "dx"} & set(clean):
            assert torch.equal(found[name][~mine], clean[name][~mine]), name
        for other in {"a", "b", "c"} - {broken}:
            for key in keys_of(subject, other):
                assert torch.equal(found[key], clean[key]), key
        for factor, value in zip(subject.factors(broken), before, strict=True):
            factor.data.copy_(value)


@cases(EVERYTHING[1:], ["three"])
def test_rows_without_an_adapter_have_the_base_alone(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x(120)
    with torch.no_grad():
        with subject.disabled():
            base = subject(x)
        with lora_ext.use_adapters(subject.model, names_of(x)):
            y = subject(x)
        with lora_ext.use_adapters(subject.model, [None] * len(x)):
            torch.testing.assert_close(subject(x), base)
    none = [i for i, name in enumerate(names_of(x)) if name is None]
    torch.testing.assert_close(y[none], base[none])


@cases(["net"], ["three"])
def test_layers_that_lack_an_adapter(kind, layer, adapters):
    """Its rows have their base there."""
    subject = kind.make(layer, adapters, F64)
    layers = subject.layers
    for module in layers[::2]:
        module.delete_adapter("b")
    x = subject.x()
    found = run(subject, names_of(x), x)
    wanted = run_alone(subject.holding(subject.in_float64()), names_of(x), x)
    assert_equal_steps(found, wanted, 1e-11)


@cases(["net", *LAYERS, *CALLED], ["three"])
def test_adapters_without_rows_have_zeros_where_named_and_none_elsewhere(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x()
    found = run(subject, ["a", "b"], x, torch.zeros(len(x), dtype=torch.int32))
    assert all(found[key].any() for key in keys_of(subject, "a"))
    assert not any(found[key].any() for key in keys_of(subject, "b") if key in found)
    assert not any(key in found for key in keys_of(subject, "c"))


def test_dropout_of_different_adapters_is_drawn_once_for_a_seed():
    """The same seed of torch's generator draws the same masks."""
    from contract.ours import OURS

    subject = OURS.make("linear", "three", dropout=DIFFERENT)
    x = subject.x()
    steps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        steps.append(run(subject, names_of(x), x))
    assert all(torch.equal(steps[0][key], steps[1][key]) for key in steps[0])
    assert not torch.equal(steps[0]["y"], steps[2]["y"])
