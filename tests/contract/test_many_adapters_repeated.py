"""`use_adapters` around a forward that backward repeats: a checkpoint, or what nobody knows."""

from contextlib import nullcontext

import pytest
import torch
from helpers import F64
from row_helpers import assert_equal_steps, batch, found_of, gradient_of
from torch.utils.checkpoint import checkpoint

import lora_ext
from contract.cases import every_kind

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


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("within", [None, ["c"] * 6], ids=["after", "in another"])
@each_checkpoint
@every_kind
def test_a_checkpoint_repeats_with_the_adapters_of_its_forward(kind, reentrant, within, dropout):
    subject = kind.make("linear", "three", F64, dropout=dropout)

    def part(x):
        return torch.tanh(subject(x))

    def kept(x):
        return checkpoint(part, x, use_reentrant=reentrant)

    def nested(x):
        return checkpoint(lambda x: torch.sin(kept(x)), x, use_reentrant=reentrant)

    for through, plain in ((kept, part), (nested, lambda x: torch.sin(part(x)))):
        for calls in ([NAMES], [NAMES, NAMES[::-1]], [NAMES, None], [None, NAMES], [None]):
            found, exact = (
                step(subject, batch(subject), [(names, forward) for names in calls], within)
                for forward in (through, plain)
            )
            assert_equal_steps(found, exact, 1e-10)


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


@pytest.mark.parametrize("records", [False, True], ids=["entered under no_grad", ""])
@pytest.mark.parametrize("within", [None, ["c"] * 6], ids=["after", "in another"])
@each_checkpoint
@every_kind
def test_blocks_in_what_a_checkpoint_repeats(kind, reentrant, within, records):
    """One, two of the same names and two of others, and one around them that was entered where no
    gradients were recorded."""
    subject = kind.make("linear", "three", F64)

    def opened(x, every):
        y = subject(x)
        for names in every:
            with lora_ext.use_adapters(subject.model, names):
                y = torch.tanh(y) + subject(x)
        return y

    def outside(x, forward):
        with torch.set_grad_enabled(records):
            block = lora_ext.use_adapters(subject.model, ["b"] * 6)
            block.__enter__()
        try:
            return forward(x)
        finally:
            block.__exit__(None, None, None)

    for every in ([NAMES], [NAMES, NAMES], [NAMES, NAMES[::-1]], []):

        def part(x, every=every):
            return opened(x, every)

        def kept(x, part=part):
            return checkpoint(part, x, use_reentrant=reentrant)

        found, exact = (
            step(subject, batch(subject), [(None, lambda x, f=f: outside(x, f))], within)
            for f in (kept, part)
        )
        assert_equal_steps(found, exact, 1e-10)


@pytest.mark.parametrize("within", [None, NAMES[::-1]], ids=["after", "in another"])
@each_checkpoint
@every_kind
def test_a_checkpoint_around_a_compiled_layer(forget_graphs, counter, kind, reentrant, within):
    subject = kind.make("linear", "three", F64)
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)

    def kept(x):
        return checkpoint(lambda x: torch.tanh(compiled(x)), x, use_reentrant=reentrant)

    for calls in ([NAMES, ["c"] * 6], [None, NAMES]):
        found, exact = (
            step(subject, batch(subject), [(names, forward) for names in calls], within)
            for forward in (kept, lambda x: torch.tanh(subject(x)))
        )
        assert_equal_steps(found, exact, 1e-10)


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
