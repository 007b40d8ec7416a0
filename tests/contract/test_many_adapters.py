"""`use_adapters` on both kinds of layer: each row as with its adapter alone, forward and backward.

The reference is a loop: one adapter after the other is made the only active one, and has the whole
batch with dy zero in the rows of the others.
"""

import asyncio
import contextlib
import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import F32, F64
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_ext
from contract.cases import assert_close, cases, every_kind
from lora_ext.nn.row_adapters import RowAdapters

NAMES = ["a", None, "c", "b", "a", "c"]
ABC = ["a", "b", "c"]


def batch(subject, count=6, dtype=F64):
    """x of `count` samples: ``[count, 5, in]``, pixels, or ids ``[count, tokens]``."""
    if subject.name == "net":
        return subject.x(count)
    if subject.name == "conv2d":
        return subject.x(15 * count, dtype)
    x = subject.x(5 * count, dtype)
    return x.view(count, 5, *x.shape[1:])


def loop(subject, x, names, dy=None):
    """y, dx and the gradients by id, an adapter at a time; all are active in the end."""
    every = list({n: None for layer in subject.layers for n in names_of(layer)})
    leaf = x.clone().requires_grad_(x.is_floating_point())
    total, grads = None, {}
    for name in dict.fromkeys(names):
        subject.set_adapter([] if name is None else [name]) if name is not None else None
        for parameter in subject.trained():
            parameter.grad = None
        with subject.disabled() if name is None else torch.enable_grad():
            y = subject(leaf)
        mine = torch.tensor([n == name for n in names]).view(-1, *(1 for _ in y.shape[1:]))
        part = torch.where(mine, y, 0.0)
        total = part.detach() if total is None else total + part.detach()
        if dy is not None and part.requires_grad:
            part.backward(dy)
            grads |= {id(p): p.grad for p in subject.trained() if p.grad is not None}
    subject.set_adapter(every)
    return total, leaf.grad, grads


def names_of(layer):
    if isinstance(layer, lora_ext.nn.LoRALayer):
        return list(layer.adapters)
    return [*layer.lora_A.keys(), *layer.lora_embedding_A.keys()]


def mixed(subject, x, names, dy=None, index=None):
    leaf = x.clone().requires_grad_(x.is_floating_point())
    for parameter in subject.trained():
        parameter.grad = None
    with lora_ext.use_adapters(subject.model, names, index):
        y = subject(leaf)
    if dy is not None:
        y.backward(dy)
    grads = {id(p): p.grad for p in subject.trained()}
    return y.detach(), leaf.grad, grads


def randn(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3), dtype=like.dtype)


def assert_same_steps(found, wanted, every, **words):
    assert_close(found[0], wanted[0], **words)
    if wanted[1] is not None:
        assert_close(found[1], wanted[1], **words)
    for parameter in every:
        value = found[2].get(id(parameter))
        target = wanted[2].get(id(parameter))
        if target is None:
            assert value is None or not value.any()
        else:
            assert_close(value, target, **words)


# ---- the equation ----


@cases(["linear", "subclass"], ["three"])
def test_rows_of_two_dimensions(kind, layer, adapters):
    subject = kind.make(layer, adapters, F64)
    x = subject.x(6, F64)
    assert_close(mixed(subject, x, NAMES)[0], loop(subject, x, NAMES)[0])
    # Flattened tokens, of a block that has seen their number or has an index for each.
    three = batch(subject)
    with lora_ext.use_adapters(subject.model, NAMES):
        y = subject(three)
        assert torch.equal(subject(three.flatten(0, 1)), y.flatten(0, 1))
    index = torch.tensor([[0, 1, 2, -1, 0]] * 6, dtype=torch.int32)
    with lora_ext.use_adapters(subject.model, ABC, index):
        flat = subject(three.flatten(0, 1))
        assert torch.equal(flat, subject(three).flatten(0, 1))


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
    ops = ("lora_ext::lora_linear_grouped", "lora_ext::lora_update_grouped")
    assert sum(calls.count(op) for op in ops) == 1


# ---- the block ----


@every_kind
def test_blocks_nest_and_survive_exceptions(kind):
    subject = kind.make("net", "three", F64)
    x = batch(subject, 2)
    plain = subject(x)
    one, other = loop(subject, x, ["a", "b"])[0], loop(subject, x, ["c", None])[0]
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


