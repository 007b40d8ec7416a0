"""`use_adapters` on both kinds of layer: each row of a batch has the values of its own adapter, and
each adapter the gradients of its own rows."""

import copy
import pickle
import threading

import pytest
import torch
from helpers import BF16, F16, F32, F64, short
from layer_helpers import assert_same_state, snapshot
from peft_helpers import as_float64
from row_helpers import (
    assert_equal_steps,
    assert_errors_at_most_twice,
    run,
    run_alone,
)

import lora_ext
from contract.adapters import DIFFERENT
from contract.cases import CALLED, LAYERS, LINEAR, cases, every_kind

EVERYTHING = ("net", "linear without bias", *LAYERS, *CALLED)
BY_TOKEN = ("net", "linear without bias", *LINEAR, "embedding", *CALLED)
NAMES = (None, "a", "c", "b", "a", None)


def names_of(x, names=NAMES):
    """A name for each sample, in turn."""
    return [names[i % len(names)] for i in range(len(x))]


def tokens_of(subject, dtype=F32):
    """x of 12 samples of 5 tokens, or of 9 ids, and an adapter for each of those."""
    x = subject.x(12 if subject.name == "net" else 60, dtype)
    if subject.name != "net":
        x = x.unflatten(0, (12, 5))
    generator = torch.Generator().manual_seed(3)
    return x, torch.randint(-1, 3, x.shape[:2], generator=generator, dtype=torch.int32)


def keys_of(subject, name):
    """Names of an adapter's parameters."""
    mine = [id(parameter) for parameter in subject.factors(name)]
    return [key for key, p in subject.model.named_parameters() if id(p) in mine]


# ---- values and gradients ----


@cases(EVERYTHING, ["three", "lora_bias of one"])
def test_equal_to_a_loop_over_the_adapters_in_float64(kind, layer, adapters):
    """Formulas that are none of ours, one adapter after the other."""
    subject = kind.make(layer, adapters, F64)
    x = subject.x(dtype=F64)
    found = run(subject, names_of(x), x)
    wanted = run_alone(subject.holding(subject.in_float64()), names_of(x), x)
    assert_equal_steps(found, wanted, 1e-11)
    assert {name for name in found if "lora" in name} == {name for name in wanted if "lora" in name}


@cases(BY_TOKEN, ["three", "lora_bias of one"])
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
    assert_equal_steps(run(subject, names_of(x), x), run_alone(subject, names_of(x), x), 2e-6)


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


@cases(["linear", "conv2d", "merged_linear", *CALLED], ["three"])
def test_each_adapter_has_its_own_dropout(kind, layer, adapters):
    """A row's update is zero with its own adapter's probability; base rows have none."""
    dropout = {"a": 0.0, "b": 0.9, "c": 0.5}
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
    for name, same in ((None, True), ("a", True), ("b", False), ("c", False)):
        own = [i for i, one in enumerate(mixed) if one == name]
        assert torch.allclose(found[own], plain[own], rtol=0, atol=1e-5) == same, name


