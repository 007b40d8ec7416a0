"""docs/main_loops.md and docs/kernels.md say of our main loops what was recorded of them."""

import json
import re
import sys

import pytest

from emulator import build

sys.path.insert(0, str(build.ROOT / "scripts"))
import sass_baseline
import sass_rates
import sass_table

pytestmark = pytest.mark.kernels

STALE = "stale: python scripts/sass_table.py --write"


def test_the_table_has_a_row_for_each_kind_of_kernel():
    rows = sass_table.rows_of(sass_table.PAGE.read_text())
    expected = [(card, each) for card, families in sass_table.ROWS.items() for each in families]
    assert [(row["card"], row["kernel"]) for row in rows] == expected
    of_an_a100 = {row["kernel"].split()[0] for row in rows if row["card"] == "A100"}
    compiled = {
        "lora_gemm",
        "lora_grouped_gemm",
        "lora_shrink",
        "lora_wgrad",
        "lora_dsdb",
        "lora_decode",
    }
    assert of_an_a100 == compiled


def test_the_rows_are_what_was_recorded():
    recorded = sass_baseline.read()
    for row in sass_table.rows_of(sass_table.PAGE.read_text()):
        loops = recorded[sass_rates.RECORDED[row["card"]]][row["kernel"]]
        cycles, share = sass_rates.step_of(row["kernel"], loops)
        found = row["cycles"], row["of the tensor rate"]
        assert found == (f"{cycles:.0f}", f"{share:.3f}"), (row["card"], row["kernel"], STALE)


@pytest.mark.parametrize("page", [sass_table.PAGE, sass_table.KERNELS], ids=lambda page: page.name)
def test_sentences_say_what_was_recorded(page):
    text, recorded = page.read_text(), sass_baseline.read()
    assert sass_table.with_sentences(page, text, recorded) == text, STALE
    slower = {**recorded, "sm_80": {**recorded["sm_80"]}}
    for family in ("lora_gemm 128x256", "lora_grouped_gemm 128x256"):
        slower["sm_80"][family] = [[4096.0, 0.5]]
    changed = sass_table.with_sentences(page, text, slower)
    assert changed != text and len(changed.splitlines()) == len(text.splitlines())


def test_rows_of_the_page_of_kernels_say_what_was_recorded():
    text, recorded = sass_table.KERNELS.read_text(), sass_baseline.read()
    assert len(sass_table.ROW.findall(text)) == 12
    assert sass_table.with_rows(text, recorded) == text, STALE
    slower = {**recorded, "sm_80": {**recorded["sm_80"], "lora_gemm 128x256": [[4096.0, 0.5]]}}
    assert "| 3389, 4096 | 0.60, 0.50 |" in sass_table.with_rows(text, slower)


def test_the_page_of_kernels_says_how_many_there_are():
    text, counts = sass_table.KERNELS.read_text(), sass_baseline.read()["kernels"]
    pattern = r"(\d+)\s+for sm_80 \(\d+ of them for many\s+adapters\) and (\d+) for sm_90a"
    found = re.search(pattern, text)
    assert found and {"sm_80": int(found[1]), "sm_90a": int(found[2])} == counts


def test_a_row_by_hand():
    needs = dict.fromkeys(sass_table.NEEDS, 512.2)
    loop = {"warps": 2, "instructions": {"tensor": 32, "copies": 6}, "needs": needs}
    loop |= {"cycles": 1000.4, "efficiency": 0.512, "bound": "latency"}
    loop |= {"products_ahead": 6.1, "copies_among": 0.5}
    at_the_end = {**loop, "cycles": 5000.0, "efficiency": 0.2}
    cells = "lora_decode 64 | 2 | 38 | 512 | 512 | 512 | 512 | 1000 | 0.512 | latency | 6.1 | 0.5"
    assert sass_table.row("A100", "lora_decode 64", [loop, at_the_end]) == f"| A100 | {cells} |"
    name_of = sass_table.name_of
    assert name_of("lora_gemm 128x64 MN-major") == "lora_gemm 128x64 bf16 MN-major"
    family = "lora_gemm_sm90a 128x192 pingpong tail 1"
    assert name_of(family) == "lora_gemm_sm90a 128x192 pingpong bf16 tail 1"
    kernels = [
        {"name": name_of(each), "main_loops": [loop], "consumer_loops": [loop]}
        for card, families in sass_table.ROWS.items()
        for each in families
    ]
    text = sass_table.table(dict.fromkeys(("sm_80", "sm_90a"), json.loads(json.dumps(kernels))))
    rows = sass_table.rows_of(f"\n{text}")
    assert len(rows) == len(kernels) and all(row["cycles"] == "1000" for row in rows)
