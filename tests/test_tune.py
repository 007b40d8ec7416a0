"""Measured dispatch without a GPU: the tables, and what the planner makes of them."""

import contextlib
import json
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_ext
from lora_ext import _C, tune
from lora_ext.tune import __main__ as command
from lora_ext.tune import tables, trial

CARD = "A card of the tests"
H100 = (90, 132, 233472, 232448)
SHAPE = tune.Shape(2048, 4096, 1024, 16)


def entry(shape=SHAPE, backward=False, route="kernel", tile="128 x 128", us=None):
    return tune.Entry(shape, backward, route, tile, us or {"library": (2.0, 1.0, 3.0)})


def table(*entries, card=CARD):
    return tables.empty_table(card).with_entries(entries)


@pytest.fixture(autouse=True)
def nothing_known_before_or_after():
    _C.replace_winners(CARD, [])
    yield
    _C.replace_winners(CARD, [])


def planned(shape=SHAPE, backward=False, choice="auto", name=CARD, **changes):
    problem = _C.Problem(shape.rows, shape.out_features, shape.in_features, shape.rank)
    problem.float_adapters, problem.dropout = shape.float_adapters, shape.dropout
    for field, value in changes.items():
        setattr(problem, field, value)
    plan = _C.plan_backward if backward else _C.plan_forward
    return plan(_C.Card(*H100, name), problem, choice)


def moved(**changes):
    return tune.Shape(**{**vars(SHAPE), **changes})


def test_the_planner_takes_the_winner_and_says_so():
    before = planned()
    assert not before.kernel and "predicted" in before.reason
    tables.install([table(entry())])
    plan = planned()
    assert plan.kernel and not plan.hybrid and plan.tile == "128 x 128"
    assert plan.reason == f"fastest as measured on {CARD} with torch {torch.__version__}"
    tables.install([table(entry(route="hybrid", tile=""))])
    assert planned().hybrid
    tables.install([table(entry(SHAPE, True, "library", ""))])
    backward = planned(backward=True)
    assert not backward.kernel and backward.reason.startswith("fastest as measured")


@pytest.mark.parametrize(
    "tile", _C.tiles_of(_C.Card(*H100), backward=False, float_adapters=False, dropout=False)
)
def test_every_tile_can_win(tile):
    tables.install([table(entry(tile=tile))])
    assert planned().tile == tile


@pytest.mark.parametrize(
    "changes",
    [{"in_features": 4104}, {"out_features": 1032}, {"rank": 8}, {"float_adapters": True},
     {"dropout": True}],
    ids=str,
)  # fmt: skip
def test_another_layer_has_no_winner(changes):
    tables.install([table(entry())])
    assert "measured" not in planned(moved(**changes)).reason


def test_the_other_direction_and_another_card_have_no_winner():
    tables.install([table(entry())])
    assert "measured" not in planned(backward=True).reason
    assert "measured" not in planned(name="Another card").reason
    assert "measured" not in planned(name="").reason


@pytest.mark.parametrize(
    "change",
    ["aligned", "aligned_weight", "aligned_a", "aligned_b", "weight_row_major"],
)
def test_what_was_not_measured_has_no_winner(change):
    tables.install([table(entry())])
    assert "measured" not in planned(**{change: False}).reason


@pytest.mark.parametrize("need", ["need_dx", "need_dlora_a", "need_dlora_b"])
def test_winners_of_backward_are_those_of_all_gradients(need):
    tables.install([table(entry(backward=True), entry())])
    assert "measured" in planned(backward=True).reason
    assert "measured" not in planned(backward=True, **{need: False}).reason
    assert "measured" in planned(**{need: False}).reason  # forward has none


def test_what_the_user_asks_for_goes_before_what_was_measured():
    tables.install([table(entry())])
    assert planned(choice="hybrid").hybrid
    assert planned(choice="library").reason == "the library route was asked for"


def test_a_tile_that_the_card_does_not_have_is_not_taken():
    tables.install([table(entry(tile="128 x 256"))])
    problem = _C.Problem(SHAPE.rows, SHAPE.out_features, SHAPE.in_features, SHAPE.rank)
    plan = _C.plan_forward(_C.Card(86, 72, 102400, 101376, CARD), problem)
    assert plan.kernel and plan.tile == "128 x 64"


@given(
    measured=st.lists(st.integers(1, 10**6), min_size=1, max_size=6, unique=True),
    rows=st.integers(1, 10**6),
)
def test_the_nearest_rows_within_a_factor_of_two_count(measured, rows):
    tiles = ("128 x 256", "128 x 128", "128 x 64")
    won = {count: tiles[i % 3] for i, count in enumerate(measured)}
    tables.install([table(*(entry(moved(rows=m), tile=tile) for m, tile in won.items()))])
    plan = planned(moved(rows=rows))
    distance = {m: max(m, rows) / min(m, rows) for m in measured}
    least = min(distance.values())
    if least > 2.0:
        assert "measured" not in plan.reason
    else:
        assert plan.tile in {won[m] for m in measured if distance[m] == least}


