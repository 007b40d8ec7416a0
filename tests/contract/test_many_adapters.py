"""`use_adapters` on both kinds of layer: the block, its index, errors.

`test_row_adapters` says what the rows have, `test_many_adapters_repeated` what a forward has that
backward repeats, `test_many_adapters_in_tasks` which tasks and threads are in a block.
"""

import pytest
import torch
from helpers import F32, F64
from torch import nn

import lora_ext
from contract.cases import assert_close, cases, every_kind
from contract.row_helpers import assert_equal_steps, batch, differentiated, run, run_alone
from lora_ext.rows.row_adapters import RowAdapters
from lora_ext.rows.row_index import _KEPT

NAMES = ["a", None, "c", "b", "a", "c"]
ABC = ["a", "b", "c"]


# ---- the equation ----


@cases(["linear", "subclass"], ["three"])
def test_rows_of_two_dimensions(kind, layer, adapters):
    subject = kind.make(layer, adapters, F64)
    x = subject.x(6, F64)
    assert_close(run(subject, NAMES, x)["y"], run_alone(subject, NAMES, x)["y"])
    # Flattened tokens, of a block that has seen their number or has an index for each.
    three = batch(subject)
    with lora_ext.use_adapters(subject.model, NAMES):
        y = subject(three)
        assert torch.equal(subject(three.flatten(0, 1)), y.flatten(0, 1))
    index = torch.tensor([[0, 1, 2, -1, 0]] * 6, dtype=torch.int32)
    with lora_ext.use_adapters(subject.model, ABC, index):
        flat = subject(three.flatten(0, 1))
        assert torch.equal(flat, subject(three).flatten(0, 1))
    # Four rows may be two tokens of two samples, or one of each twice: the last x with 3 dimensions
    # says it.
    index = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    with lora_ext.use_adapters(subject.model, ABC, index, repeats=2):
        for own in (three[:2, :2], three[:4, :1], three[:2, :2]):
            y = subject(own)
            assert_close(subject(own.flatten(0, 1)), y.flatten(0, 1))


@cases(["linear", "embedding", "subclass"], ["three"])
def test_one_call_of_the_op_in_the_place_of_a_loop_peft_804_2283(kind, layer, adapters):
    """A mixed batch was a serial loop over its adapters, slower with each of them."""
    subject = kind.make(layer, adapters)
    x = batch(subject, dtype=F32)
    subject.model.eval()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        lora_ext.use_adapters(subject.model, NAMES),
    ):
        subject(x)
    calls = [event.name for event in profile.events()]
    assert calls.count("lora_ext::lora_grouped") == 1


# ---- the block ----


@every_kind
def test_blocks_nest_and_survive_exceptions(kind):
    subject = kind.make("net", "three", F64)
    x = batch(subject, 2)
    plain = subject(x)
    one, other = run_alone(subject, ["a", "b"], x)["y"], run_alone(subject, ["c", None], x)["y"]
    with lora_ext.use_adapters(subject.model, ["a", "b"]):
        assert_close(subject(x), one)
        with lora_ext.use_adapters(subject.model, ["c", None]):
            assert_close(subject(x), other)
        assert_close(subject(x), one)
        with pytest.raises(KeyError), lora_ext.use_adapters(subject.model, ["c", None]):
            raise KeyError
        assert_close(subject(x), one)
    assert torch.equal(subject(x), plain)
    first = lora_ext.use_adapters(subject.model, ["a", "b"])
    second = lora_ext.use_adapters(subject.model, ["c", None])
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="left before another that was entered later"):
        first.__exit__(None, None, None)
    assert_close(subject(x), other)
    second.__exit__(None, None, None)
    assert torch.equal(subject(x), plain)


