"""Experts as on a GPU: by the kernels, and by torch's grouped product with the update onto it.

A CPU's grouped product is a loop of torch's; here the code is made to take it all the same. It has
the kernels in the emulated package.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_cases import Case, assert_at_most_twice, some_index
from expert_helpers import EXPERTS, HIDDEN, INNER, by_tokens, sides_of
from helpers import BF16, EMULATED, F16, F32, pair_id
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_ext import _C
from lora_ext.experts import Experts, by_kernels, expert_groups, grouped_product, lora_experts
from lora_ext.experts.expert_groups import Rows
from lora_ext.experts.operands import Projection
from lora_ext.experts.routing import Routes
from lora_ext.torch_state import is_captured

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


def case_of(device: str, pair=(BF16, F32), tokens: int = 40, **words: Any) -> Case:
    """Some of the slots have the number of no expert; one expert has no slot."""
    index = tuple(tuple(EXPERTS if e == 2 else e for e in row) for row in some_index(tokens, 3))
    words = {"ranks": ((3, 3),), "device": device} | words
    return Case(pair=pair, index=index, **words)


def experts_of(case: Case, with_bias: bool = True, is_transposed: bool = False) -> Experts:
    experts = case.experts_of()
    if with_bias:
        sides = ((EXPERTS, out) for out, _ in sides_of(experts))
        up, down = (torch.randn(side).to(experts.up).mul_(0.3) for side in sides)
        experts = experts._replace(up_bias=up, down_bias=down)
    if is_transposed:
        up, down = experts.up.mT.contiguous(), experts.down.mT.contiguous()
        experts = experts._replace(up=up, down=down, is_transposed=True)
    return experts


def check(case: Case, experts: Experts) -> None:
    """Errors are at most twice those of a loop over tokens in the same dtype."""
    found, theirs = (case.step(layer, experts) for layer in (lora_experts, by_tokens))
    assert_at_most_twice(found, theirs, case.exact(experts))


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
def test_errors_are_at_most_twice_those_of_a_loop(
    device, way, pair, with_bias, is_transposed, tokens, widths, monkeypatch
):
    if way == "kernels":
        take_kernels(device, monkeypatch)
    case = case_of(device, pair, tokens, sizes=widths)
    check(case, experts_of(case, with_bias, is_transposed))


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the kernels")
@pytest.mark.parametrize("pair", [(BF16, F32), (F16, F16)], ids=pair_id)
def test_every_way_has_the_bits_of_a_call(device, pair, forget_graphs, monkeypatch):
    take_kernels(device, monkeypatch)
    case = case_of(device, pair, dropout=0.3, draws=True)
    experts = experts_of(case)

    def step(layer, case=case) -> dict[str, Tensor]:
        torch.manual_seed(7)
        return case.step(layer, experts)

    found = step(lora_experts)
    with ThreadPoolExecutor(1) as pool:
        in_thread = pool.submit(step, lora_experts).result()
    for each in (
        in_thread,
        step(lambda *call: checkpoint(lora_experts, *call, use_reentrant=False)),
        step(torch.compile(lora_experts, backend="aot_eager", fullgraph=True)),
    ):
        assert all(torch.equal(each[name], value) for name, value in found.items())
    assert not torch.equal(found["y"], step(lora_experts, replace(case, dropout=0.0))["y"])


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32)], ids=pair_id)
def test_tokens_with_adapters_of_their_own(device, pair, tokens, monkeypatch):
    """One on both projections, one on the first alone, and none; by the kernels where they are."""
    if EMULATED or device != "cpu":
        take_kernels(device, monkeypatch)
    own = tuple(i % 3 - 1 for i in range(tokens))
    case = case_of(device, pair, tokens, ranks=((3, 3), (3, 0)), own=own)
    check(case, experts_of(case))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["grouped", "kernels"])
def test_nothing_is_read_on_the_host(cuda, way, monkeypatch):
    """Of a second call: at the first the kernels are checked."""
    if way == "grouped" and torch.cuda.get_device_capability()[0] not in CARDS:
        pytest.skip("torch's grouped product is a loop on this card")
    if way == "kernels":
        take_kernels(cuda, monkeypatch)
    case = case_of(cuda, tokens=300)
    experts = case.experts_of()
    made = case.made(experts)
    case.step(lora_experts, experts, made)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.step(lora_experts, experts, made)
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
    case = case_of("cpu")
    case.step(lora_experts)
    with pytest.raises(RuntimeError, match="call the layer outside of the capture"):
        replace(case, own=(0,) * 40).step(lora_experts)