@cases(EVERYTHING[1:], ["three"])
def test_rows_without_an_adapter_have_the_bases_bits(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x(120)
    with torch.no_grad():
        with subject.disabled():
            base = subject(x)
        with lora_ext.use_adapters(subject.model, names_of(x)):
            y = subject(x)
        with lora_ext.use_adapters(subject.model, [None] * len(x)):
            assert torch.equal(subject(x), base)
    none = [i for i, name in enumerate(names_of(x)) if name is None]
    assert torch.equal(y[none], base[none])


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


# ---- which model, and for how long ----


@cases(["net"], ["three"])
def test_the_adapters_that_are_active_do_not_matter(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x()
    found = []
    for names in (["a", "b", "c"], ["b"], ["c", "a"]):
        subject.set_adapter(names)
        with lora_ext.use_adapters(subject.model, names_of(x)):
            found.append(subject(x))
        assert subject.active() == {tuple(names)}
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@cases(["net", "linear", "subclass"], ["three"])
def test_nested_blocks_and_errors_restore(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    model, x = subject.model, subject.x()
    outside = subject(x)
    with lora_ext.use_adapters(model, ["a"] * len(x)) as yielded:
        assert yielded is model
        outer = subject(x)
        with lora_ext.use_adapters(model, ["b"] * len(x)):
            inner = subject(x)
        assert torch.equal(subject(x), outer)
        with pytest.raises(KeyError, match="mine"), lora_ext.use_adapters(model, ["c"] * len(x)):
            raise KeyError("mine")
        assert torch.equal(subject(x), outer)
    assert torch.equal(subject(x), outside)
    assert not torch.equal(inner, outer) and not torch.equal(outer, outside)


@cases(["net", "linear", "subclass"], ["three"])
def test_disabled_adapters_are_disabled_within_a_block_too(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x()
    with subject.disabled():
        base = subject(x)
        with lora_ext.use_adapters(subject.model, names_of(x)):
            assert torch.equal(subject(x), base)
    with lora_ext.use_adapters(subject.model, names_of(x)):
        assert not torch.equal(subject(x), base)
        with subject.disabled():
            assert torch.equal(subject(x), base)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@cases(["net", "linear", "conv1d"], ["three"])
def test_state_and_copies_in_a_block_and_after_it(kind, layer, adapters, duplicate):
    """The state dict knows of no block; a copy made within one has it, as the layer itself."""
    subject = kind.make(layer, adapters)
    model, x = subject.model, subject.x()
    before, outside = snapshot(model), subject(x)
    with lora_ext.use_adapters(model, names_of(x)):
        assert_same_state(model, before)
        inside = subject(x)
        within = duplicate(model)
    after = duplicate(model)
    assert_same_state(model, before)
    assert torch.equal(after(x), outside) and torch.equal(within(x), inside)
    for other in (within, after):
        assert_same_state(other, before)
        with lora_ext.use_adapters(other, names_of(x)):
            assert torch.equal(other(x), inside)


@cases(["linear", "net"], ["three"])
def test_threads_with_models_of_their_own(kind, layer, adapters):
    """What is made once for a batch is not shared beyond its block."""
    subjects = [kind.make(layer, adapters) for _ in range(4)]
    x = subjects[0].x()
    choices = [names_of(x, turn) for turn in (("a",), ("b", None), ("c", "a"), (None, "b", "c"))]
    wanted = [run(subject, names, x)["y"] for subject, names in zip(subjects, choices, strict=True)]
    wrong = []

    def work(subject, names, y):
        wrong.extend(1 for _ in range(20) if not torch.equal(run(subject, names, x)["y"], y))

    threads = [
        threading.Thread(target=work, args=work_of)
        for work_of in zip(subjects, choices, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@cases(["linear", "subclass"], ["three"])
def test_another_batch_size_within_a_block(kind, layer, adapters):
    """An x may hold each sample several times in a row, as in beam search; else it is refused."""
    subject = kind.make(layer, adapters)
    x = subject.x(6)
    with lora_ext.use_adapters(subject.model, names_of(x)):
        y = subject(x)
        torch.testing.assert_close(
            subject(x.repeat_interleave(3, 0)), y.repeat_interleave(3, 0), rtol=1e-6, atol=1e-6
        )
        by_sample = x[:, None].expand(-1, 4, -1)
        torch.testing.assert_close(
            subject(by_sample), y[:, None].expand(-1, 4, -1), rtol=1e-6, atol=1e-6
        )
        with pytest.raises(RuntimeError, match=r"samples come first, for an index of shape \[6\]"):
            subject(x[:4])
        with pytest.raises(RuntimeError, match=r"got one of shape \[4, 3, 'in_features'\]"):
            subject(x[:4, None].expand(-1, 3, -1))


# ---- what is refused ----


def refuse(subject, error, match, names, index=None):
    before = [dict(layer.__dict__) for layer in subject.layers]
    with pytest.raises(error, match=match), lora_ext.use_adapters(subject.model, names, index):
        raise AssertionError("the block was entered")
    assert [dict(layer.__dict__) for layer in subject.layers] == before


@every_kind
def test_refusals(kind):
    subject = kind.make("net", "three")
    index = torch.zeros(6, dtype=torch.int32)
    refuse(subject, TypeError, "a name or None for each sample, but got 'a'", "a")
    refuse(subject, TypeError, "names or None, but got 3", ["a", 3])
    refuse(subject, ValueError, "for each sample, but got none", [])
    refuse(subject, ValueError, r"out of \['a', 'b', 'c'\], but got \['d'\]", ["a", "d"])
    refuse(subject, TypeError, "dtype int32, but got torch.int64", ["a"], index.long())
    refuse(subject, TypeError, "dtype int32, but got list", ["a"], [0, 0])
    refuse(subject, ValueError, r"\[batch\] or .*, but got \[\]", ["a"], index[0])
    refuse(subject, ValueError, r"but got \[6, 0\]", ["a"], index[:, None][:, :0])
    refuse(subject, ValueError, r"but got \[1, 2, 3\]", ["a"], index.view(1, 2, 3))
    refuse(subject, ValueError, "different names beside an index", ["a", "a"], index)
    refuse(subject, ValueError, "different names beside an index", ["a", None], index)
    refuse(subject, ValueError, "different names beside an index", ["__base__"], index)
    refuse(
        subject,
        IndexError,
        "from -1 to 0, but got 0 to 1",
        ["a"],
        index + (torch.arange(6) % 2).int(),
    )
    refuse(subject, IndexError, "from -1 to 0, but got -2 to -2", ["a"], index - 2)


@every_kind
def test_refuses_models_without_adapters(kind):
    with pytest.raises(ValueError, match="a model with adapters, but Linear has none"):
        lora_ext.use_adapters(torch.nn.Linear(2, 3), ["a"]).__enter__()
    with pytest.raises(TypeError, match=r"expected a model .*, but got str"):
        lora_ext.use_adapters("model", ["a"]).__enter__()


@cases(["linear", "conv1d", "subclass"], ["three"])
def test_merged_adapters_are_refused_by_name(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    subject.model.eval()
    x = subject.x()
    names = names_of(x)
    subject.merge()
    refuse(subject, ValueError, r"not merged, but \['a', 'b', 'c'\] are at", names)
    subject.unmerge()
    with lora_ext.use_adapters(subject.model, names):
        subject(x)
        subject.merge()
        with pytest.raises(RuntimeError, match=r"not merged, but \['a', 'b', 'c'\] are"):
            subject(x)
        subject.unmerge()
        subject(x)


@cases(["linear", "net"], ["three"])
def test_a_wrong_number_of_names_is_an_error_of_the_forward(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = subject.x(8)
    with (
        lora_ext.use_adapters(subject.model, ["a", "b", "c"]),
        pytest.raises(RuntimeError, match=r"index of shape \[3\]"),
    ):
        subject(x)


# ---- bugs of others ----


@cases(["linear", "conv1d", "subclass"], ["three"])
def test_peft_804_2283_one_call_for_all_adapters(kind, layer, adapters):
    """Mixed batches ran a loop over the adapters, whose time grew with their number."""
    subject = kind.make(layer, adapters)
    x = subject.x(60)
    with (
        lora_ext.use_adapters(subject.model, names_of(x)),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        subject(x)
    calls = [event.name for event in profile.events()]
    name = "lora_update_grouped" if layer == "subclass" else "lora_linear_grouped"
    assert calls.count(f"lora_ext::{name}") == 1
    assert "aten::nonzero" not in calls and "aten::index_select" not in calls


@cases(["net", "linear"], ["three"])
def test_megatron_bridge_5768_an_idle_adapter_stays_as_it_is(kind, layer, adapters):
    """An optimizer with momentum moved adapters that had no rows in the batch.

    Their gradients are zeros; so step the optimizers of those that had rows.
    """
    subject = kind.make(layer, adapters)
    x = subject.x()
    optimizers = {
        name: torch.optim.AdamW(subject.factors(name), lr=0.1, weight_decay=0.1) for name in "abc"
    }

    def train(names):
        with lora_ext.use_adapters(subject.model, ["a", "b", "c"], index_of(names)):
            subject(x).square().mean().backward()
        for name in set(names):
            optimizers[name].step()
        for optimizer in optimizers.values():
            optimizer.zero_grad()

    def index_of(names):
        return torch.tensor(["abc".index(names[i % len(names)]) for i in range(len(x))]).int()

    train("abc")
    idle = [parameter.detach().clone() for parameter in subject.factors("b")]
    for _ in range(3):
        train("ac")
    for parameter, value in zip(subject.factors("b"), idle, strict=True):
        assert torch.equal(parameter, value)


@cases(["net", "linear", "conv1d"], ["three"])
def test_adding_or_ending_a_training_does_not_touch_the_others(kind, layer, adapters):
    """The bits of an adapter's gradients do not depend on who else is in the batch."""
    subject = kind.make(layer, adapters)
    x = subject.x(60)
    mine = keys_of(subject, "a")
    steps = [run(subject, names_of(x, names), x) for names in (("a", "b"), ("a", "c"), ("a", None))]
    for step in steps[1:]:
        for key in mine:
            torch.testing.assert_close(step[key], steps[0][key], rtol=1e-6, atol=1e-6)


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
