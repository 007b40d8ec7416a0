"""Whatever is planned fits the card: shared memory, grids, tensor maps, and the workspace."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernel_set import CARDS, plans_of, problems

from lora_ext import _C

MOST_X, MOST_YZ = 2**31 - 1, 65535
NONE = -1


def blocks_of(count, size):
    return -(-count // size)


def decode_regions(problem, plan, at):
    elements = (64 if at["batch"] <= 16 else 128) * at["batch"]
    chunks = at["s_tiles"] * blocks_of(blocks_of(problem.k, 64), 2)
    s_parts = chunks if chunks <= plan.blocks else at["s_tiles"] + plan.blocks
    return {
        "sums": (at["sums"], 4 * (at["tiles"] + plan.blocks) * elements),
        "s_sums": (at["s_sums"], 4 * s_parts * elements),
        "t": (at["t"], 2 * problem.m * at["terms"] * at["width"]),
        "flags": (at["flags"], 4 * (at["tiles"] + at["s_tiles"] + 1)),
    }


def regions(problem, plan, at):
    """Name -> offset, bytes, as csrc/kernels/plan/plan.h describes them."""
    if plan.tile == "decode":
        return decode_regions(problem, plan, at)
    m, n, k, rank = problem.m, problem.n, problem.k, problem.rank
    sums = plan.panels if plan.one_pass else plan.shrink_splits
    sizes = {
        "a": 2 * at["terms"] * rank * at["a_pitch"],
        "b": 2 * n * plan.columns,
        "t": 2 * m * plan.columns,
        "z": 4 * sums * m * at["z_columns"],
        "s": 2 * m * plan.columns,
        "g_a": 4 * plan.dlora_a_splits * plan.columns * k,
        "g_b": 4 * plan.dlora_b_splits * plan.columns * n,
    }
    return {name: (at[name], size) for name, size in sizes.items() if at[name] != NONE}


def check_workspace(found, workspace):
    end = 0
    for offset, size in sorted(found.values()):
        assert size > 0 and offset % 256 == 0 and offset >= end, found
        end = offset + size
    assert end <= workspace


def check_grids(problem, plan):
    columns = _C.plan_numbers(plan).get("z_columns", 0)
    assert blocks_of(problem.m, 64) <= MOST_X and blocks_of(columns, 64) <= MOST_YZ
    assert 0 <= plan.shrink_splits <= MOST_YZ
    assert 0 <= plan.panels <= MOST_X
    # lora_wgrad has the splits of both products in one dimension, lora_dsdb those of dB.
    assert plan.dlora_a_splits + plan.dlora_b_splits <= MOST_YZ
    assert blocks_of(max(problem.n, problem.k), 128) <= MOST_X
    assert blocks_of(plan.columns, 64) <= MOST_YZ


def check_gemm(problem, plan, at, card, backward):
    """Of lora_gemm, where there is one."""
    if plan.blocks == 0:
        assert backward and not problem.need_dx
        return
    assert at["shared"] <= card.shared_per_block
    width = problem.k if backward else problem.n
    tiles = blocks_of(problem.m, at["rows"]) * blocks_of(width, at["columns"])
    assert 1 <= plan.blocks <= 3 * card.sms and tiles <= MOST_X
    if plan.wgmma:
        # Pitches of tensor maps: of operands as aligned promises, and of what is in the workspace.
        assert problem.aligned and problem.aligned_weight and not plan.hybrid
        for pitch in (plan.columns, at["a_pitch"]):
            assert 2 * pitch % 16 == 0 and 2 * pitch < 2**40
        if at["b"] == NONE:
            assert problem.aligned_b and problem.rank % 8 == 0
        if at["a"] == NONE:
            assert problem.aligned_a


def check(problem, card, backward):
    for _, plan in plans_of(problem, card, backward):
        if not plan.kernel:
            continue
        at = _C.plan_numbers(plan)
        check_workspace(regions(problem, plan, at), plan.workspace)
        check_grids(problem, plan)
        check_gemm(problem, plan, at, card, backward)


@settings(deadline=None, max_examples=200)
@given(problems(), st.sampled_from(sorted(CARDS)), st.booleans())
def test_a_plan_fits_its_card(problem, card, backward):
    check(problem, CARDS[card], backward)


def tables_of_many(problem, plan, at, groups, kind, backward):
    """Name -> offset, bytes, as csrc/kernels/lora_grouped.h describes them. One is only too small
    where 256 bytes, by which they are rounded, do not hide it."""
    listed, experts = kind == "list", kind == "experts"
    if plan.tile == "decode":
        found = decode_regions(problem, plan, at)
        return found | ({"entries": (at["entries"], 40 * groups)} if listed else {})
    m, n, k, rank, taken = problem.m, problem.n, problem.k, problem.rank, min(groups, problem.m)

    def most_pieces(rows, adapters):
        return (m - adapters) // rows + adapters

    assert at["tile_count"] >= most_pieces(64, taken)
    # Rows without an expert have tiles, too.
    assert at["row_tile_count"] >= most_pieces(128, min(groups + 1, m))
    assert at["piece_count"] >= most_pieces(at["piece_rows"], taken)
    several = min(groups, m // (at["piece_rows"] + 1))  # adapters with more than one piece
    assert at["slots"] >= (most_pieces(at["piece_rows"], several) if several else 0)
    sizes = {
        "entries": 40 * groups * (2 if backward else 1),
        "ranks": 4 * groups,
        "order": 4 * m,
        "counts": 4 * (groups + 1) * blocks_of(m, 256),
        "segments": 20 * (groups + 1),
        "first": 4 * (blocks_of(m, 128) + 1),
        "tiles": 16 * at["tile_count"],
        "row_tiles": 16 * at["row_tile_count"],
        "pieces": 16 * at["piece_count"],
        "sums": 8 * groups,
        "t": 2 * m * plan.columns,
        "z": 4 * plan.shrink_splits * m * at["z_columns"],
        "s": 2 * m * plan.columns,
        "g_a": 4 * at["slots"] * rank * k,
        "g_b": 4 * at["slots"] * rank * n,
    }
    absent = set() if backward else {"s", "g_a", "g_b"}
    absent |= {"ranks"} if listed else {"entries"}
    absent |= {"order", "counts"} if experts else {"row_tiles"}
    # One launch writes both.
    has_gradients = listed and backward
    assert at["gradient_entries"] == (at["entries"] + 40 * groups if has_gradients else NONE)
    assert absent == {name for name in sizes if at[name] == NONE}
    # Of no slots there are no partial sums.
    return {name: (at[name], size) for name, size in sizes.items() if at[name] != NONE and size}


def test_many_adapters_have_room_for_their_tables_at_every_number_of_them():
    """Also where all but the last entry of a table fill 256 bytes: 64 adapters, 8192 rows, or as
    many tiles of few rows as there are adapters here."""
    tiles = set()
    for groups, m, kind, backward in product(
        range(1, 131), (1, 9, 65, 257, 640, 8192), ("pool", "list", "experts"), (False, True)
    ):
        problem = _C.Problem(m, 64 * groups, 72, 16)
        asked = {"backward": backward, "choice": "kernel", "groups": groups}
        asked |= {"listed": kind == "list", "own_weights": kind == "experts"}
        plan = _C.plan_as_asked(CARDS["A100"], problem, **asked)
        found = tables_of_many(problem, plan, _C.plan_numbers(plan), groups, kind, backward)
        check_workspace(found, plan.workspace)
        tiles.add(plan.tile)
    assert tiles >= {"decode", "128 x 64", "128 x 128"}


# Beyond any memory, where only the numbers could go wrong.
far = st.one_of(st.integers(2**28, 2**31), st.integers(1, 3), st.sampled_from([2**30, 2**30 + 1]))


@settings(deadline=None, max_examples=200)
@given(far, far, far, st.integers(1, 600), st.sampled_from(sorted(CARDS)), st.booleans())
def test_sizes_beyond_any_memory_are_planned_or_refused(m, n, k, rank, card, backward):
    check(_C.Problem(m, n, k, rank), CARDS[card], backward)
