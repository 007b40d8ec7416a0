"""Grouped rows, an adapter for each row: y, the gradients dx, dA, dB of each adapter, dropout."""

import math
from dataclasses import replace
from types import SimpleNamespace

import op_calls
import pytest
import torch
from helpers import BF16, DTYPE_PAIRS, EMULATED, F16, F32, F64, leaf, max_error, pair_id, short
from many_helpers import (
    KINDS,
    RANKS,
    assert_at_most_twice,
    assert_equal,
    make_many,
    run,
    run_loop,
    sliced,
)
from torch.autograd import gradcheck

import lora_ext
from lora_ext import _C, reference
from lora_ext.call import op

# Segments of few rows, of many, of more than a piece; columns that are no multiple of anything.
SHAPES = [(1, 40, 24), (9, 129, 95), (67, 64, 257), (450, 130, 70)]

pairs = pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
kinds = pytest.mark.parametrize("kind", KINDS)
dropouts = pytest.mark.parametrize("dropout_p", [0.0, 0.3])


def not_by_torch(isa):
    """torch's own products have other bits for other rows, or threads."""
    if isa == "library":
        pytest.skip("the bits of torch's products are not ours")


def has_half_pairs(isa, pair, dtype=None) -> bool:
    """Where a float32 product runs as pairs of bfloat16 terms, exact to 2^-17 each."""
    return (isa == "amx" or EMULATED) and BF16 in (pair[0], dtype)


def check_errors(many, dropout_p, pair, isa, given=None):
    theirs, exact = (run_loop(many, dropout_p, dtype=dtype) for dtype in (None, F64))
    half_pairs = has_half_pairs(isa, pair, given)
    assert_at_most_twice(run(many, dropout_p), theirs, exact, pair, half_pairs)


# ---- values ----


@pairs
@dropouts
@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_y_and_gradients_dx_da_db_with_and_without_dropout(
    isa, device, pair, dropout_p, kind, shape
):
    """Of grouped rows: errors at most twice those of a loop over the adapters."""
    many = make_many(*shape, pair=pair, device=device, kind=kind)
    check_errors(many, dropout_p, pair, isa)


@pairs
@dropouts
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=short)
@pytest.mark.parametrize("rows", [9, 120])
def test_update_of_a_given_y_of_another_dtype(isa, device, pair, dropout_p, dtype, rows):
    many = make_many(rows, 65, 33, pair=pair, device=device, given=dtype, bias=False)
    check_errors(many, dropout_p, pair, isa, dtype)


@pairs
@kinds
@pytest.mark.parametrize("rows", [3, 60, 300])
def test_integers_are_exact(isa, device, pair, kind, rows):
    """Small integers, which no dtype rounds: a row, a term or an adapter taken twice, or not at
    all, shows."""
    given = pair[0]
    many = make_many(
        rows, 24, 20, pair=pair, device=device, kind=kind, given=given, bias=False, integers=1
    )
    # Of few terms, so that sums over the rows stay below 2^8 in bfloat16.
    sparse = (torch.arange(rows, device=device) % 8 == 0)[:, None]
    many = replace(many, grad=torch.where(sparse, many.grad, 0))
    assert_equal(run(many), run_loop(many, dtype=F64))


@pytest.mark.parametrize("ranks", [(64, 1), (200, 40, 3), (512, 16)], ids=str)
@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32)], ids=pair_id)
@pytest.mark.parametrize("rows", [7, 70])
def test_large_ranks(isa, device, ranks, pair, rows):
    many = make_many(rows, 96, 80, ranks, pair, device)
    check_errors(many, 0.1, pair, isa)


@pytest.mark.parametrize(
    ("kind", "pair"), [("mixed", (F32, F32)), ("ranges", (BF16, BF16))], ids=["mixed", "ranges"]
)
def test_a_thousand_adapters_of_one_row_each(isa, device, kind, pair):
    """5 chunks of rows of 1031 numbers: more counts than a scan on a GPU takes at once, 4096."""
    many = make_many(1030, 33, 20, [1 + g % 5 for g in range(1030)], pair, device)
    order = torch.randperm(1030, generator=torch.Generator().manual_seed(0))
    index = order if kind == "mixed" else torch.arange(1030)
    many = replace(many, index=index.int().to(device))
    check_errors(many, 0.0, pair, isa)