def test_a_table_survives_its_file(tmp_path):
    written = table(entry(), entry(backward=True), entry(moved(rows=7, dropout=True)))
    path = tables.file_of(written, tmp_path / "new" / "folder")
    tune.write_table(written, path)
    assert tune.read_table(path) == written
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    more = written.with_entries([entry(tile="128 x 64")])
    tune.write_table(more, path)
    assert tune.read_table(path) == more and len(more.entries) == 3
    assert tune.read_table(path).entries[0].tile == "128 x 64"


def test_a_write_that_fails_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tune.write_table(table(entry()), path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_ext.tune.table.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tune.write_table(table(entry(), entry(backward=True)), path)
    assert tune.read_table(path) == table(entry()) and list(tmp_path.iterdir()) == [path]


def spoiled():
    document = {
        "schema": "lora_ext.tuning",
        "schema_version": 1,
        "card": CARD,
        "torch": "2",
        "lora_ext": "0",
        "entries": [
            {
                **vars(SHAPE),
                "backward": False,
                "route": "kernel",
                "tile": "128 x 64",
                "us": {"library": [1.0, 1.0, 1.0]},
            }
        ],
    }
    one = document["entries"][0]
    yield "expected JSON", "{ half a docu"
    yield "byte order mark", "\ufeff{}"
    yield "an object with 'schema'", "[]"
    yield "lora_ext.tuning version 1", json.dumps({**document, "schema_version": 2})
    yield "lora_ext.tuning version 1", json.dumps({**document, "schema": "another"})
    yield "'entries'", json.dumps({**document, "entries": {}})
    yield "two", json.dumps({**document, "entries": [one, one]})
    for change, words in (
        ({"rows": 0}, "sizes of at least 1"),
        ({"rows": 2**40}, "below 2.40"),
        ({"rows": True}, "'rows'"),
        ({"rows": 1.5}, "'rows'"),
        ({"dropout": 1}, "'dropout'"),
        ({"route": "auto"}, "a route of library"),
        ({"tile": "1 x 1"}, "no tile 1 x 1"),
        ({"us": {"library": [1.0]}}, "three times"),
        ({"us": {"library": [1.0, "fast", 1.0]}}, "a time"),
    ):
        yield words, json.dumps({**document, "entries": [{**one, **change}]})


@pytest.mark.parametrize(("words", "text"), list(spoiled()))
def test_what_is_no_table_is_ignored_with_a_word(words, text, tmp_path):
    path = tables.file_of(table(), tmp_path)
    path.write_text(text)
    with pytest.raises(tune.TableError, match=words):
        tune.read_table(path)
    with pytest.warns(UserWarning, match=r"lora_ext ignores the tuning in .*\.json"):
        assert tune.load_tables(tmp_path) == []
    assert "measured" not in planned().reason


def test_tables_are_read_and_those_of_other_versions_are_not(tmp_path):
    mine = table(entry())
    tune.write_table(mine, tables.file_of(mine, tmp_path))
    old = tune.Table(CARD, "1.0", mine.lora_ext, mine.entries)
    tune.write_table(old, tables.file_of(old, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tune.load_tables(tmp_path) == [mine]
        assert tune.load_tables(tmp_path / "missing") == []
    assert "measured" in planned().reason


def test_a_table_under_another_s_name_is_ignored_with_a_word(tmp_path):
    other = table(entry(), card="Another card")
    tune.write_table(other, tables.file_of(table(), tmp_path))
    with pytest.warns(UserWarning, match="it says it is of Another card"):
        assert tune.load_tables(tmp_path) == []


def test_the_user_s_table_goes_over_the_package_s(tmp_path, monkeypatch):
    package, user = tmp_path / "package", tmp_path / "user"
    both = moved(rows=64)
    shipped = tune.Table(CARD, "2.0", lora_ext.__version__, (entry(), entry(both)))
    tune.write_table(shipped, tables.file_of(shipped, package))
    mine = table(entry(both, tile="128 x 64"))
    tune.write_table(mine, tables.file_of(mine, user))
    monkeypatch.setattr(tables, "PACKAGED", package)
    assert tune.load_tables(user) == [shipped, mine]
    assert planned(both).tile == "128 x 64" and "torch 2.0" not in planned(both).reason
    assert planned().tile == "128 x 128" and "with torch 2.0" in planned().reason


def test_tables_of_the_package_are_of_this_version_and_valid():
    for path in tables.PACKAGED.glob("*.json"):
        found = tune.read_table(path)
        assert tables.file_of(found, tables.PACKAGED) == path
        assert found.lora_ext == lora_ext.__version__, f"measure {path} again, or remove it"


@pytest.mark.parametrize(
    ("kernel", "winner"),
    [
        ([8, 9, 8, 9], "kernel 128 x 64"),
        ([9.95, 9.95, 9.95, 9.95], "library"),  # half a percent
        ([5, 5, 10.5, 10.5], "library"),  # not in three rounds of four
        ([11, 12, 11, 12], "library"),
    ],
)
def test_the_library_stays_unless_another_clearly_wins(kernel, winner):
    times = {"library": [10.0] * 4, "kernel 128 x 64": [float(t) for t in kernel]}
    assert trial._fastest(times) == winner


@pytest.mark.parametrize(
    ("card", "forward", "masked"),
    [((80, 108, 167936, 166912), 3, 2), (H100, 7, 8)],
    ids=["A100", "H100"],
)
def test_candidates_are_what_the_card_can_do(card, forward, masked):
    shape = moved(dropout=True)
    found = [c.name for c in trial.candidates_for(_C.Card(*card), shape, backward=False)]
    assert found[:2] == ["library", "hybrid"] and len(found) == 2 + forward
    found = [c.name for c in trial.candidates_for(_C.Card(*card), shape, backward=True)]
    assert "kernel 128 x 256" not in found and len(found) == 2 + masked


def test_shapes_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 48))
    with pytest.raises(ValueError, match="has none"):
        tune.shapes_of(model, [16])
    config = lora_ext.LoRAConfig("all-linear", r=4, dropout=0.1)
    model = lora_ext.apply_lora(model.bfloat16(), config)
    found = tune.shapes_of(model, [16, 32])
    assert {(s.rows, s.in_features, s.out_features) for s in found} == {
        (16, 48, 32), (32, 48, 32), (16, 32, 48), (32, 32, 48)
    }  # fmt: skip
    assert all(s.rank == 4 and s.dropout for s in found)


def test_shapes_of_a_peft_model():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Embedding(9, 7)).bfloat16()
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], lora_dropout=0.1)
    found = tune.shapes_of(peft.get_peft_model(model, config), [16])
    assert found == [tune.Shape(16, 48, 32, 4, True, True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card to time on")
def test_the_command_without_a_card_says_what_is_missing(capsys):
    assert command.main(["--layer", "64x64"]) == 2
    said = capsys.readouterr().err
    assert "no CUDA kernels" in said or "no CUDA device" in said


@pytest.mark.parametrize(
    "words",
    [[], ["--layer", "64"], ["--layer", "0x64"], ["--layer", "64x64", "--rows", "-1"]],
    ids=str,
)
def test_bad_arguments_are_explained(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2 and "expected" in capsys.readouterr().err


def test_show_prints_the_tables_in_use(tmp_path, monkeypatch, capsys):
    mine = table(entry())
    tune.write_table(mine, tables.file_of(mine, tmp_path))
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path)
    assert command.main(["--show"]) == 0
    said = capsys.readouterr().out
    assert "4096x1024 r=16 M=2048, forward: kernel 128 x 128 (library 2.0 us)" in said


def test_import_reads_the_user_s_tables(tmp_path):
    if not _C.with_cuda:
        pytest.skip("the build has no CUDA kernels")
    mine = table(entry())
    folder = tmp_path / ".cache" / "lora_ext" / "tuning"
    tune.write_table(mine, tables.file_of(mine, folder))
    code = f"import lora_ext; from lora_ext import _C; card = _C.Card(*{H100}, {CARD!r});"
    code += "print(_C.plan_forward(card, _C.Problem(2048, 1024, 4096, 16)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": ""},
    )
    assert "fastest as measured" in done.stdout, done.stderr


