"""`use_adapters` around a forward that backward repeats: a checkpoint, or what nobody knows."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import F64
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_ext
from contract.cases import every_kind
from contract.row_helpers import assert_equal_steps, batch, found_of, gradient_of

NAMES = ["a", None, "c", "b", "a", "c"]

each_checkpoint = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
each_within = pytest.mark.parametrize(
    "within", [None, NAMES, ["c"] * 6], ids=["after", "inside", "in another"]
)


def block(subject, names):
    return lora_ext.use_adapters(subject.model, names) if names else nullcontext()


def step(subject, x, calls, within=None):
    """Forwards, each in a block of its own or in none, and backward in another or in none."""
    subject.model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = 0
    for names, forward in calls:
        with block(subject, names):
            y = y + forward(x)
    with block(subject, within):
        y.backward(gradient_of(y))
    return found_of(subject, y, x.grad)


@each_checkpoint
def test_an_adapter_that_is_deleted_before_a_checkpoint_repeats_it(subject, reentrant):
    with lora_ext.use_adapters(subject.model, NAMES):
        y = checkpoint(subject, batch(subject).requires_grad_(), use_reentrant=reentrant)
    subject.layers[0].delete_adapter("b")
    with pytest.raises(RuntimeError, match="'b' was removed since"):
        y.sum().backward()


def repeated(subject):
    """Another checkpointing: an autograd function that runs a layer in both directions."""

    class Repeated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return subject(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                subject(x).backward(grad)
            return x.grad

    return Repeated


@each_within
def test_another_checkpoint_needs_the_block_in_what_it_repeats(subject, within):
    x = batch(subject)

    def opened(x):
        with lora_ext.use_adapters(subject.model, NAMES):
            return subject(x)

    found, exact = (
        step(subject, x, [(None, forward)], within) for forward in (repeated(opened).apply, opened)
    )
    assert_equal_steps(found, exact, 1e-10)
    for names in (NAMES, None):
        with pytest.raises(RuntimeError, match="to know the adapters of a forward"):
            step(subject, x, [(names, repeated(subject).apply)], within)


ABC = ["a", "b", "c"]
some_names = st.lists(st.sampled_from([*ABC, None]), min_size=3, max_size=3)
# A forward of two layers, or what is around such: a checkpoint, no gradients, or a block on one of
# the layers or on both, which may be entered where no gradients are recorded.
programs = st.recursive(
    st.just("forward"),
    lambda inner: st.tuples(
        st.sampled_from(["hooks", "reentrant", "no_grad"])
        | st.tuples(st.sampled_from([(0,), (1,), (0, 1)]), some_names, st.booleans()),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)
BOTH, FIRST = ((0, 1), ["a", None, "c"], True), ((0,), ["b", "b", "a"], True)


def walk(program, pair, x, row=None, active=()):
    """y; of one row with adapters that are active in the place of blocks, and no checkpoints."""
    if program == "forward":
        for subject, names in zip(pair, active, strict=False):
            subject.set_adapter(names)
        return torch.tanh(pair[0](x)) + pair[1](x)
    around, inner = program

    def part(x):
        return torch.sin(sum(walk(each, pair, x, row, active) for each in inner))

    if around == "no_grad":
        with torch.no_grad():
            y = part(x)
        return y * walk("forward", pair, x, row, active)  # a checkpoint wants a gradient
    if isinstance(around, str):
        reentrant = around == "reentrant"
        return part(x) if row is not None else checkpoint(part, x, use_reentrant=reentrant)
    layers, names, records = around
    if row is not None:
        own = [names[row]] if names[row] else []
        active = [own if i in layers else before for i, before in enumerate(active)]
        return part(x)
    models, inside = nn.ModuleList([pair[i].model for i in layers]), torch.is_grad_enabled()
    with (
        torch.set_grad_enabled(records),
        lora_ext.use_adapters(models, names),
        torch.set_grad_enabled(inside),
    ):
        return part(x)


@settings(max_examples=30, deadline=None)
@given(programs, st.none() | some_names)
@example((BOTH, [("hooks", [(FIRST, ["forward"])])]), None)
@example((BOTH, [("reentrant", [(FIRST, ["forward"]), "forward"])]), ["c", "c", "b"])
@example(((*BOTH[:2], False), [("hooks", [("reentrant", [(FIRST, ["forward"])])])]), ["a"] * 3)
@every_kind
def test_blocks_on_some_layers_and_checkpoints_in_any_order(kind, program, within):
    """Each row as alone."""
    pair = [kind.make("linear", "three", F64) for _ in range(2)]
    both = SimpleNamespace(model=nn.ModuleList([subject.model for subject in pair]))
    x = batch(pair[0], 3).requires_grad_()
    y = walk(program, pair, x)
    grad = gradient_of(y)
    with block(both, within):
        y.backward(grad)
    found = found_of(both, y, x.grad)
    both.model.zero_grad()
    x.grad, rows = None, []
    for row in range(3):
        rows.append(walk(program, pair, x[row : row + 1], row, (ABC, ABC)))
        for subject in pair:
            subject.set_adapter(ABC)
        rows[row].backward(grad[row : row + 1])
    assert_equal_steps(found, found_of(both, torch.cat(rows), x.grad), 1e-10)


def test_hooks_of_others_within_a_checkpoint(subject):
    """As torch.autograd.graph.save_on_cpu, within what the checkpoint repeats and around it."""

    def saved(forward):
        def call(x):
            with torch.autograd.graph.save_on_cpu():
                y = forward(x)
            return torch.tanh(y)

        return call

    def kept(forward):
        return lambda x: checkpoint(forward, x, use_reentrant=False)

    for through in (kept(saved(subject)), saved(kept(subject))):
        found, exact = (
            step(subject, batch(subject), [(NAMES, forward)], ["c"] * 6)
            for forward in (through, lambda x: torch.tanh(subject(x)))
        )
        assert_equal_steps(found, exact, 1e-10)


def test_what_is_saved_is_read_outside_of_a_backward(subject):
    """The node of a checkpoint gives its tensors to whoever asks, by running its part again."""
    x = batch(subject).requires_grad_()
    for names in (NAMES, ["c"] * 6):
        with lora_ext.use_adapters(subject.model, names):
            y = checkpoint(lambda x: torch.tanh(subject(x)), x, use_reentrant=False)
        with lora_ext.use_adapters(subject.model, ["b"] * 6):
            assert torch.equal(y.grad_fn._saved_result, y)


@each_within
def test_what_repeats_a_forward_of_which_nothing_is_known_is_refused(subject, within):
    """Hooks, or a function that sees its context after its forward."""
    x = batch(subject).requires_grad_()

    def unpack(tensor):
        subject(x.detach())
        return tensor

    class Later(torch.autograd.Function):
        forward = staticmethod(subject)
        setup_context = staticmethod(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
        backward = repeated(subject).backward

    with lora_ext.use_adapters(subject.model, NAMES):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            first = subject(x)
        second = Later.apply(x)
    for y in (first, second):
        with (
            block(subject, within),
            pytest.raises(RuntimeError, match="to know the adapters of a forward"),
        ):
            y.sum().backward()