@dropouts
@pytest.mark.parametrize("update", [False, True], ids=["linear", "update"])
def test_gradcheck(device, dropout_p, update):
    many = make_many((2, 5), 7, 6, (3, 1, 2), (F64, F64), device, given=F64 if update else None)
    seed = torch.tensor(9, device=device)
    base = leaf(many.y) if update else leaf(many.bias)
    count = len(many.lora_a)

    def call(base, x, *factors):
        groups = (many.scaling, many.index, None, None)
        lists = (factors[:count], factors[count:])
        if update:
            return op_calls.lora_update_grouped(base, x, *lists, groups, dropout_p, seed)
        return op_calls.lora_linear_grouped(x, many.weight, *lists, groups, base, dropout_p, seed)

    leaves = [leaf(t) for t in (*many.lora_a, *many.lora_b)]
    assert gradcheck(call, (base, leaf(many.x), *leaves))


def test_two_lists_may_share_factors(device):
    """One adapter named twice has the sum of both gradients."""
    many = make_many(30, 16, 12, (3, 3), (F64, F64), device, kind="ranges")
    a, b = leaf(many.lora_a[0]), leaf(many.lora_b[0])
    y = lora_ext.lora_linear(many.x, many.weight, [a, a], [b, b], None, 2.0, index=many.index)
    y.backward(many.grad)
    once = replace(many, index=many.index.clamp(max=0), bias=None, scaling=torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(a.grad, run(once)["dlora_a[0]"])


# ---- an adapter is alone with its rows ----


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=pair_id)
@pytest.mark.parametrize("rows", [11, 130, 500])
def test_each_adapter_has_the_bits_of_training_without_the_others(isa, device, pair, rows):
    not_by_torch(isa)  # its rows lie at another address
    many = make_many(rows, 65, 48, pair=pair, device=device, given=pair[0], bias=False)
    together = run(many)
    for g in range(len(RANKS)):
        mine = (many.index == g).nonzero().flatten()
        alone = run(
            replace(
                many,
                x=many.x[mine],
                y=many.y[mine],
                grad=many.grad[mine],
                lora_a=[many.lora_a[g]],
                lora_b=[many.lora_b[g]],
                scaling=many.scaling[g : g + 1],
                index=torch.zeros(len(mine), dtype=torch.int32, device=device),
            )
        )
        assert torch.equal(together["y"][mine], alone["y"])
        assert torch.equal(together["dx"][mine], alone["dx"])
        assert torch.equal(together[f"dlora_a[{g}]"], alone["dlora_a[0]"])
        assert torch.equal(together[f"dlora_b[{g}]"], alone["dlora_b[0]"])


@pytest.mark.parametrize("kind", ["ranges", "mixed"])
@pytest.mark.parametrize("rows", [9, 130])
def test_where_the_rows_lie_changes_no_bit_of_them(isa, device, kind, rows):
    not_by_torch(isa)
    many = make_many(rows, 65, 48, device=device, kind=kind, given=F32, bias=False)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(5)).to(device)
    names = ("x", "y", "grad", "index")
    moved = replace(many, **{name: getattr(many, name)[order] for name in names})
    before, after = run(many), run(moved)
    assert torch.equal(after["y"], before["y"][order])
    assert torch.equal(after["dx"], before["dx"][order])


