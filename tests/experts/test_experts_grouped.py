"""Experts as on a GPU: by the kernels, and by torch's grouped product with the update onto it.

A CPU's grouped product is a loop of torch's; here the code is made to take it all the same. It has
the kernels in the emulated package.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import BF16, EMULATED, F16, F32, F64, pair_id
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from lora_ext import _C
from lora_ext.experts import (
    Experts,
    ExpertsAdapter,
    by_kernels,
    expert_groups,
    grouped_product,
    lora_experts,
)
from lora_ext.experts.expert_groups import Rows
from lora_ext.experts.operands import Projection
from lora_ext.experts.routing import Routes
from lora_ext.torch_state import is_captured

EXPERTS, HIDDEN, INNER, RANK = 6, 32, 24, 3
HAS_KERNELS = EMULATED or torch.cuda.is_available()
CARDS = grouped_product._CARDS


@pytest.fixture(autouse=True)
def grouped(monkeypatch):
    """No group of experts is made by numbers that the host reads."""
    monkeypatch.setattr(grouped_product, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(Rows, "groups", None)
    monkeypatch.setattr(grouped_product, "_CARDS", range(8, 20))


def take_kernels(device: str, monkeypatch) -> None:
    """All that is left to a call that reads nothing on the host."""
    if device == "cpu" and not EMULATED:
        pytest.skip("a CPU has the kernels in the emulated package")
    monkeypatch.setattr(grouped_product, "DEVICES", ())


def swiglu(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, -1)
    return silu(gate) * up


@dataclass
class Case:
    """A layer and what it is called with; x, the router's weights and the factors are leaves."""

    experts: Experts
    x: Tensor
    index: Tensor
    weights: Tensor
    factors: list[Tensor]

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers, all in one dtype."""
        names = ("up", "down", "up_bias", "down_bias")
        frozen = {name: getattr(self.experts, name) for name in names}
        made = {name: t.to(dtype) for name, t in frozen.items() if t is not None}
        experts = self.experts._replace(**made)
        leaves = [t.detach().to(dtype) for t in self.leaves()]
        return Case(experts, leaves[0], self.index, leaves[1], leaves[2:])

    def leaves(self) -> list[Tensor]:
        return [self.x, self.weights, *self.factors]

    def step(self, layer) -> list[Tensor]:
        """What a layer returns, and the gradient of each leaf."""
        leaves = [t.detach().clone().requires_grad_() for t in self.leaves()]
        x, weights, a1, b1, a2, b2 = leaves
        up, down = [ExpertsAdapter(a1, b1, 0.5)], [ExpertsAdapter(a2, b2, -2.0)]
        y = layer(self.experts, x, self.index, weights, up, down)
        # Made on the device: a copy from the host would wait for it.
        grad = torch.arange(y.numel(), dtype=F32, device=y.device).mul(0.7).sin().mul(2)
        grad = grad.view(y.shape).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def make_case(
    pair: tuple[torch.dtype, torch.dtype],
    device: str,
    tokens: int = 40,
    with_bias: bool = False,
    is_transposed: bool = False,
    widths: tuple[int, int] = (HIDDEN, INNER),
) -> Case:
    """Some of the slots have the number of no expert, and a weight that is none; one expert has no
    slot."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int, dtype: torch.dtype = pair[0]) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).to(dtype).to(device)

    hidden, inner = widths
    sides = [(2 * inner, hidden), (hidden, inner)]
    weights = [draw(EXPERTS, *(reversed(s) if is_transposed else s)) for s in sides]
    biases = [draw(EXPERTS, out) if with_bias else None for out, _ in sides]
    factors = []
    for out, within in sides:
        factors += [
            draw(EXPERTS * RANK, within, dtype=pair[1]),
            draw(out, RANK * EXPERTS, dtype=pair[1]),
        ]
    index = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :3]
    index[index == 2] = EXPERTS
    experts = Experts(*weights, swiglu, *biases, is_transposed)
    router = torch.rand(tokens, 3, generator=generator).to(pair[0])
    router = router.masked_fill(index == EXPERTS, torch.nan).to(device)
    return Case(experts, draw(tokens, hidden), index.to(device), router, factors)


