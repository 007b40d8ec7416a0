"""The autotune cache without a GPU: its files, and what the planner makes of them."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import lora_ext
from lora_ext import _C, autotune, measure
from lora_ext.autotune import planner_cache, trial

CARD = "A card of the tests"
H100 = (90, 132, 233472, 232448)
SHAPE = autotune.Shape(2048, 4096, 1024, 16)


def entry(shape=SHAPE, backward=False, route="kernel", tile="128 x 128", us=None):
    return autotune.Entry(shape, backward, route, tile, us or {"library": (2.0, 1.0, 3.0)})


def cache(*entries, card=CARD):
    return planner_cache.empty_cache(card).with_entries(entries)


@pytest.fixture(autouse=True)
def nothing_known_before_or_after():
    _C.replace_autotune_cache(CARD, [])
    yield
    planner_cache.pinned.clear()
    _C.replace_autotune_cache(CARD, [])


def planned(shape=SHAPE, backward=False, choice="auto", name=CARD, **changes):
    problem = _C.Problem(shape.rows, shape.out_features, shape.in_features, shape.rank)
    problem.float_adapters, problem.dropout = shape.float_adapters, shape.dropout
    for field, value in changes.items():
        setattr(problem, field, value)
    plan = _C.plan_backward if backward else _C.plan_forward
    return plan(_C.Card(*H100, name), problem, choice)


def moved(**changes):
    return autotune.Shape(**{**vars(SHAPE), **changes})


def test_the_planner_takes_the_fastest_route_and_says_so():
    before = planned()
    assert not before.kernel and "predicted" in before.reason
    planner_cache.install([cache(entry())])
    plan = planned()
    assert plan.kernel and not plan.hybrid and plan.tile == "128 x 128"
    assert plan.reason == f"fastest as measured on this GPU with torch {torch.__version__}"
    planner_cache.install([cache(entry(route="hybrid", tile=""))])
    assert planned().hybrid
    planner_cache.install([cache(entry(SHAPE, True, "library", ""))])
    backward = planned(backward=True)
    assert not backward.kernel and backward.reason.startswith("fastest as measured")


@pytest.mark.parametrize(
    "tile", _C.tiles_of(_C.Card(*H100), backward=False, float_adapters=False, dropout=False)
)
def test_every_tile_can_win(tile):
    shape = moved(rows=40) if tile == "decode" else SHAPE
    planner_cache.install([cache(entry(shape, tile=tile))])
    assert planned(shape).tile == tile


def test_what_wins_with_few_rows_wins_for_no_more_than_it_can_take():
    few = moved(rows=40)
    planner_cache.install([cache(entry(few, tile="decode"))])
    assert "measured" in planned(moved(rows=64)).reason
    assert "measured" not in planned(moved(rows=65)).reason


LAYOUTS = ("aligned", "aligned_weight", "aligned_a", "aligned_b", "factor_rows", "weight_row_major")


@pytest.mark.parametrize(
    "other",
    [
        {"shape": moved(in_features=4104)},
        {"shape": moved(out_features=1032)},
        {"shape": moved(rank=8)},
        {"shape": moved(float_adapters=True)},
        {"shape": moved(dropout=True)},
        {"backward": True},
        {"name": "Another card"},
        {"name": ""},
        *({name: False} for name in LAYOUTS),
    ],
    ids=str,
)
def test_what_was_not_measured_has_no_entry(other):
    planner_cache.install([cache(entry())])
    assert "measured" in planned().reason and "measured" not in planned(**other).reason


def test_rows_that_are_no_whole_chunks_were_measured_so():
    """Of a rank of 4, rows of a half lora_b are 8 bytes; of float32 ones 16."""
    small, wide = moved(rank=4), moved(rank=4, float_adapters=True)
    planner_cache.install([cache(entry(small), entry(wide))])
    assert "measured" in planned(small, aligned_b=False).reason
    assert "measured" not in planned(small).reason
    assert "measured" in planned(wide).reason
    odd = moved(in_features=4100)
    planner_cache.install([cache(entry(odd, route="hybrid", tile=""))])
    unaligned = {"aligned": False, "aligned_weight": False, "aligned_a": False}
    assert "measured" in planned(odd, **unaligned).reason and "measured" not in planned(odd).reason


@pytest.mark.parametrize("need", ["need_dx", "need_dlora_a", "need_dlora_b"])
def test_entries_of_backward_are_those_of_all_gradients(need):
    planner_cache.install([cache(entry(backward=True), entry())])
    assert "measured" in planned(backward=True).reason
    assert "measured" not in planned(backward=True, **{need: False}).reason
    assert "measured" in planned(**{need: False}).reason  # forward has none


def test_what_the_user_asks_for_goes_before_what_was_measured():
    planner_cache.install([cache(entry())])
    assert planned(choice="hybrid").hybrid
    assert planned(choice="library").reason == "the library route was asked for"


def test_a_tile_that_the_card_does_not_have_is_not_taken():
    planner_cache.install([cache(entry(tile="128 x 128"))])
    problem = _C.Problem(SHAPE.rows, SHAPE.out_features, SHAPE.in_features, SHAPE.rank)
    plan = _C.plan_forward(_C.Card(86, 72, 102400, 101376, CARD), problem)
    assert plan.kernel and plan.tile == "deep 128 x 128"


@given(
    measured=st.lists(st.integers(1, 10**6), min_size=1, max_size=6, unique=True),
    rows=st.integers(1, 10**6),
)
@example([8], 4)
@example([8], 16)
@example([8], 17)
@example([4, 16], 8)  # equally near: the fewer
@example([49, 1], 7)
def test_the_nearest_rows_within_a_factor_of_two_count(measured, rows):
    """By C++'s rule, and without a limit by Python's."""
    tiles = ("128 x 128", "128 x 64")
    won = {count: tiles[i % 2] for i, count in enumerate(measured)}
    planner_cache.install([cache(*(entry(moved(rows=m), tile=tile) for m, tile in won.items()))])
    plan = planned(moved(rows=rows))
    nearest = min(sorted(measured), key=lambda m: max(m, rows) / min(m, rows))
    assert measure.near(rows, tuple((m, m) for m in sorted(measured))) == nearest
    if nearest > 2 * rows or rows > 2 * nearest:
        assert "measured" not in plan.reason
    else:
        assert "measured" in plan.reason and plan.tile == won[nearest]


def test_a_cache_survives_its_file(tmp_path):
    written = cache(entry(), entry(backward=True), entry(moved(rows=7, dropout=True)))
    path = planner_cache.file_of(written, tmp_path / "new" / "folder")
    autotune.write_cache(written, path)
    assert autotune.read_cache(path) == written
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    more = written.with_entries([entry(tile="128 x 64")])
    autotune.write_cache(more, path)
    assert autotune.read_cache(path) == more and len(more.entries) == 3
    assert autotune.read_cache(path).entries[0].tile == "128 x 64"


def test_a_write_that_fails_leaves_the_old_cache(tmp_path, monkeypatch):
    path = tmp_path / "cache.json"
    autotune.write_cache(cache(entry()), path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_ext.autotune.cache_file.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        autotune.write_cache(cache(entry(), entry(backward=True)), path)
    assert autotune.read_cache(path) == cache(entry()) and list(tmp_path.iterdir()) == [path]


def test_two_that_write_at_once_leave_one_whole_cache(tmp_path, monkeypatch):
    """As two processes that warm up: the second begins and ends before the first is done."""
    path, replace_file = tmp_path / "cache.json", os.replace
    first, second = cache(entry()), cache(entry(), entry(backward=True))
    replaced = []

    def meanwhile(source, target):
        replaced.append(target)
        monkeypatch.setattr(os, "replace", replace_file)
        autotune.write_cache(second, path)
        assert autotune.read_cache(path) == second
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    autotune.write_cache(first, path)
    assert [*map(str, replaced)] == [str(path)], "readers find no cache between two steps"
    assert autotune.read_cache(path) == first and list(tmp_path.iterdir()) == [path]


def spoiled():
    us = {"library": [1.0, 1.0, 1.0]}
    one = {**vars(SHAPE), "backward": False, "route": "kernel", "tile": "128 x 64", "us": us}
    made = {"card": CARD, "torch": "2", "driver": "13.0", "lora_ext": "0", "build": "0f"}
    document = {"schema": "lora_ext.autotune", "schema_version": 1, **made, "entries": [one]}
    yield "expected JSON", "{ half a docu"
    yield "expected JSON", "\ufeff{}"
    yield "an object with 'schema'", "[]"
    yield "lora_ext.autotune version 1", json.dumps({**document, "schema_version": 2})
    yield "lora_ext.autotune version 1", json.dumps({**document, "schema": "another"})
    yield "'build'", json.dumps({**document, "build": 1})
    yield "'entries'", json.dumps({**document, "entries": {}})
    yield "two", json.dumps({**document, "entries": [one, one]})
    for change, words in (
        ({"rows": 0}, "sizes of at least 1"),
        ({"rows": 2**40}, "below 2.40"),
        ({"rows": True}, "'rows'"),
        ({"rows": 1.5}, "'rows'"),
        ({"dropout": 1}, "'dropout'"),
        ({"route": "auto"}, "auto is no route"),
        ({"route": "other"}, "expected one of auto, hybrid, kernel, library, but got other"),
        ({"tile": "1 x 1"}, "no tile 1 x 1"),
        ({"us": {"library": [1.0]}}, "three times"),
        ({"us": {"library": [1.0, "fast", 1.0]}}, "a time"),
    ):
        yield words, json.dumps({**document, "entries": [{**one, **change}]})


@pytest.mark.parametrize(("words", "text"), list(spoiled()))
def test_what_is_no_cache_file_is_ignored_with_a_word(words, text, tmp_path):
    path = planner_cache.file_of(cache(), tmp_path)
    path.write_text(text)
    with pytest.raises(autotune.CacheError, match=words):
        autotune.read_cache(path)
    with pytest.warns(UserWarning, match=r"lora_ext ignores the autotune cache in .*\.json"):
        assert autotune.load_cached(tmp_path) == []
    assert "measured" not in planned().reason


def test_caches_are_read_and_those_of_other_versions_are_not(tmp_path):
    mine = cache(entry())
    autotune.write_cache(mine, planner_cache.file_of(mine, tmp_path))
    for change in ({"torch": "1.0"}, {"card": "Older driver", "driver": "11.0"},
                   {"card": "Older build", "build": "0f"}):  # fmt: skip
        old = replace(mine, **change)
        autotune.write_cache(old, planner_cache.file_of(old, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert autotune.load_cached(tmp_path) == [mine]
        assert autotune.load_cached(tmp_path / "missing") == []
    assert "measured" in planned().reason


def test_a_cache_under_another_s_name_is_ignored_with_a_word(tmp_path):
    other = cache(entry(), card="Another card")
    autotune.write_cache(other, planner_cache.file_of(cache(), tmp_path))
    with pytest.warns(UserWarning, match="it was measured on Another card"):
        assert autotune.load_cached(tmp_path) == []


def test_import_reads_the_user_s_caches(tmp_path):
    if not _C.with_cuda:
        pytest.skip("the build has no CUDA kernels")
    mine = cache(entry())
    folder = tmp_path / ".cache" / "lora_ext" / "autotune"
    autotune.write_cache(mine, planner_cache.file_of(mine, folder))
    code = f"import lora_ext; from lora_ext import _C; card = _C.Card(*{H100}, {CARD!r});"
    code += "print(_C.plan_forward(card, _C.Problem(2048, 1024, 4096, 16)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": ""},
    )
    assert "fastest as measured" in done.stdout, done.stderr


def test_where_choices_must_be_reproducible_only_pinned_entries_count(tmp_path, deterministic):
    mine = cache(entry())
    planner_cache.install([mine])
    assert planned().predicted_us and "measured" not in planned().reason
    planner_cache.pin(mine, tmp_path / "pinned.json")
    assert planned().tile == "128 x 128"
    assert planned().reason == f"fastest as measured on {CARD}, pinned by {tmp_path}/pinned.json"


def test_beside_a_pinned_file_the_cache_does_not_count(tmp_path):
    other = moved(rows=64)
    planner_cache.pin(cache(entry()), tmp_path / "pinned.json")
    cached = cache(entry(tile="128 x 64"), entry(other))
    autotune.write_cache(cached, planner_cache.file_of(cached, tmp_path))
    autotune.load_cached(tmp_path)
    assert planned().tile == "128 x 128" and "measured" not in planned(other).reason
    autotune.pin_cache(None)
    assert "measured" not in planned().reason
    autotune.load_cached(tmp_path)
    assert planned().tile == "128 x 64" and "measured" in planned(other).reason


# ---- how the fastest is found ----


@pytest.mark.parametrize(
    ("kernel", "fastest"),
    [
        ([8, 9, 8, 9], "kernel 128 x 64"),
        ([9.95, 9.95, 9.95, 9.95], "library"),  # half a percent
        ([5, 5, 10.5, 10.5], "library"),  # not in three rounds of four
        ([11, 12, 11, 12], "library"),
    ],
)
def test_the_library_stays_unless_another_is_clearly_faster(kernel, fastest):
    times = {"library": [10.0] * 4, "kernel 128 x 64": [float(t) for t in kernel]}
    assert measure.fastest(times, "library", trial._MOST_TIME)[0] == fastest


@pytest.mark.parametrize(("card", "forward", "masked"), [("A100", 2, 2), ("H100", 4, 5)])
def test_candidates_are_what_the_card_can_do(card, forward, masked):
    shape = moved(dropout=True)
    in_forward, in_backward = (
        [c.name for c in trial.candidates_for(lora_ext.kernels.CARDS[card], shape, backward)]
        for backward in (False, True)
    )
    assert in_forward[:2] == ["library", "hybrid"] and len(in_forward) == 2 + forward
    assert "kernel 128 x 128" in in_backward and len(in_backward) == 2 + masked
