"""The autotune cache without a GPU: its files, and what the planner makes of them."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import lora_ext
from lora_ext import _C, autotune, measure
from lora_ext.autotune import planner_cache, trial
from lora_ext.autotune.cache_file import SCHEMA

CARD = "A card of the tests"
H100 = (90, 132, 233472, 232448)
SHAPE = autotune.Shape(2048, 4096, 1024, 16)


def entry(shape=SHAPE, backward=False, route="kernel", tile="128 x 128", us=None):
    return autotune.Entry(shape, backward, route, tile, us or {"library": 2.0})


def cache(*entries):
    return planner_cache.empty_cache(CARD).with_entries(entries)


def use(*entries):
    planner_cache.use(cache(*entries), Path("a.json"))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The user's folder of cache files."""
    monkeypatch.setattr(planner_cache, "user_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_known_before_or_after():
    _C.replace_autotune_cache(CARD, [])
    yield
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
    use(entry())
    plan = planned()
    assert plan.kernel and not plan.hybrid and plan.tile == "128 x 128"
    assert plan.reason == "fastest as measured on this GPU, in a.json"
    use(entry(route="hybrid", tile=""))
    assert planned().hybrid
    use(entry(SHAPE, True, "library", ""))
    backward = planned(backward=True)
    assert not backward.kernel and backward.reason.startswith("fastest as measured")


@pytest.mark.parametrize(
    "tile", _C.tiles_of(_C.Card(*H100), backward=False, float_adapters=False, dropout=False)
)
def test_every_tile_can_win(tile):
    shape = moved(rows=40) if tile == "decode" else SHAPE
    use(entry(shape, tile=tile))
    assert planned(shape).tile == tile


def test_what_wins_with_few_rows_wins_for_no_more_than_it_can_take():
    few = moved(rows=40)
    use(entry(few, tile="decode"))
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
    use(entry())
    assert "measured" in planned().reason and "measured" not in planned(**other).reason


def test_rows_that_are_no_whole_chunks_were_measured_so():
    """Of a rank of 4, rows of a half lora_b are 8 bytes; of float32 ones 16."""
    small, wide = moved(rank=4), moved(rank=4, float_adapters=True)
    use(entry(small), entry(wide))
    assert "measured" in planned(small, aligned_b=False).reason
    assert "measured" not in planned(small).reason
    assert "measured" in planned(wide).reason
    odd = moved(in_features=4100)
    use(entry(odd, route="hybrid", tile=""))
    unaligned = {"aligned": False, "aligned_weight": False, "aligned_a": False}
    assert "measured" in planned(odd, **unaligned).reason and "measured" not in planned(odd).reason


@pytest.mark.parametrize("need", ["need_dx", "need_dlora_a", "need_dlora_b"])
def test_entries_of_backward_are_those_of_all_gradients(need):
    use(entry(backward=True), entry())
    assert "measured" in planned(backward=True).reason
    assert "measured" not in planned(backward=True, **{need: False}).reason
    assert "measured" in planned(**{need: False}).reason  # forward has none


def test_what_the_user_asks_for_goes_before_what_was_measured():
    use(entry())
    assert planned(choice="hybrid").hybrid
    assert planned(choice="library").reason == "the library route was asked for"


def test_a_tile_that_the_card_does_not_have_is_not_taken():
    use(entry(tile="128 x 128"))
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
    use(*(entry(moved(rows=m), tile=tile) for m, tile in won.items()))
    plan = planned(moved(rows=rows))
    nearest = min(sorted(measured), key=lambda m: max(m, rows) / min(m, rows))
    assert measure.near(rows, tuple((m, m) for m in sorted(measured))) == nearest
    if nearest > 2 * rows or rows > 2 * nearest:
        assert "measured" not in plan.reason
    else:
        assert "measured" in plan.reason and plan.tile == won[nearest]


def test_a_cache_survives_its_file(tmp_path):
    written = cache(entry(), entry(backward=True), entry(moved(rows=7, dropout=True)))
    path = tmp_path / "new" / "folder" / "cache.json"
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
    shape = vars(SHAPE)
    one = {"shape": shape, "backward": False, "route": "kernel", "tile": "128 x 64", "us": {}}
    document = {"schema": SCHEMA, "card": CARD, "versions": "2", "entries": [one]}
    yield "expected JSON", "{ half a docu"
    yield "expected JSON", "\ufeff{}"
    for text in ([], *({**document, name: 1} for name in document)):
        yield f"an object of schema '{SCHEMA}', but got", json.dumps(text)
    for change, words in (
        ({"shape": {**shape, "rows": 0}}, "sizes of at least 1"),
        ({"shape": {**shape, "rows": 2**40}}, "below 2.40"),
        ({"shape": {**shape, "rows": 1.5}}, "sizes of at least 1"),
        ({"shape": {**shape, "dropout": "no"}}, "incompatible"),
        ({"shape": {}}, "missing 4 required"),
        ({"shape": 1}, "must be a mapping"),
        ({"speed": 1}, "unexpected keyword argument 'speed'"),
        ({"route": "auto"}, "auto is no route"),
        ({"route": "other"}, "expected one of auto, hybrid, kernel, library, but got other"),
        ({"route": None}, "incompatible"),
        ({"tile": "1 x 1"}, "no tile 1 x 1"),
        ({"us": [1.0]}, "has no attribute 'items'"),
        ({"us": {"library": "fast"}}, "could not convert string to float"),
        ({"us": {"library": 10**400}}, "too large"),
    ):
        text = json.dumps({**document, "entries": [one | change]})
        yield f"(?s)expected an entry, but got .*{words}", text


@pytest.mark.parametrize(("words", "text"), list(spoiled()))
def test_what_is_no_cache_file_is_ignored_with_a_word(words, text, folder):
    path = planner_cache.user_file(CARD)
    path.write_text(text)
    with pytest.raises(autotune.CacheError, match=words):
        autotune.read_cache(path)
    with pytest.warns(UserWarning, match=r"lora_ext ignores the autotune cache in .*\.json"):
        planner_cache.load_user_caches()
    assert "measured" not in planned().reason


@pytest.mark.parametrize("change", [{}, {"versions": "torch 1.0"}, {"card": "Another card"}])
def test_caches_are_read_and_those_of_others_are_not(change, folder):
    written = replace(cache(entry()), **change)
    autotune.write_cache(written, planner_cache.user_file(CARD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planner_cache.load_user_caches()
    for name in (CARD, "Another card"):
        assert ("measured" in planned(name=name).reason) == (not change and name == CARD)


@pytest.mark.parametrize("folder", ["missing", None])
def test_without_a_folder_or_a_home_there_are_no_caches(folder, monkeypatch, tmp_path):
    def home():
        if folder is None:
            raise RuntimeError("Could not determine home directory.")
        return tmp_path / folder

    monkeypatch.setattr(Path, "home", home)
    planner_cache.load_user_caches()
    assert "measured" not in planned().reason


def test_import_reads_the_user_s_caches(tmp_path):
    if not _C.with_cuda:
        pytest.skip("the build has no CUDA kernels")
    mine = cache(entry())
    path = planner_cache.user_file(CARD).relative_to(Path.home())
    autotune.write_cache(mine, tmp_path / path)
    code = f"import lora_ext; from lora_ext import _C; card = _C.Card(*{H100}, {CARD!r});"
    code += "print(_C.plan_forward(card, _C.Problem(2048, 1024, 4096, 16)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": ""},
    )
    assert "fastest as measured" in done.stdout, done.stderr


def test_where_choices_must_be_reproducible_nothing_measured_counts(deterministic):
    use(entry())
    assert planned().predicted_us and "measured" not in planned().reason


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


@pytest.mark.parametrize(("card", "forward", "masked"), [("A100", 2, 2), ("H100", 4, 4)])
def test_candidates_are_what_the_card_can_do(card, forward, masked):
    shape = moved(dropout=True)
    in_forward, in_backward = (
        [c.name for c in trial.candidates_for(lora_ext.kernels.CARDS[card], shape, backward)]
        for backward in (False, True)
    )
    assert in_forward[:2] == ["library", "hybrid"] and len(in_forward) == 2 + forward
    assert "kernel 128 x 128" in in_backward and len(in_backward) == 2 + masked
