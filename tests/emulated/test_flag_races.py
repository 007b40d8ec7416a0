"""A thousand seeds of the flags between blocks: one cluster resident, then as many as there are."""

import pytest

from emulated import programs
from emulator import run

pytestmark = pytest.mark.nightly

PROGRAM = "lora_gemm_fused_shrink_sm90a"


@pytest.fixture(scope="module")
def program():
    programs.build_programs([("race", PROGRAM)])


@pytest.mark.parametrize("resident", [("--resident", "1"), ()], ids=["one resident", "many"])
def test_a_thousand_seeds_have_no_race_and_end(program, resident):
    runs = run.run_program("race", PROGRAM, "--seeds", "1:1001", *resident, "--watchdog", "60")
    assert [each.describe() for each in runs if each.outcome != "clean"] == []
    assert len(runs) == 1000
