"""The kernels as they are raise no alarm, whatever the schedule, the size and the operands."""

import pytest

from emulated import mutants
from emulator import build, run

pytestmark = pytest.mark.kernels

# Nine seeds see every schedule with every completion once.
FEW = {"plain": 36, "race": 18, "asan": 9}
MANY = 120
# Of kernels with large tiles, whose seeds take several times as long under the race checker and
# ASan; of wide batches of adapters in floats; and of the whole op with many adapters, which
# launches thousands of blocks in each of its grids.
LARGE_TILES = dict.fromkeys(["race", "asan"], 60)
MANY_OF = {
    "lora_gemm_sm80": LARGE_TILES,
    "lora_gemm_sm90a": LARGE_TILES,
    "lora_grouped_gemm": LARGE_TILES,
    "lora_grouped_own_weights": LARGE_TILES,
    "lora_grouped_own_weights_sm90a": LARGE_TILES,
    "lora_decode": {"race": 60, "asan": 24},
    "lora_grouped_sequence": {"plain": 60, "race": 20, "asan": 6},
}
FEW_OF = {"lora_grouped_sequence": {"plain": 18, "race": 6, "asan": 3}}


@pytest.mark.parametrize("flavour", build.FLAVOURS)
@pytest.mark.parametrize("program", mutants.PROGRAMS)
def test_clean_runs_raise_no_alarm(program, flavour, programs, seeds, pytestconfig):
    fault = pytestconfig.getoption("--plant", default=None)
    planted = ["--fault", fault] if fault else []
    few = FEW_OF.get(program, FEW)[flavour]
    many = MANY_OF.get(program, {}).get(flavour, MANY)
    runs = run.run_seeds(flavour, program, seeds.range(few, many), *planted)
    failed = [each.describe() for each in runs if each.outcome != "clean"]
    assert not failed, "\n".join(failed)
    assert len(runs) == seeds.choose(few, many)


@pytest.mark.parametrize("program", ["lora_gemm_sm90a"])
def test_the_next_grid_begins_beside_the_last_tiles(program, programs):
    mutant = "gemm/sm90a/load.wait_for_t.block.p.trigger_dependents:never"

    def early_blocks(*arguments):
        runs = run.run_program("plain", program, "--seeds", "1:57", *arguments)
        assert all(each.outcome == "clean" for each in runs)
        return sum(each.case["early_blocks"] for each in runs)

    assert early_blocks() > 0
    assert early_blocks("--fault", mutant) == 0
