"""`use_adapters` on both kinds of layer: which tasks, threads and copies are in a block."""

import asyncio
import contextlib
import contextvars
import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import F64

import lora_ext
from contract.cases import assert_close, cases
from contract.row_helpers import batch, run

NAMES = ["a", None, "c", "b", "a", "c"]


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
        wanted = run(subject, names, x)["y"] if names else subject(x)
        assert all(torch.equal(y, wanted) for y in found)


def test_a_task_has_the_block_in_which_it_was_made(subject):
    x = batch(subject)

    async def parent():
        with lora_ext.use_adapters(subject.model, NAMES):
            return await asyncio.create_task(child()), subject(x)

    async def child():
        with lora_ext.use_adapters(subject.model, ["b"] * 6):
            await asyncio.sleep(0)
        return subject(x)

    assert all(torch.equal(y, run(subject, NAMES, x)["y"]) for y in asyncio.run(parent()))


def child_in_a_block(subject, forward):
    """A task that was made in a block enters one of its own; then its parent goes on."""

    async def child():
        with lora_ext.use_adapters(subject.model, ["b"] * 6):
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def parent():
        with lora_ext.use_adapters(subject.model, NAMES):
            other = asyncio.create_task(child())
            await asyncio.sleep(0)
            try:
                return forward()
            finally:
                await other

    return asyncio.run(parent())


def another_thread(subject, forward):
    with lora_ext.use_adapters(subject.model, NAMES), ThreadPoolExecutor(1) as thread:
        return thread.submit(forward).result()


def tasks_in_turn(subject, forward):
    return asyncio.run(in_tasks(subject, forward, [NAMES, ["b"] * 6]))


def a_task_without_a_block(subject, forward):
    return asyncio.run(in_tasks(subject, forward, [None, NAMES]))


@pytest.mark.parametrize(
    "elsewhere", [tasks_in_turn, a_task_without_a_block, child_in_a_block, another_thread]
)
def test_a_compiled_model_in_another_task_or_thread_is_refused(
    forget_graphs, counter, subject, elsewhere
):
    """A graph cannot ask whose the adapters are: it says so."""
    x = batch(subject)
    compiled = torch.compile(subject.model, backend=counter)
    with lora_ext.use_adapters(subject.model, NAMES):
        assert torch.equal(compiled(x), run(subject, NAMES, x)["y"])
    with pytest.raises(RuntimeError, match="a compiled model in the task or thread whose block"):
        elsewhere(subject, lambda: compiled(x))


def test_a_thread_that_has_the_context_of_the_block_is_in_it(subject):
    """As of asyncio.to_thread. torch's products may be divided among more threads there."""
    x = batch(subject)
    with lora_ext.use_adapters(subject.model, NAMES), ThreadPoolExecutor(1) as thread:
        y = thread.submit(contextvars.copy_context().run, subject, x).result()
    assert_close(y, run(subject, NAMES, x)["y"])


def test_generators_that_take_turns_are_refused(subject):
    """Two streams of one thread: whose adapters a forward has would be who came last."""
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
    assert torch.equal(next(first), run(subject, NAMES, x)["y"])
    assert torch.equal(next(second), run(subject, ["b"] * 6, x)["y"])
    with pytest.raises(RuntimeError, match="a suspended generator has one open"):
        next(first)
    second.close()
    with opened(NAMES), opened(["b"] * 6):
        assert torch.equal(subject(x), run(subject, ["b"] * 6, x)["y"])


def test_a_generator_that_goes_on_in_another_context_is_refused(subject):
    """As asyncio.wait_for has it before Python 3.12, a task for each step; a context that is not
    the block's knows nothing of it, or of another one alone."""
    x = batch(subject)

    def stream():
        with lora_ext.use_adapters(subject.model, NAMES):
            while True:
                yield subject(x)

    async def waiting(steps):
        async def in_steps():
            with lora_ext.use_adapters(subject.model, NAMES):
                while True:
                    yield subject(x)

        first = in_steps()
        for _ in range(steps):
            await asyncio.create_task(anext(first))

    match = "goes on in another task or context"
    with pytest.raises(RuntimeError, match=match):
        asyncio.run(waiting(2))
    for outer in (contextlib.nullcontext(), lora_ext.use_adapters(subject.model, ["b"] * 6)):
        with outer:
            streaming, context = stream(), contextvars.copy_context()
            assert torch.equal(context.run(next, streaming), run(subject, NAMES, x)["y"])
            assert torch.equal(context.run(next, streaming), run(subject, NAMES, x)["y"])
            with pytest.raises(RuntimeError, match=match):
                next(streaming)


def test_another_thread_is_refused(subject):
    x = batch(subject, 2)

    def entered():
        with lora_ext.use_adapters(subject.model, ["a", "b"]):
            pass

    def refused(call):
        with pytest.raises(RuntimeError, match="thread"):
            call()

    with lora_ext.use_adapters(subject.model, ["a", "b"]), ThreadPoolExecutor(1) as thread:
        for call in (
            lora_ext.use_adapters(subject.model, ["a", "b"]).__enter__,
            lambda: subject(x),
            lambda: copy.copy(subject.model)(x),  # as in the threads of nn.DataParallel
        ):
            thread.submit(refused, call).result()
        assert_close(subject(x), run(subject, ["a", "b"], x)["y"])
