"""A layer of experts and what it is called with, for tests of `lora_experts` beside a loop over
tokens."""

import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import torch
from expert_helpers import (
    EXPERTS,
    HIDDEN,
    INNER,
    SEEDS,
    by_tokens,
    make_experts,
    make_routes,
    sides_of,
)
from helpers import F64
from torch import Tensor

from lora_ext import _C
from lora_ext.experts import Experts, ExpertsAdapter, expert_groups, factors, layer, routing

SCALINGS = (0.5, -2.0, 1.5, 1.0)
# The rank of each adapter on both projections.
BOTH, FOUR = ((3, 3), (2, 2)), ((3, 3), (1, 0), (0, 2), (2, 2))


@dataclass(frozen=True)
class Case:
    """A layer and what it is called with.

    Attributes:
        index: of experts; a number out of their range is none, and has a weight that is none.
        pair: the dtype of all but the factors, then that of each adapter's, over again.
        own: the adapter of each token, -1 for none; None: all have all.
        is_small: whether groups and blocks have few rows and experts.
        is_odd: whether scalings are in tensors, B is not contiguous and `own` is of int64.
        wants: the first letters of x, the weights, A and B, whose gradients are.
        default: torch's default device, on which nothing of the call is made.
        device: on which the call is made.
        sizes: of x and h.
        draws: whether seeds are drawn; else they are `SEEDS`.
    """

    kind: str = "plain"
    form: str = "dense"
    pair: tuple[torch.dtype, ...] = (F64, F64)
    index: tuple[tuple[int, ...], ...] = ()
    own: tuple[int, ...] | None = None
    ranks: tuple[tuple[int, int], ...] = BOTH
    dropout: float = 0.0
    count: int = EXPERTS
    is_small: bool = False
    panels: str = "auto"
    is_odd: bool = False
    wants: str = "xwab"
    default: str = "cpu"
    device: str = "cpu"
    sizes: tuple[int, int] = (HIDDEN, INNER)
    draws: bool = False

    def step(self, function, experts: Experts | None = None, made=None) -> dict[str, Tensor]:
        """y and the gradients that are wanted, of what was made. With experts in float64, all of it
        is."""
        experts = self.experts_of() if experts is None else experts
        leaves, operands, grad = self.made(experts) if made is None else made
        with self.patched(), torch.device(self.default):
            y = function(experts, *operands)
            if y.requires_grad:
                y.backward(grad)
        wanted = {name: each for name, each in leaves.items() if each.requires_grad}
        grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in wanted.items()}
        return {"y": y.detach(), **grads}

    def made(self, experts: Experts) -> tuple[dict[str, Tensor], tuple, Tensor]:
        """(leaves by name, the operands of `lora_experts` besides the experts, dy)."""
        generator, leaves = torch.Generator().manual_seed(3), {}

        def leaf(name: str, *shape: int, dtype: torch.dtype = self.pair[0]) -> Tensor:
            is_turned = self.is_odd and name[0] == "b"
            values = (0.3 * torch.randn(shape, generator=generator)).to(dtype)
            values = values.double() if experts.up.dtype == F64 else values
            values = (values.t().contiguous().t() if is_turned else values).to(self.device)
            leaves[name] = values.requires_grad_(name[0] in self.wants)
            return leaves[name]

        sides: list[list] = [[], []]
        for (i, ranks), which in itertools.product(enumerate(self.ranks), range(2)):
            rank, (out, within) = ranks[which] * self.count, sides_of(experts)[which]
            dtype = self.pair[1 + i % (len(self.pair) - 1)]
            if rank:
                a = leaf(f"a{which}{i}", rank, within, dtype=dtype)
                b = leaf(f"b{which}{i}", out, rank, dtype=dtype)
                scaling = torch.tensor(SCALINGS[i]) if self.is_odd else SCALINGS[i]
                sides[which].append(ExpertsAdapter(a, b, scaling, self.dropout))
            elif self.own is not None:
                sides[which].append(None)
        slots = len(self.index[0]) if self.index else 2
        index = torch.tensor(self.index, dtype=torch.int64).view(-1, slots).to(self.device)
        x, weights = leaf("x", len(index), sides_of(experts)[0][1]), leaf("w", *index.shape)
        with torch.no_grad():
            weights[(index < 0) | (index >= self.count)] = torch.nan
        width = torch.int64 if self.is_odd else torch.int32
        own = None if self.own is None else torch.tensor(self.own, dtype=width, device=self.device)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(self.pair[0])
        return leaves, (x, index, weights, *sides, own), grad.to(x)

    def experts_of(self) -> Experts:
        torch.manual_seed(0)
        made = make_experts(self.kind, self.count, self.sizes).to(self.device, self.pair[0])
        return Experts.of(made)

    def exact(self, experts: Experts | None = None) -> dict[str, Tensor]:
        """`step` of a loop over tokens in float64."""
        experts = self.experts_of() if experts is None else experts
        names = ("up", "down", "up_bias", "down_bias")
        frozen = {name: getattr(experts, name) for name in names}
        wide = {name: each.double() for name, each in frozen.items() if each is not None}
        return self.step(by_tokens, experts._replace(**wide))

    def patched(self) -> ExitStack:
        """A block in which seeds are known and sizes are the case's."""
        has_first = any(first for first, _ in self.ranks)  # else it draws no seed
        stack, seeds = ExitStack(), itertools.cycle(SEEDS if has_first else SEEDS[1:])
        known = layer, "draw_seed", lambda device: torch.tensor(next(seeds), device=device)
        sizes = (expert_groups, "_ROWS", 8), (factors, "_BLOCK", 2), (routing, "_CPU_BLOCK", 100)
        for patch in (*(known,) * (not self.draws), *sizes * self.is_small):
            stack.enter_context(mock.patch.object(*patch))
        _C.set_cpu_panels(self.panels)
        stack.callback(_C.set_cpu_panels, "auto")
        return stack


def some_index(tokens: int, slots: int = 2) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, make_routes(tokens, slots)[1].tolist()))


def some_own(tokens: int) -> tuple[int, ...]:
    return tuple(i % 4 - 1 for i in range(tokens))


def assert_at_most_twice(found: dict, theirs: dict, exact: dict) -> None:
    """The errors of others."""
    for name, value in exact.items():
        assert found[name].dtype == theirs[name].dtype
        # The few roundings of one token may happen to cancel in one of the two.
        dtype = found["y" if len(exact["y"]) == 1 else name].dtype
        floor = 4 * torch.finfo(dtype).eps * float(value.norm())
        error, of_theirs = (float((each[name] - value).norm()) for each in (found, theirs))
        assert error <= 2 * of_theirs + floor, name