async def in_tasks(subject, call, every):
    """What a forward gives in tasks whose blocks overlap, None for a task without one; the first
    ones leave first."""

    async def serve(names, steps):
        found = []
        with lora_ext.use_adapters(subject.model, names) if names else torch.no_grad():
            for _ in range(steps):
                await asyncio.sleep(0)
                found.append(call().detach())
        return found

    return await asyncio.gather(*(serve(n, steps) for steps, n in enumerate(every, 2)))


@cases(["net", "linear", "conv2d", "embedding"], ["three"])
def test_tasks_of_asyncio_have_their_own_adapters(kind, layer, adapters):
    subject = kind.make(layer, adapters, F64)
    x = batch(subject)
    every = [NAMES, ["b"] * 6, None, NAMES[::-1]]
    for names, found in zip(
        every, asyncio.run(in_tasks(subject, lambda: subject(x), every)), strict=True
    ):
        wanted = mixed(subject, x, names)[0] if names else subject(x)
        assert all(torch.equal(y, wanted) for y in found)


@every_kind
def test_a_task_has_the_block_in_which_it_was_made(kind):
    subject = kind.make("linear", "three", F64)
    x = batch(subject)

    async def parent():
        with lora_ext.use_adapters(subject.model, NAMES):
            return await asyncio.create_task(child()), subject(x)

    async def child():
        with lora_ext.use_adapters(subject.model, ["b"] * 6):
            await asyncio.sleep(0)
        return subject(x)

    assert all(torch.equal(y, mixed(subject, x, NAMES)[0]) for y in asyncio.run(parent()))


@every_kind
def test_tasks_of_a_compiled_model(forget_graphs, counter, kind):
    """A graph cannot ask whose the adapters are: tasks that overlap leave it, or it says so."""
    subject = kind.make("linear", "three", F64)
    x, every = batch(subject), [NAMES, ["b"] * 6]
    compiled = torch.compile(subject.model, backend=counter)
    for names, found in zip(
        every, asyncio.run(in_tasks(subject, lambda: compiled(x), every)), strict=True
    ):
        assert all(torch.equal(y, mixed(subject, x, names)[0]) for y in found)
    torch._dynamo.reset()
    whole = torch.compile(subject.model, backend=counter, fullgraph=True)
    with pytest.raises(Exception, match="use_adapters overlap, each of another task"):
        asyncio.run(in_tasks(subject, lambda: whole(x), every))


@every_kind
def test_generators_that_take_turns_are_refused(kind):
    """Two streams of one thread: whose adapters a forward has would be who came last."""
    subject = kind.make("linear", "three", F64)
    x = batch(subject)

    @contextlib.contextmanager
    def opened(names):
        with lora_ext.use_adapters(subject.model, names):
            yield

    def stream(names):
        with opened(names):
            while True:
                yield subject(x)

    first, second = stream(NAMES), stream(["b"] * 6)
    assert torch.equal(next(first), mixed(subject, x, NAMES)[0])
    assert torch.equal(next(second), mixed(subject, x, ["b"] * 6)[0])
    with pytest.raises(RuntimeError, match="a generator that is suspended has one open"):
        next(first)
    second.close()
    with opened(NAMES), opened(["b"] * 6):
        assert torch.equal(subject(x), mixed(subject, x, ["b"] * 6)[0])


@every_kind
def test_copies_and_pickles_are_in_no_block(kind):
    subject = kind.make("net", "three", F64)
    x = batch(subject, 2)
    plain = subject(x)
    with lora_ext.use_adapters(subject.model, ["a", "b"]):
        copied = copy.deepcopy(subject.model)
        pickled = pickle.loads(pickle.dumps(subject.model))
    assert torch.equal(copied(x), plain)
    assert torch.equal(pickled(x), plain)