@pytest.mark.gpu
def test_a_tuned_shape_is_not_slower_than_the_library_by_its_own_table(cuda, tmp_path):
    shape = tune.Shape(512, 1024, 1024, 16, dropout=True)
    found = tune.tune([shape], cuda, path=tmp_path / "table.json")
    assert tune.read_table(tmp_path / "table.json") == found
    for one in found.entries:
        chosen = f"{one.route} {one.tile}".strip()
        assert one.us[chosen][0] <= one.us["library"][0]
    x = torch.randn(512, 1024, device=cuda, dtype=torch.bfloat16)
    w = torch.randn(1024, 1024, device=cuda, dtype=torch.bfloat16)
    a, b = w[:16], w[:, :16].contiguous()
    assert "fastest as measured" in str(lora_ext.explain(x, w, a, b, 0.05))


def test_a_device_without_an_index_is_the_current_one(monkeypatch, tmp_path):
    """In every function that takes a device: the driver knows no device of number -1."""
    asked = []

    def card_of(device):
        asked.append(device)
        return _C.Card(*H100, CARD)

    monkeypatch.setattr(_C, "with_cuda", True)
    monkeypatch.setattr(_C, "cuda_card", card_of, raising=False)
    monkeypatch.setattr(_C, "early_launch", lambda: True, raising=False)
    monkeypatch.setattr(_C, "all_kernels", lambda card, early: [])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(trial, "_planner_listens", lambda card: contextlib.nullcontext())
    for device in ("cuda", torch.device("cuda"), None):
        trial.tune([], device, path=tmp_path / "table.json")
        tables.table_path(tmp_path, None if device is None else torch.device(device))
        lora_ext.warmup(device)
    lora_ext.plan(64, 64, 64, 8, card=torch.device("cuda"))
    assert asked == 10 * [torch.device("cuda", 3)]
    lora_ext.plan(64, 64, 64, 8, card=torch.device("cuda", 1))
    assert asked[-1] == torch.device("cuda", 1)
