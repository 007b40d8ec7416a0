"""The traffic model: requests counted by hand, and figures that are those of the code."""

import shutil

import pytest

from benchmarks import results
from benchmarks.traffic import __main__ as model
from benchmarks.traffic import traffic_report

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

SMALL = (2048, 1024, 1024, 16)


@pytest.fixture(scope="module")
def rows():
    model.build()
    return {(row["direction"], row["variant"]): row for row in model.trace(SMALL)}


def test_requests_of_the_merged_product_are_those_of_its_tiles(rows):
    # 128 x 64 tiles of Y (the planner's choice: three waves of them are shorter than two of 128 x
    # 128): each asks for its rows of X and of W, once.
    m, k, n, _ = SMALL
    loads = 2 * k * (m * (n // 64) + n * (m // 128))
    for direction in ("forward", "backward"):
        assert rows[direction, "merged"]["requested"] == loads + 2 * m * n


def test_naive_adds_its_passes(rows):
    m, k, n, r = SMALL
    x, y, s = 2 * m * k, 2 * m * n, 2 * m * r
    adapters = 2 * r * (k + n)
    passes = x + s + (s + y) + 2 * y + 3 * y + adapters
    extra = rows["forward", "naive"]["requested"] - rows["forward", "merged"]["requested"]
    assert extra == passes


def test_ours_moves_less_than_naive_and_at_least_the_floor(rows):
    for direction in ("forward", "backward"):
        merged, ours, naive = (rows[direction, name] for name in traffic_report.VARIANTS)
        assert merged["requested"] < ours["requested"] < naive["requested"]
        assert merged["dram"] < ours["dram"] < naive["dram"]
        assert 0 < ours["over"] < 0.1


def test_the_committed_figures_are_those_of_this_code(rows):
    kept = results.read(model.OUT / "results.json")
    mine = [row for row in kept["rows"] if tuple(row["shape"]) == SMALL]
    assert {(r["direction"], r["variant"]): r["requested"] for r in mine} == {
        key: row["requested"] for key, row in rows.items()
    }
    table = traffic_report.table(kept)
    assert table in (model.OUT / "report.md").read_text()
    assert table in (model.ROOT / "docs" / "kernels.md").read_text()


def test_many_adapters_ask_for_little_more_than_one():
    model.build()
    [shape] = model.GROUPED_SHAPES
    rows = {(row["direction"], row["variant"]): row for row in model.trace_grouped(shape)}
    forward, merged = rows["forward", "grouped"], rows["forward", "merged"]
    assert forward["requested"] <= 1.05 * merged["requested"]
    assert forward["over"] <= traffic_report.ROOM
    # What reaches DRAM: one pass over X, each adapter once, and S.
    beyond = forward["dram"] - merged["dram"] - forward["passes"] - forward["adapters"]
    assert beyond <= 0.01 * merged["dram"]
    text = (model.ROOT / "docs" / "kernels.md").read_text()
    for direction in ("forward", "backward"):
        row = rows[direction, "grouped"]
        figures = [f"{rows[direction, 'merged']['requested'] / 1e6:.0f}"]
        figures += [f"{row['requested'] / 1e6:.0f}", f"{100 * row['over']:.2f} %"]
        figures += [f"{rows[direction, 'merged']['dram'] / 1e6:.0f}", f"{row['dram'] / 1e6:.0f}"]
        assert f"| {direction} | {' | '.join(figures)} |" in text


@pytest.fixture(scope="module")
def decoded():
    model.build()
    return {shape: model.trace_decode(shape) for shape in model.DECODE_SHAPES}


def test_few_rows_ask_for_the_weight_once(decoded):
    for (_, k, n, _, _), row in decoded.items():
        assert row["w"] == row["w_bytes"] == 2 * k * n


def test_few_rows_move_each_byte_once(decoded):
    for (m, _, _, _, adapters), row in decoded.items():
        assert row["dram"] >= row["once"]
        # Of 64 rows L2 has partial sums to write back, some time; they are read from it.
        left = row["sums"] / 2 if m == 64 else 0
        assert row["dram"] <= 1.03 * row["once"] + left, (m, adapters)


def test_eight_rows_ask_for_little_beside_the_weight(decoded):
    for (m, _, _, _, adapters), row in decoded.items():
        if m <= 8 and adapters == 1:
            assert row["x"] + row["sums"] + row["factors"] <= 0.25 * row["w"]


def test_the_figures_of_few_rows_are_those_in_the_docs(decoded):
    assert model.decode_table() in (model.ROOT / "docs" / "decode.md").read_text()