@pytest.mark.parametrize("rows", [9, 130])
@pytest.mark.parametrize("where", ["lora_a", "lora_b", "both"])
def test_nan_of_an_adapter_reaches_its_own_rows_alone(isa, device, rows, where):
    """Megatron-Bridge#5768: an idle slot can make backward unsafe."""
    many = make_many(rows, 40, 24, (4, 5, 16, 3), device=device, given=F32, bias=False)
    many = replace(many, index=many.index.masked_fill(many.index == 3, -1))  # 3 is idle
    clean = run(many)
    for bad in (1, 3):
        broken = many.each_factor(torch.clone)
        if where != "lora_b":
            broken.lora_a[bad].fill_(math.nan)
        if where != "lora_a":
            broken.lora_b[bad].fill_(math.inf)
        ours = run(broken)
        others = many.index != bad
        assert torch.equal(ours["y"][others], clean["y"][others])
        assert torch.equal(ours["dx"][others], clean["dx"][others])
        for g in {0, 1, 2, 3} - {bad}:
            assert torch.equal(ours[f"dlora_a[{g}]"], clean[f"dlora_a[{g}]"])
            assert torch.equal(ours[f"dlora_b[{g}]"], clean[f"dlora_b[{g}]"])
        if bad == 1:
            assert not ours["y"][many.index == 1].isfinite().all()
        else:
            assert ours["dlora_a[3]"].count_nonzero() == 0


# ---- dropout ----


@pytest.mark.parametrize("kind", ["ranges", "mixed"])
@pytest.mark.parametrize("rows", [9, 130])
def test_dropped_elements_do_not_propagate_nan(isa, device, kind, rows):
    many = make_many(rows, 40, 24, device=device, kind=kind, given=F32, bias=False)
    mask = lora_ext.functional.dropout_mask(1, rows, 40, 0.5, device=device)
    x = many.x.clone()
    x[~mask] = math.nan
    ours = run(replace(many, x=x), 0.5)
    assert all(value.isfinite().all() for value in ours.values())
    assert_equal(ours, run(many, 0.5))


@pytest.mark.parametrize("offset", [(0, 0), (3, 32), (2**40, 5)], ids=str)
def test_offsets_name_a_part_of_the_whole_mask(isa, device, offset):
    """Each row's mask is that of its place in x, wherever its adapter's rows lie."""
    many = make_many(60, 40, 24, (2, 3), device=device, kind="mixed", given=F32, integers=1)
    p, (row, col) = 0.5, offset
    mask = lora_ext.functional.dropout_mask(1, 60, 40, p, row, col, device=device)
    kept = replace(many, x=torch.where(mask, 2 * many.x, 0))
    ours, wanted = run(many, p, 1, row, col), run(kept)
    assert torch.equal(ours["y"], wanted["y"])
    assert torch.equal(ours["dx"], torch.where(mask, 2 * wanted["dx"], 0))
    for g in range(2):
        assert torch.equal(ours[f"dlora_a[{g}]"], wanted[f"dlora_a[{g}]"])


@pytest.mark.parametrize("capturing", [False, True])
def test_a_sequence_of_scalings_is_copied_to_a_card_without_waiting(capturing, monkeypatch):
    """In a capture as ever: torch refuses it, since replays would read the memory again."""
    asked = []
    copied = SimpleNamespace(to=lambda device, **words: asked.append((device, words)))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        torch, "tensor", lambda numbers, **words: asked.append((numbers, words)) or copied
    )
    x = SimpleNamespace(is_cuda=True, device="cuda:1", dtype=torch.bfloat16)
    op._scaling("lora_linear", [1.0, 2.0], 2, x)
    assert asked == [
        ([1.0, 2.0], {"dtype": torch.float32, "device": "cpu", "pin_memory": not capturing}),
        ("cuda:1", {"non_blocking": not capturing}),
    ]


@pytest.mark.parametrize("update", [False, True], ids=["linear", "update"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-14), (F32, 1e-5)], ids=["f64", "f32"])
def test_a_scaling_for_all_or_for_each(device, update, dtype, tolerance):
    """A number, the default, one each; float64 keeps what float32 would round."""
    given = dtype if update else None
    many = make_many(20, 16, 24, (2, 3), (dtype, dtype), device, given=given)
    name = "lora_update" if given else "lora_linear"
    each = torch.tensor([0.1, 0.3], dtype=dtype, device=device)
    for scaling in ({"scaling": 0.1}, {}, {"scaling": [0.1, 0.3]}, {"scaling": each}):
        arguments = many.arguments
        del arguments["scaling"]
        ours = getattr(lora_ext, name)(**arguments, **scaling)
        wanted = getattr(reference, f"{name}_reference")(**arguments, **scaling)
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


