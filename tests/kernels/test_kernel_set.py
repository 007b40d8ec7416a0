"""Which kernels are checked, and that each check is of the kernels that it is meant for."""

from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_ext
from lora_ext import _C

T4 = _C.Card(75, 40, 65536, 65536)
HALF_HOPPER = _C.Card(90, 66, 233472, 232448, sm90a_code=False)  # built without code for 9.0a
CARDS = {
    **lora_ext.kernels.CARDS,
    "Hopper without 9.0a": HALF_HOPPER,
    "MIG": _C.Card(90, 16, 233472, 232448),
    "one SM": _C.Card(90, 1, 233472, 232448),
}
ROUTES = ("auto", "kernel", "hybrid")


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("card", sorted(CARDS))
def test_each_small_case_takes_the_kernels_that_it_checks(card, early):
    checked = [*_C.all_kernels(CARDS[card], early), *_C.all_grouped_kernels(CARDS[card])]
    assert len(checked) >= 128
    assert len({kernels.name for kernels in checked}) == len(checked)
    for kernels in checked:
        problem, plan = kernels.small_case(CARDS[card])
        planned = _C.kernels_of(plan, problem, backward=kernels.backward)
        assert planned == kernels, f"{planned} for {kernels}"


@pytest.mark.parametrize("card", sorted(CARDS))
def test_blocks_of_a_small_case_have_several_tiles(card):
    for kernels in _C.all_kernels(CARDS[card], True):
        problem, plan = kernels.small_case(CARDS[card])
        if plan.tile == "decode":
            continue
        rows, columns = (int(number) for number in plan.tile.split()[-3::2])
        together = 2 if plan.wgmma else 1  # blocks of a cluster
        width = problem.k if kernels.backward else problem.n
        tiles = -(-problem.m // (together * rows)) * -(-width // columns)
        # Of a pingpong tile, each of two consumers has one.
        assert 1 <= plan.blocks <= 2 * together and tiles >= 2 * max(1, plan.blocks // together)
        if plan.wgmma:  # the second block of the last pair has no rows
            assert 0 < problem.m % (2 * rows) <= rows


@pytest.mark.parametrize("card", sorted(set(CARDS) - {"one SM"}))
def test_blocks_of_a_small_case_of_few_rows_share_tiles(card):
    found = set()
    for kernels in _C.all_kernels(CARDS[card], True):
        problem, plan = kernels.small_case(CARDS[card])
        if plan.tile != "decode":
            continue
        at = _C.plan_numbers(plan)
        steps = -(-problem.k // 64)
        assert at["batch"] - 8 < problem.m < at["batch"] and at["tiles"] > 4
        # Two chunks of S at least, and blocks that do not begin with a tile.
        assert steps > 2 and at["tiles"] * steps % plan.blocks != 0
        found.add(at["batch"])
    assert found == {8, 16, 32, 64}


@pytest.mark.parametrize("early", [True, False])
def test_a_card_without_kernels_has_none_to_check(early):
    assert _C.all_kernels(T4, early) == []


@st.composite
def problems(draw):
    sizes = st.one_of(st.integers(1, 9), st.integers(1, 20000), st.sampled_from([536, 4096, 2**20]))
    ranks = st.one_of(st.integers(1, 80), st.integers(1, 512))
    problem = _C.Problem(draw(sizes), draw(sizes), draw(sizes), draw(ranks))
    problem.float_adapters, problem.dropout = draw(st.booleans()), draw(st.booleans())
    aligned = draw(st.booleans())
    for name in ("aligned", "aligned_weight", "aligned_a", "aligned_b"):
        setattr(problem, name, aligned or draw(st.booleans()))
    problem.weight_row_major = problem.aligned_weight or draw(st.booleans())
    return problem


@cache
def checked_on(card, early):
    return set(_C.all_kernels(CARDS[card], early))


def plans_of(problem, card, backward):
    """With the kernels' name: every route and tile, needed gradients, early launches or none."""
    call = {"float_adapters": problem.float_adapters, "dropout": problem.dropout}
    tiles = _C.tiles_of(card, backward=backward, **call)
    routes = [("auto", ""), ("hybrid", ""), *(("kernel", tile) for tile in ("", *tiles))]
    for needs in product((True, False), repeat=3) if backward else [(True, True, True)]:
        problem.need_dx, problem.need_dlora_a, problem.need_dlora_b = needs
        for (choice, tile), early in product(routes, (True, False)):
            asked = {"choice": choice, "tile": tile, "use_pdl": early}
            yield early, _C.plan_as_asked(card, problem, backward=backward, **asked)


@settings(deadline=None, max_examples=200)
@given(problems(), st.sampled_from([*CARDS, "H100"]), st.booleans(), st.booleans())
def test_whatever_a_call_asks_for_is_checked(problem, card, backward, float16):
    problem.dtype = torch.float16 if float16 else torch.bfloat16
    for early, plan in plans_of(problem, CARDS[card], backward):
        if plan.kernel:
            kernels = _C.kernels_of(plan, problem, backward=backward)
            assert kernels in checked_on(card, early)