@cases(["net", "conv2d", "embedding", "subclass"], ["three"])
def test_disabled_layers_have_the_bases_bits(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = batch(subject, dtype=F32)
    with subject.disabled():
        base = subject(x)
        with lora_ext.use_adapters(subject.model, NAMES):
            assert torch.equal(subject(x), base)


def test_merged_layers_are_refused(subject):
    x = batch(subject)
    subject.merge()
    with (
        lora_ext.use_adapters(subject.model, NAMES),
        pytest.raises((ValueError, RuntimeError), match="merged"),
    ):
        subject(x)


@every_kind
def test_explain_says_what_rows_have(kind):
    subject = kind.make("net", "three", F64)
    with lora_ext.use_adapters(subject.model, NAMES):
        assert all("each row its own adapter, 3" in why for _, why in subject.reasons())
    assert all("each row" not in why for _, why in subject.reasons())


@every_kind
def test_an_index_is_made_once_for_all_layers(kind, monkeypatch):
    """Not one tensor for each layer: one for each shape of x, whatever the number of layers."""
    calls = []
    expanded = RowAdapters._expanded

    def counted(self, index, lead, device):
        calls.append(lead)
        return expanded(self, index, lead, device)

    monkeypatch.setattr(RowAdapters, "_expanded", counted)
    subject = kind.make("net", "three", F64)
    with lora_ext.use_adapters(subject.model, NAMES):
        for _ in range(3):
            subject(batch(subject))
    assert len(subject.layers) > len(set(calls)) == len(calls) > 0


def test_the_index_is_read_when_the_block_is_entered(subject):
    x, index = batch(subject), torch.tensor([0, -1, 2, 1, 0, 2], dtype=torch.int32)
    wanted = run(subject, NAMES, x)["y"]
    with lora_ext.use_adapters(subject.model, ABC, index):
        index.fill_(-1)
        assert_close(subject(x), wanted)
        assert_close(subject(x[:, :1]), wanted[:, :1])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@cases(["linear", "embedding"], ["three"])
def test_an_adapter_that_is_deleted_within_the_block(
    forget_graphs, counter, kind, layer, adapters, compiled
):
    """Not the base in its place, nor who is added by its name."""
    subject = kind.make(layer, adapters, F64)
    x, (part,) = batch(subject), subject.layers
    model = torch.compile(subject.model, backend=counter, fullgraph=True) if compiled else subject
    with lora_ext.use_adapters(subject.model, NAMES):
        model(x)
        with lora_ext.use_adapters(subject.model, ["a", "c"] * 3):
            part.delete_adapter("b")
            model(x)
        with pytest.raises(Exception, match="'b' was removed since"):
            model(x)
    with lora_ext.use_adapters(subject.model, ["a", "c"] * 3):
        model(x)


# ---- errors ----


def test_errors_say_what_to_do(subject):
    model, x = subject.model, batch(subject)
    int32 = torch.int32

    def opened(*arguments):
        with lora_ext.use_adapters(model, *arguments):
            return subject(x)

    for error, words, *arguments in (
        (ValueError, r"expected names out of \['a', 'b', 'c'\].*\['z'\]", ["z"] * 6),
        (TypeError, "sequence of strings", "abcabc"),
        (ValueError, "distinct names", ["a", "a"], torch.zeros(6, dtype=int32)),
        (TypeError, "int32", ABC, torch.zeros(6)),
        (IndexError, "-1 to 2 for 3 names, but got 3", ABC, torch.full((6,), 3, dtype=int32)),
        (IndexError, "but got -2", ABC, torch.full((6,), -2, dtype=int32)),
        (ValueError, r"\[batch\] or \[batch, tokens\]", ABC, torch.zeros((6, 5, 1), dtype=int32)),
        (ValueError, r"expected x of shape \[4, tokens, in\]", ["a"] * 4),
        (ValueError, r"a name for each of the 6.*a, a, b, b.*repeats=2", ["a"] * 3),
        (ValueError, "a row of the index for each of the 6", ABC, torch.zeros((3, 5), dtype=int32)),
        (ValueError, "index for these tokens", ABC, torch.zeros((6, 4), dtype=int32)),
    ):
        with pytest.raises(error, match=words):
            opened(*arguments)
    with (
        pytest.raises(ValueError, match=r"names twice.*are no samples") as flat,
        lora_ext.use_adapters(model, ["a"] * 3),
    ):
        subject(x[:, 0])
    assert "repeats" not in str(flat.value)  # of flattened rows it would be a guess
    with pytest.raises(TypeError, match=r"nn.Module"), lora_ext.use_adapters(3, ["a"]):
        pass
    with pytest.raises(ValueError, match="apply_lora"):
        lora_ext.use_adapters(nn.Linear(2, 2), ["a"]).__enter__()
    assert torch.equal(subject(x), subject(x))


@cases(["linear"], ["three"])
def test_repeats(kind, layer, adapters):
    """generate repeats each sample for beams and returned sequences."""
    subject = kind.make(layer, adapters, F64)
    x = batch(subject)
    wanted = run_alone(subject, ["a", "a", None, None, "c", "c"], x)["y"]
    with lora_ext.use_adapters(subject.model, ["a", None, "c"], repeats=2):
        assert_close(subject(x), wanted)
        assert_close(subject(x[::2]), wanted[::2])
    index = torch.tensor([[0] * 5, [-1, 1, 1, 1, -1], [2] * 5], dtype=torch.int32)
    with lora_ext.use_adapters(subject.model, ABC, index, repeats=2):
        assert_close(subject(x[:, -1:]), wanted[:, -1:])
        assert subject(x).shape == wanted.shape


# ---- what stays ----


def test_inference_leaves_no_trace(subject):
    with torch.no_grad(), lora_ext.use_adapters(subject.model, NAMES):
        subject(batch(subject))
    assert "row_adapters" not in subject.layers[0].__dict__


def test_a_step_after_inference_of_the_same_shape(subject):
    """What a block keeps is not made of inference mode: backward could not save it."""
    x = batch(subject)
    wanted = run(subject, NAMES, x)
    for outer in (torch.inference_mode(), torch.enable_grad()):
        with outer:
            block = lora_ext.use_adapters(subject.model, NAMES)
            block.__enter__()
        with torch.inference_mode():
            subject(x)
        found = differentiated(subject, x, subject)
        block.__exit__(None, None, None)
        assert_equal_steps(found, wanted, 0.0)


def test_a_block_keeps_the_tensors_of_a_few_lengths(subject):
    """Generating without a cache gives a longer x each time."""
    x = torch.randn(2, 50, *batch(subject).shape[2:], dtype=F64)
    with lora_ext.use_adapters(subject.model, ["a", "b"]) as model:
        for length in range(1, 51):
            model(x[:, :length])
        kept = subject.layers[0].row_adapters._made
        assert len(kept) <= _KEPT
        y = model(x[:, :1])
    assert_close(y, run(subject, ["a", "b"], x[:, :1])["y"])


@every_kind
def test_removing_an_adapter_of_another_model(kind):
    """Of the same name."""
    mine, other = kind.make("linear", "three", F64), kind.make("linear", "three", F64)
    x = batch(mine)
    with (
        lora_ext.use_adapters(other.model, NAMES),
        lora_ext.use_adapters(mine.model, NAMES),
    ):
        wanted = mine(x)
        other.layers[0].delete_adapter("a")
        assert torch.equal(mine(x), wanted)


def test_a_replaced_factor_is_seen_within_the_block(subject):
    """PEFT's hot-swap writes `.data` between two calls: nothing of an adapter is kept."""
    x = batch(subject)
    with torch.no_grad(), lora_ext.use_adapters(subject.model, NAMES):
        before = subject(x)
        for parameter in subject.factors("a"):
            parameter.data = parameter.data * -2.0
        changed = subject(x)
    assert_close(changed, run_alone(subject, NAMES, x)["y"])
    assert not torch.allclose(changed[0], before[0]) and torch.equal(changed[2], before[2])