def test_dropout_does_not_round_x_beside_a_wide_y(isa, device):
    many = make_many(40, 64, 24, (2, 3), (BF16, BF16), device, given=F32)
    ours, exact = run(many, 0.3), run_loop(many, 0.3, dtype=F64)
    assert max_error(ours["y"], exact["y"]) <= 1e-5 * exact["y"].abs().max()


# ---- the same bits ----


@pytest.mark.parametrize("kind", ["ranges", "mixed"])
@pytest.mark.parametrize("rows", [40, 700])
def test_the_number_of_threads_changes_no_bit(isa, kind, rows):
    not_by_torch(isa)
    many = make_many(rows, 260, 300, (16, 8, 3, 40, 16), kind=kind, given=F32, bias=False)
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        runs += [run(many, 0.2), run(many, 0.2)]
    for other in runs[1:]:
        assert_equal(runs[0], other)


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=pair_id)
@pytest.mark.parametrize("rows", [6, 90])
@pytest.mark.parametrize("ranks", [(4, 16, 7), (16, 16, 16)], ids=["ranks", "all of one rank"])
def test_a_pool_has_the_bits_of_a_list(isa, device, pair, rows, ranks):
    """Slots of different ranks, or without ranks; free ones whose factors are NaN, and NaN beyond
    the ranks. The list has the pool's own memory, whose strides torch's products may look at."""
    many = make_many(rows, 40, 24, ranks, pair, device, given=pair[0], bias=False)
    slots, places = 5, (4, 0, 2)
    pool_a = many.x.new_full((slots, 16, 40), math.nan, dtype=pair[1])
    pool_b = many.x.new_full((slots, 24, 16), math.nan, dtype=pair[1])
    in_use = torch.zeros(slots, dtype=torch.int32, device=device)
    scaling = torch.ones(slots, device=device)
    for g, (slot, rank) in enumerate(zip(places, ranks, strict=True)):
        pool_a[slot, :rank], pool_b[slot, :, :rank] = many.lora_a[g], many.lora_b[g]
        in_use[slot], scaling[slot] = rank, many.scaling[g]
        many.lora_a[g], many.lora_b[g] = pool_a[slot, :rank], pool_b[slot, :, :rank]
    lists = run(many, 0.3)
    is_ranked = len(set(ranks)) > 1
    # -1 goes to a free slot, whose rank is 0
    table = torch.tensor([*places, 3 if is_ranked else -1], dtype=torch.int32, device=device)
    y, x, a, b = (leaf(t) for t in (many.y, many.x, pool_a, pool_b))
    seed = torch.tensor(1, device=device)
    groups = (scaling, table[many.index.long()], None, in_use if is_ranked else None)
    out = op_calls.lora_update_grouped(y, x, [a], [b], groups, 0.3, seed)
    out.backward(many.grad)
    assert torch.equal(out, lists["y"])
    assert torch.equal(x.grad, lists["dx"])
    for g, (slot, rank) in enumerate(zip(places, ranks, strict=True)):
        assert torch.equal(a.grad[slot, :rank], lists[f"dlora_a[{g}]"])
        assert torch.equal(b.grad[slot, :, :rank], lists[f"dlora_b[{g}]"])
        assert a.grad[slot, rank:].count_nonzero() == b.grad[slot, :, rank:].count_nonzero() == 0
    for slot in (1, 3):
        assert a.grad[slot].count_nonzero() == b.grad[slot].count_nonzero() == 0


@pytest.mark.parametrize("rows", [6, 90])
def test_a_pool_s_gradients_are_zero_beyond_each_rank(isa, rows, deterministic):
    """Though every slot has rows: torch fills memory that is not written with NaN here."""
    many = make_many(rows, 40, 24, (4, 16, 7), (F32, F32), kind="mixed", given=F32)
    index = (torch.arange(rows) % 3).int()
    a, b = leaf(torch.randn(3, 16, 40)), leaf(torch.randn(3, 24, 16))
    ranks = torch.tensor([4, 16, 7], dtype=torch.int32)
    groups = (torch.ones(3), index, None, ranks)
    op_calls.lora_update_grouped(many.y, many.x, [a], [b], groups).sum().backward()
    for slot, rank in enumerate(ranks.tolist()):
        assert a.grad[slot, :rank].all() and b.grad[slot, :, :rank].all()
        assert not a.grad[slot, rank:].any() and not b.grad[slot, :, rank:].any()