@every_kind
def test_another_thread_is_refused(kind):
    subject = kind.make("linear", "three", F64)
    x = batch(subject, 2)
    errors = []

    def other():
        for call in (
            lambda: lora_ext.use_adapters(subject.model, ["a", "b"]).__enter__(),
            lambda: subject(x),
        ):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))

    with lora_ext.use_adapters(subject.model, ["a", "b"]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert_close(subject(x), mixed(subject, x, ["a", "b"])[0])
    assert len(errors) == 2 and all("thread" in error for error in errors)


@cases(["net", "conv2d", "embedding", "subclass"], ["three"])
def test_disabled_layers_have_the_bases_bits(kind, layer, adapters):
    subject = kind.make(layer, adapters)
    x = batch(subject, dtype=F32)
    with subject.disabled():
        base = subject(x)
        with lora_ext.use_adapters(subject.model, NAMES):
            assert torch.equal(subject(x), base)


@every_kind
def test_merged_layers_are_refused(kind):
    subject = kind.make("linear", "three", F64)
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


@every_kind
def test_the_index_is_read_when_the_block_is_entered(kind):
    subject = kind.make("linear", "three", F64)
    x, index = batch(subject), torch.tensor([0, -1, 2, 1, 0, 2], dtype=torch.int32)
    wanted = mixed(subject, x, NAMES)[0]
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


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@every_kind
def test_an_adapter_that_is_deleted_before_a_checkpoint_repeats_it(kind, reentrant):
    subject = kind.make("linear", "three", F64)
    with lora_ext.use_adapters(subject.model, NAMES):
        y = checkpoint(subject, batch(subject).requires_grad_(), use_reentrant=reentrant)
    subject.layers[0].delete_adapter("b")
    with pytest.raises(RuntimeError, match="'b' was removed since"):
        y.sum().backward()


# ---- errors ----


@every_kind
def test_errors_say_what_to_do(kind):
    subject = kind.make("linear", "three", F64)
    model, x = subject.model, batch(subject)
    int32 = torch.int32

    def opened(*args, **words):
        with lora_ext.use_adapters(model, *args, **words):
            return subject(x)

    with pytest.raises(ValueError, match=r"expected names out of \['a', 'b', 'c'\].*\['z'\]"):
        opened(["z"] * 6)
    with pytest.raises(TypeError, match="sequence of strings"):
        opened("abcabc")
    with pytest.raises(ValueError, match="distinct names"):
        opened(["a", "a"], torch.zeros(6, dtype=int32))
    with pytest.raises(TypeError, match="int32"):
        opened(ABC, torch.zeros(6))
    with pytest.raises(IndexError, match="-1 to 2 for 3 names, but got 3"):
        opened(ABC, torch.full((6,), 3, dtype=int32))
    with pytest.raises(IndexError, match="but got -2"):
        opened(ABC, torch.full((6,), -2, dtype=int32))
    with pytest.raises(ValueError, match=r"\[batch\] or \[batch, tokens\]"):
        opened(ABC, torch.zeros((6, 5, 1), dtype=int32))
    with pytest.raises(ValueError, match=r"expected x of shape \[4, tokens, in\]"):
        opened(["a"] * 4)
    with pytest.raises(ValueError, match=r"a name for each of the 6.*a, a, b, b.*repeats=2"):
        opened(["a"] * 3)
    with pytest.raises(ValueError, match="a row of the index for each of the 6 samples"):
        opened(ABC, torch.zeros((3, 5), dtype=int32))
    with (
        pytest.raises(ValueError, match=r"names twice.*are no samples") as flat,
        lora_ext.use_adapters(model, ["a"] * 3),
    ):
        subject(x[:, 0])
    assert "repeats" not in str(flat.value)  # of flattened rows it would be a guess
    with pytest.raises(ValueError, match="index for these tokens"):
        opened(ABC, torch.zeros((6, 4), dtype=int32))
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
    wanted = loop(subject, x, ["a", "a", None, None, "c", "c"])[0]
    with lora_ext.use_adapters(subject.model, ["a", None, "c"], repeats=2):
        assert_close(subject(x), wanted)
        assert_close(subject(x[::2]), wanted[::2])
    index = torch.tensor([[0] * 5, [-1, 1, 1, 1, -1], [2] * 5], dtype=torch.int32)
    with lora_ext.use_adapters(subject.model, ABC, index, repeats=2):
        assert_close(subject(x[:, -1:]), wanted[:, -1:])
        assert subject(x).shape == wanted.shape


# ---- compiled, checkpointed ----


@cases(["linear", "conv1d", "subclass", "embedding", "net"], ["three"])
def test_another_index_does_not_recompile_sglang_28371(
    forget_graphs, counter, kind, layer, adapters
):
    """A graph must not bake in which adapters were in the batch that it was made of."""
    subject = kind.make(layer, adapters, F64)
    x = batch(subject)
    compiled = torch.compile(subject.model, backend=counter, fullgraph=True)
    seen = []
    for index in ([0, -1, 2, 1, 0, 2], [1, 1, 1, 1, 1, 1], [-1] * 6, [2, 0, 1, 2, 0, 1]):
        rows = torch.tensor(index, dtype=torch.int32)
        for parameter in subject.trained():
            parameter.grad = None
        with lora_ext.use_adapters(subject.model, ABC, rows):
            y = compiled(x)
        y.sum().backward()
        grads = {id(p): p.grad.clone() for p in subject.trained() if p.grad is not None}
        names = [None if i < 0 else ABC[i] for i in index]
        assert_same_steps(
            (y.detach(), None, grads),
            (*loop(subject, x, names)[:1], None, loop(subject, x, names, torch.ones_like(y))[2]),
            subject.trained(),
        )
        seen.append(counter.frame_count)
    assert seen == [1, 1, 1, 1]
    assert_close(compiled(x), subject(x))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("inside", [False, True], ids=["backward after", "backward inside"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@every_kind
def test_a_checkpoint_repeats_with_the_adapters_of_its_forward(kind, reentrant, inside, dropout):
    subject = kind.make("linear", "three", F64, dropout=dropout)
    x = batch(subject)
    dy = randn(loop(subject, x, NAMES)[0])
    torch.manual_seed(3)
    wanted = mixed(subject, x, NAMES, dy)

    def part(x):
        return torch.tanh(subject(x))

    def run(*calls):
        """A step of several forwards, each checkpointed in a block of its own or in none."""
        leaf = x.clone().requires_grad_()
        for parameter in subject.trained():
            parameter.grad = None
        outputs = []
        torch.manual_seed(3)
        for names, through in calls:
            if names is None:
                outputs.append(through(leaf))
                continue
            with lora_ext.use_adapters(subject.model, names):
                outputs.append(through(leaf))
        if inside:
            with lora_ext.use_adapters(subject.model, ["c"] * 6):
                sum(outputs).backward(dy)
        else:
            sum(outputs).backward(dy)
        return sum(outputs).detach(), leaf.grad, {id(p): p.grad for p in subject.trained()}

    def kept(x):
        return checkpoint(part, x, use_reentrant=reentrant)

    def nested(x):
        return checkpoint(lambda x: torch.sin(kept(x)), x, use_reentrant=reentrant)

    assert wanted[0].shape == dy.shape
    for through, plain in ((kept, part), (nested, lambda x: torch.sin(part(x)))):
        for calls in ([NAMES], [NAMES, NAMES[::-1]], [NAMES, None], [None, NAMES], [None]):
            found = run(*((names, through) for names in calls))
            exact = run(*((names, plain) for names in calls))
            assert_same_steps(found, exact, subject.trained())


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


@pytest.mark.parametrize("within", [None, NAMES, ["c"] * 6], ids=["after", "inside", "in another"])
@every_kind
def test_another_checkpoint_repeats_with_the_adapters_of_its_forward(kind, within):
    subject = kind.make("linear", "three", F64)
    x = batch(subject)
    mixed(subject, x, NAMES)  # so that the layer had a block before
    for names in (NAMES, None):
        found = []
        for forward in (repeated(subject).apply, subject):
            leaf = x.clone().requires_grad_()
            for parameter in subject.trained():
                parameter.grad = None
            with lora_ext.use_adapters(subject.model, names) if names else torch.enable_grad():
                y = forward(leaf)
            with lora_ext.use_adapters(subject.model, within) if within else torch.enable_grad():
                y.sum().backward()
            grads = {id(p): p.grad for p in subject.trained()}
            found.append((y.detach(), leaf.grad, grads))
        assert_same_steps(*found, subject.trained())


@pytest.mark.parametrize("within", [None, NAMES, ["c"] * 6], ids=["after", "inside", "in another"])
@every_kind
def test_what_repeats_a_forward_of_which_nothing_is_known_is_refused(kind, within):
    """Hooks, or a function that sees its context after its forward."""
    subject = kind.make("linear", "three", F64)
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
            lora_ext.use_adapters(subject.model, within) if within else torch.enable_grad(),
            pytest.raises(RuntimeError, match="to know the adapters of a forward"),
        ):
            y.sum().backward()


@every_kind
def test_inference_leaves_no_trace(kind):
    subject = kind.make("linear", "three", F64)
    with torch.no_grad(), lora_ext.use_adapters(subject.model, NAMES):
        subject(batch(subject))
    assert "row_adapters" not in subject.layers[0].__dict__


@every_kind
def test_a_replaced_factor_is_seen_within_the_block(kind):
    """PEFT's hot-swap writes `.data` between two calls: nothing of an adapter is kept."""
    subject = kind.make("linear", "three", F64)
    x = batch(subject)
    with torch.no_grad(), lora_ext.use_adapters(subject.model, NAMES):
        before = subject(x)
        for parameter in subject.factors("a"):
            parameter.data = parameter.data * -2.0
        changed = subject(x)
    assert_close(changed, loop(subject, x, NAMES)[0])
    assert not torch.allclose(changed[0], before[0]) and torch.equal(changed[2], before[2])
    assert F.mse_loss(changed, before) > 0