def by_sums(experts, x, index, weights, up, down) -> Tensor:
    """The layer with W + B A of every expert, as PEFT and grouped products give it."""
    stacks = []
    for weight, ((a, b, scaling, _),) in ((experts.up, up), (experts.down, down)):
        weight = weight.transpose(1, 2) if experts.is_transposed else weight
        first = a.view(EXPERTS, RANK, -1)
        delta = torch.einsum("ore,eri->eoi", b.view(len(b), RANK, EXPERTS), first)
        stacks.append(weight + (scaling * delta).to(weight.dtype))
    biases = [experts.up_bias, experts.down_bias]
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, slot = torch.where(index == e)
        rows = x[token]
        for stack, bias, gate in zip(stacks, biases, (swiglu, None), strict=True):
            rows = linear(rows, stack[e])
            rows = rows if bias is None else rows + bias[e]
            rows = gate(rows) if gate else rows
        out = out.index_add(0, token, (rows * weights[token, slot, None]).to(out.dtype))
    return out


GROUPED = [(BF16, BF16), (BF16, F32)]
BY_KERNELS = [*GROUPED, (F16, F16), (F16, F32), (BF16, F16)]
TOKENS = {"grouped": [1, 40, 300], "kernels": [0, 1, 40, 300]}
ODD = (27, 13)  # no whole chunks
CALLS = [
    pytest.param(way, pair, tokens, (HIDDEN, INNER), id=f"{way}-{pair_id(pair)}-{tokens}")
    for way, pairs in (("grouped", GROUPED), ("kernels", BY_KERNELS * HAS_KERNELS))
    for pair in pairs
    for tokens in TOKENS[way]
] + [pytest.param("kernels", (F16, F32), 40, ODD, id="odd widths")] * HAS_KERNELS


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("way", "pair", "tokens", "widths"), CALLS)
def test_errors_are_at_most_twice_those_of_sums(
    device, way, pair, with_bias, is_transposed, tokens, widths, monkeypatch
):
    if way == "kernels":
        take_kernels(device, monkeypatch)
    case = make_case(pair, device, tokens, with_bias, is_transposed, widths)
    exact = case.to(F64).step(by_sums)
    for own, theirs, value in zip(case.step(lora_experts), case.step(by_sums), exact, strict=True):
        assert own.dtype == theirs.dtype
        floor = 4 * torch.finfo(own.dtype).eps * float(value.norm())
        error, of_sums = (float((each - value).norm()) for each in (own, theirs))
        assert error <= 2 * of_sums + floor


