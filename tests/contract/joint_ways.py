"""How a forward of a joint runs: checkpoints, graphs, tasks, threads, copies."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from helpers import F64
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from contract.joints import NAMES, OTHERS, block, of_pool, x_of
from contract.row_helpers import Names, Step, gradient_of
from contract.subject import Subject

Forward = Callable[[Tensor], Tensor]
Keep = Callable[[Forward, Tensor], Tensor]


def plain(part: Forward, x: Tensor) -> Tensor:
    """The sine is there to need y again."""
    return torch.sin(part(x))


def kept(part: Forward, x: Tensor, reentrant: bool = False) -> Tensor:
    """In a checkpoint, which needs an operand and a result with a gradient."""
    one = torch.zeros((), requires_grad=True)
    return checkpoint(lambda x, one: plain(part, x) + one, x, one, use_reentrant=reentrant)


def kept_on_cpu(part: Forward, x: Tensor) -> Tensor:
    def inner(x):
        with torch.autograd.graph.save_on_cpu():
            return part(x)

    return kept(inner, x)


def around(subject: Subject, forward: Forward, keep: Keep, names: Names | None, x: Tensor):
    with block(subject, names):
        return keep(forward, x)


def inside(subject: Subject, forward: Forward, keep: Keep, names: Names | None, x: Tensor):
    def part(x):
        with block(subject, names):
            return forward(x)

    return keep(part, x)


def two(subject: Subject, forward: Forward, keep: Keep, names: Names | None, x: Tensor):
    """Blocks of the same names in another order, and of others."""

    def part(x):
        y = 0
        for number, own in enumerate((names, names and names[::-1], names and ["b"] * 6)):
            with block(subject, own):
                y = y + (number + 1) * forward(x)
        return y

    return keep(part, x)


def by_names(subject: Subject, forward: Forward, keep: Keep, names: Names | None, x: Tensor):
    """By PEFT's argument."""
    words = {"adapter_names": [n or "__base__" for n in names]} if names else {}
    return keep(lambda x: forward(x, **words), x)


def after_inference(subject: Subject, forward: Forward, keep: Keep, names: Names | None, x: Tensor):
    with block(subject, names):
        with torch.inference_mode():
            forward(x.detach())
        torch.manual_seed(3)
        return keep(forward, x)


def without_grad(subject: Subject, forward: Forward, keep: Keep, names: Names | None, x: Tensor):
    with torch.no_grad(), block(subject, names), torch.enable_grad():
        return keep(forward, x)


def as_function(subject: Subject, forward: Forward, keep: Keep, names: Names | None, x: Tensor):
    """With other tensors in the place of all parameters."""
    with block(subject, names):
        own = {name: p.clone() for name, p in subject.model.named_parameters()}
        return keep(lambda x: functional_call(subject.model, own, (x,)), x)


class Way(NamedTuple):
    """How a forward runs.

    Attributes:
        part: opens the block and runs the forward by `keep`.
        first: names of the first call, which compiles; or there is no block yet.
        graph: what is compiled: "", "model", the "layer" alone, or a "checkpoint" with the model.
        where: what calls: "here", "tasks", "thread", or a "copy" is called.
    """

    part: Callable[..., Tensor] = around
    keep: Keep = plain
    graph: str = ""
    first: Names | None = None
    where: str = "here"

    @property
    def repeats(self) -> bool:
        return self.keep is not plain or self.graph == "checkpoint"


reentrant = partial(kept, reentrant=True)
WAYS = {
    "eager": Way(),
    "compiled": Way(graph="model"),
    "compiled in a block": Way(graph="model", first=NAMES),
    "reentrant": Way(keep=reentrant),
    "hooks": Way(keep=kept),
    "reentrant around a block": Way(inside, reentrant),
    "hooks around a block": Way(inside, kept),
    "reentrant around two": Way(two, reentrant),
    "hooks around two": Way(two, kept),
    "reentrant around a graph": Way(keep=reentrant, graph="model"),
    "hooks around a graph": Way(keep=kept, graph="model"),
    "hooks in a graph": Way(graph="checkpoint"),
    "names": Way(by_names),
    "names in reentrant": Way(by_names, reentrant),
    "names in hooks": Way(by_names, kept),
    "names of a graph": Way(by_names, graph="layer"),
    "block without grad": Way(without_grad, kept),
    "hooks on the cpu": Way(keep=kept_on_cpu),
    "tasks": Way(where="tasks"),
    "tasks of a graph": Way(where="tasks", graph="model"),
    "thread": Way(where="thread"),
    "thread of a graph": Way(where="thread", graph="model"),
    "after inference": Way(after_inference),
    "functional": Way(as_function),
    "copy": Way(where="copy"),
}


def call_of(subject: Subject, way: Way) -> Forward:
    """The model, or its graph."""
    model = subject.model
    # A graph cannot ask whose block it runs in: tasks leave it.
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=way.where != "tasks")
    if way.graph == "layer":
        model.base_model.model[0].compile(backend="aot_eager", fullgraph=True)
        return model
    if way.graph == "checkpoint":
        return compiled(lambda x: checkpoint(model, x, use_reentrant=False))
    return compiled(model) if way.graph else model


class Call(NamedTuple):
    """One forward and its backward."""

    subject: Subject
    forward: Forward
    way: Way
    names: Names | None
    within: Names | None
    dtype: torch.dtype = F64
    between: Callable[[Subject], Any] = lambda subject: None

    def run(self) -> Step:
        return self.backward(*self.start())

    def start(self) -> tuple[Tensor, Tensor]:
        x = x_of(self.subject, self.dtype)
        x = x.requires_grad_(x.is_floating_point())
        torch.manual_seed(3)
        return x, self.way.part(self.subject, self.forward, self.way.keep, self.names, x)

    def backward(self, x: Tensor, y: Tensor) -> Step:
        """y and all gradients."""
        model = self.subject.model
        own = {**dict(model.named_parameters()), **of_pool(model)}
        for parameter in own.values():
            parameter.grad = None
        self.between(self.subject)
        with block(self.subject, self.within):
            y.backward(gradient_of(y)) if y.requires_grad else None
        found = {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in own.items()}
        return {name: value for name, value in found.items() if value is not None}


async def _overlapping(calls: Sequence[Call]) -> list[Step]:
    """Each in a task that was made in the block of the one before, and all blocks are open."""

    async def serve(number: int) -> list[Step]:
        call, later = calls[number], None
        with block(call.subject, call.names):
            if number + 1 < len(calls):
                later = asyncio.create_task(serve(number + 1))
            for _ in calls:
                await asyncio.sleep(0)
            own = call._replace(names=None).start()  # in the block that is open
            await asyncio.sleep(0)
            found = call.backward(*own)
        return [found, *(await later if later else [])]

    return await serve(0)


def run_all(way: Way, calls: list[Call]) -> list[Step]:
    named = [call for call in calls if call.names]
    if way.where == "tasks" and named:
        return asyncio.run(_overlapping(named))
    if way.where == "thread":
        with ThreadPoolExecutor(1) as thread:
            return [thread.submit(call.run).result() for call in calls]
    if way.where == "copy":
        subject = calls[0].subject
        is_pefts = subject.name.startswith("peft")  # whose copy stays disabled
        with nullcontext() if is_pefts else subject.disabled(), block(subject, OTHERS):
            copied = subject.holding(copy.deepcopy(subject.model))
        calls = [call._replace(subject=copied, forward=copied.model) for call in calls]
    return [call.run() for call in calls]
