"""How lora_decode shares its work among blocks (kernels/plan/decode_shares.h), against a loop."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ext import _C

CHUNK, LEAST_UNITS, MOST = 2, 4, 2**30


@st.composite
def cases(draw):
    tiles, s_tiles = draw(st.integers(1, 300)), draw(st.integers(0, 64))
    steps = draw(st.one_of(st.integers(1, 9), st.integers(1, 300)))
    most = max(1, tiles * steps // LEAST_UNITS)
    return tiles, s_tiles, steps, draw(st.integers(1, min(most, 600)))


def parts_of(shares, tiles, s_tiles, steps, blocks):
    """(of S, tile, first step, end step, block) of each block's parts, in their order."""
    chunks = -(-steps // CHUNK)
    for block in range(blocks):
        at, end = shares.first_chunk(block), shares.first_chunk(block + 1)
        while at < end:
            tile, stop = at // chunks, min(end, (at // chunks + 1) * chunks)
            first = at % chunks * CHUNK
            yield True, tile, first, min(steps, (stop - tile * chunks) * CHUNK), block
            at = stop
        at, end = shares.first_unit(block), shares.first_unit(block + 1)
        while at < end:
            tile, stop = at // steps, min(end, (at // steps + 1) * steps)
            yield False, tile, at % steps, stop - tile * steps, block
            at = stop


@settings(deadline=None, max_examples=200)
@given(cases())
def test_every_step_is_one_blocks_and_all_have_as_many(case):
    tiles, s_tiles, steps, blocks = case
    shares = _C.DecodeShares(*case)
    units = [shares.first_unit(block) for block in range(blocks + 1)]
    chunks = [shares.first_chunk(block) for block in range(blocks + 1)]
    assert units[0] == chunks[0] == 0
    assert units[-1] == tiles * steps and chunks[-1] == s_tiles * shares.chunks
    assert all(a < b for a, b in itertools.pairwise(units))
    work = [units[i + 1] - units[i] + CHUNK * (chunks[i + 1] - chunks[i]) for i in range(blocks)]
    assert max(work) - min(work) <= 1
    for block in range(blocks):
        for unit in (units[block], units[block + 1] - 1):
            assert shares.block_of(unit) == block


@settings(deadline=None, max_examples=200)
@given(cases())
def test_every_part_has_a_slot_of_its_own_and_follows_the_one_before(case):
    tiles, s_tiles, *_ = case
    shares = _C.DecodeShares(*case)
    slots = {True: {}, False: {}}
    for of_s, tile, _, end, block in parts_of(shares, *case):
        slot = shares.s_slot(tile, (end - 1) // CHUNK, block) if of_s else tile + block
        slots[of_s].setdefault(tile, []).append(slot)
    for of_s, most in ((True, shares.s_slots), (False, shares.slots)):
        found = slots[of_s]
        assert len(found) == (s_tiles if of_s else tiles)
        taken = [slot for each in found.values() for slot in each]
        assert len(taken) == len(set(taken)) and all(0 <= slot < most for slot in taken)
        for tile, each in found.items():
            assert each == list(range(each[0], each[0] + len(each)))
            if of_s:
                assert shares.s_parts(tile) == (each[0], len(each))


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(0, 64))
def test_room_for_all_tiles_of_s_is_enough_for_fewer(case, fewer):
    tiles, s_tiles, steps, blocks = case
    room = _C.DecodeShares(*case).s_slots
    assert _C.DecodeShares(tiles, min(fewer, s_tiles), steps, blocks).s_slots <= room


@pytest.mark.parametrize("steps", [2**23 - 1, 2**24 - 2])
def test_the_largest_product_stays_within_32_bits(steps):
    tiles = MOST // (steps + 1) - 1
    shares = _C.DecodeShares(tiles, 1, steps, 2**15)
    assert shares.first_unit(2**15) == tiles * steps and shares.first_chunk(2**15) == shares.chunks
    for block in (0, 1, 777, 2**15 - 1):
        assert shares.block_of(shares.first_unit(block)) == block