def dropped(*call: Any) -> Tensor:
    """The layer with dropout in both projections."""
    *operands, up, down = call
    first, second = ([each._replace(dropout=0.3) for each in side] for side in (up, down))
    return lora_experts(*operands, first, second)


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
@pytest.mark.parametrize("pair", [(BF16, F32), (F16, F16)], ids=pair_id)
def test_every_way_has_the_bits_of_a_call(device, pair, forget_graphs, monkeypatch):
    take_kernels(device, monkeypatch)
    case = make_case(pair, device, with_bias=True)

    def step(layer) -> list[Tensor]:
        torch.manual_seed(7)
        return case.step(layer)

    found = step(dropped)
    with ThreadPoolExecutor(1) as pool:
        in_thread = pool.submit(step, dropped).result()
    for each in (
        in_thread,
        step(lambda *call: checkpoint(dropped, *call, use_reentrant=False)),
        step(torch.compile(dropped, backend="aot_eager", fullgraph=True)),
    ):
        assert all(torch.equal(*both) for both in zip(each, found, strict=True))
    assert not torch.equal(found[0], step(lora_experts)[0])


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32)], ids=pair_id)
def test_tokens_with_adapters_of_their_own(device, pair, tokens, monkeypatch):
    """One on both projections, one on the first alone, and none; by the kernels where they are."""
    if EMULATED or device != "cpu":
        take_kernels(device, monkeypatch)
    case = make_case(pair, device, tokens, with_bias=True)
    adapters = torch.arange(tokens, device=device) % 3 - 1

    def mixed(experts, x, index, weights, up, down) -> Tensor:
        ups, downs = [*up, up[0]._replace(scaling=1.5)], [*down, None]
        return lora_experts(experts, x, index, weights, ups, downs, adapters)

    def each(experts, x, index, weights, up, down) -> Tensor:
        out = torch.zeros_like(x)
        for adapter, scalings in ((-1, (0.0, 0.0)), (0, (0.5, -2.0)), (1, (1.5, 0.0))):
            own = (adapters == adapter).nonzero().flatten()
            first, second = (
                [side[0]._replace(scaling=scaling)]
                for side, scaling in zip((up, down), scalings, strict=True)
            )
            y = by_sums(experts, x[own], index[own], weights[own], first, second)
            out = out.index_add(0, own, y)
        return out

    exact = case.to(F64).step(each)
    for own, theirs, value in zip(case.step(mixed), case.step(each), exact, strict=True):
        assert own.dtype == theirs.dtype
        floor = 4 * torch.finfo(own.dtype).eps * float(value.norm())
        error, of_sums = (float((each - value).norm()) for each in (own, theirs))
        assert error <= 2 * of_sums + floor


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["grouped", "kernels"])
def test_nothing_is_read_on_the_host(cuda, way, monkeypatch):
    """Of a second call: at the first the kernels are checked."""
    if way == "grouped" and torch.cuda.get_device_capability()[0] not in CARDS:
        pytest.skip("torch's grouped product is a loop on this card")
    if way == "kernels":
        take_kernels(cuda, monkeypatch)
    case = make_case((BF16, F32), cuda, 300)
    case.step(lora_experts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.step(lora_experts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rows_of(weight: Any, count: int, in_place: Tensor | None = None, **routes: Any) -> Rows:
    """So far as a choice of way reads them."""
    order = torch.empty(count, dtype=torch.int32)
    return Rows(Projection(weight, None, Routes(order, order, order, **routes)), in_place)


@pytest.mark.parametrize(
    ("dtype", "columns", "rows", "takes"),
    [
        (BF16, 32, None, True),
        (BF16, 32, torch.empty(5, 40, dtype=BF16)[:, :32], True),
        (BF16, 32, torch.empty(5, 40, dtype=BF16)[:, 1:33], False),
        (BF16, 32, torch.empty(5, 36, dtype=BF16)[:, :32], False),
        (BF16, 32, torch.empty(0, 32, dtype=BF16), False),
        (BF16, 32, torch.empty(1, 32, dtype=BF16).expand(5, 32), False),
        (BF16, 32, torch.empty((), dtype=BF16).expand(5, 32), False),
        (BF16, 20, None, False),
        (F16, 32, None, False),
        (F32, 32, None, False),
    ],
)
def test_what_the_grouped_product_takes(dtype, columns, rows, takes):
    """Bfloat16 whose rows begin at whole 16 bytes."""
    weight = torch.empty(EXPERTS, 48, columns, dtype=dtype)
    count = 5 if rows is None else len(rows)
    assert grouped_product.takes(rows_of(weight, count, rows)) == takes


class OfCard(Tensor):
    """On a CPU; says otherwise."""

    is_cuda, device = True, torch.device("cuda", 0)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_cards_without_the_kernel(capability, monkeypatch):
    """Where torch's grouped product is a loop that reads the numbers of rows on the host."""
    monkeypatch.setattr(grouped_product, "_CARDS", CARDS)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weight = torch.empty(EXPERTS, 48, 32, dtype=BF16).as_subclass(OfCard)
    assert grouped_product.takes(rows_of(weight, 5)) == (capability[0] in (9, 10))


@pytest.mark.parametrize(
    ("arch", "sm90a_code", "rows", "ends", "takes"),
    [
        (90, True, 9999, None, True),
        (90, False, 9999, None, False),
        (100, True, 9999, None, False),
        (100, True, 9, None, True),
        (100, True, 9999, torch.ones(1), True),
    ],
)
def test_kernels_take_the_place_of_the_grouped_product(
    arch, sm90a_code, rows, ends, takes, monkeypatch
):
    """With wgmma, for few rows, or for rows with adapters of their own."""
    card = _C.Card(arch, 132, 233472, 232448, sm90a_code=sm90a_code)
    monkeypatch.setattr(_C, "cuda_card", lambda device: card)
    monkeypatch.setattr(by_kernels, "have_wgmma", by_kernels.have_wgmma.__wrapped__)
    monkeypatch.setattr(by_kernels, "supports", lambda projection: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10))
    weight = torch.empty(EXPERTS, 48, 32, dtype=BF16).as_subclass(OfCard)
    case = rows_of(weight, rows, ends=ends)
    assert by_kernels.are_faster(case.projection) == takes
    assert grouped_product.takes(case) != takes


def test_a_capture(monkeypatch):
    """All experts are one product, so it can be captured; adapters of rows are read on the host."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_captured(torch.empty(1).as_subclass(OfCard)) and not is_captured(torch.empty(1))
    monkeypatch.setattr(expert_groups, "is_captured", lambda tensor: True)
    case = make_case((BF16, BF16), "cpu")
    case.step(lora_experts)
    with pytest.raises(RuntimeError, match="call the layer outside of the capture"):
        case.step(lambda *call: lora_experts(*call, torch.zeros(40, dtype=torch.int32)))
