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
def test_another_checkpoint_repeats_with_the_adapters_of_its_forward(subject, within):
    x = batch(subject)
    step(subject, x, [(NAMES, subject)])  # so that the layer had a block before
    for names in (NAMES, None):
        found, exact = (
            step(subject, x, [(names, forward)], within)
            for forward in (repeated(subject).apply, subject)
        )
        assert_equal_steps(found, exact, 1e-10)


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