@pytest.mark.parametrize("rows", [5, 60])
def test_offs_have_the_bits_of_an_index(isa, device, rows):
    ends = torch.tensor([0, rows // 3, rows // 3, rows - 1], dtype=torch.int32, device=device)
    index = torch.bucketize(torch.arange(rows, device=device), ends, right=True).int()
    index[index == 4] = -1
    many = replace(make_many(rows, 40, 24, device=device), index=index)
    assert_equal(run(many, 0.3), run(many, 0.3, offs=ends))


# ---- layouts ----


def columns_first(matrix):
    return matrix.t().contiguous().t()


@pytest.mark.parametrize("rows", [6, 90])
@pytest.mark.parametrize("layout", ["strided x", "strided y", "transposed", "sliced", "expanded"])
def test_strides(isa, device, rows, layout):
    many = make_many(rows, 40, 24, (4, 16, 7), device=device, kind="mixed", given=F32, integers=2)
    wanted = run_loop(many, dtype=F64)
    many = {
        "strided x": lambda: replace(many, x=torch.cat([many.x] * 2, 1)[:, 40:]),
        "strided y": lambda: replace(many, y=columns_first(many.y), grad=columns_first(many.grad)),
        "transposed": lambda: many.each_factor(columns_first),
        "sliced": lambda: many.each_factor(sliced),
        "expanded": lambda: replace(many, index=many.index[:1].clamp(min=0).expand(rows)),
    }[layout]()
    if layout == "expanded":
        wanted = run_loop(many, dtype=F64)
    assert_equal(run(many), wanted)


@pytest.mark.parametrize("columns", [(100, 136), (136, 100)], ids=str)
def test_half_rows_that_are_a_slice_of_columns(isa, device, columns):
    """They begin at whole chunks of 16 bytes; those of dX, or of y, of 100 columns, do not."""
    many = make_many(70, *columns, pair=(BF16, BF16), device=device)
    named = {name: getattr(many, name) for name in ("x", "weight", "grad")}
    slices = {name: torch.cat([t] * 2, 1)[:, : t.shape[1]] for name, t in named.items()}
    check_errors(replace(many, **slices), 0.0, (BF16, BF16), isa)


@pytest.mark.parametrize("shape", [(0, 16, 24), (5, 0, 24), (5, 16, 0)], ids=str)
def test_nothing_to_compute(isa, device, shape):
    many = make_many(*shape, device=device, kind="mixed")
    assert_equal(run(many), run_loop(many))


@pytest.mark.skipif(EMULATED, reason="of the CPU's routes")
@pytest.mark.parametrize("kind", ["ranges", "mixed"])
@pytest.mark.parametrize("then", ["library", "portable"])
def test_a_backward_may_take_another_route_than_its_forward(kind, then):
    """S means the same on all of them."""
    many = make_many(130, 40, 24, kind=kind, given=F32, integers=2)
    try:
        for first, second in (("auto", then), (then, "auto")):
            _C.set_cpu_isa(first)
            leaves = [leaf(t) for t in (*many.lora_a, *many.lora_b)]
            lists = leaves[:4], leaves[4:]
            y = op_calls.lora_update_grouped(many.y, many.x, *lists, (many.scaling, many.index))
            _C.set_cpu_isa(second)
            y.backward(many.grad)
            wanted = run_loop(many, dtype=F64)
            for g in range(4):
                assert torch.equal(leaves[g].grad.double(), wanted[f"dlora_a[{g}]"])
                assert torch.equal(leaves[4 + g].grad.double(), wanted[f"dlora_b[{g}]"])
    finally:
        _C.set_cpu_isa("auto")
