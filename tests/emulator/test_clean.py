"""The kernels as they are raise no alarm, whatever the schedule, the size and the operands."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from emulator import build, mutants, run

pytestmark = pytest.mark.kernels

SEEDS = 120
# Of kernels with large tiles, whose seeds take several times as long under the race checker and
# ASan: a second each. The nightly test of the flags between blocks runs a thousand.
LARGE_TILES = {"lora_gemm_sm80", "lora_gemm_sm90a", "lora_gemm_in_grid_sm90a", "lora_grouped_gemm"}
SLOW_SEEDS = 60
# Wide batches of adapters in floats; and the whole op with many adapters, which launches thousands
# of blocks in each of its grids.
SEEDS_OF = {
    "lora_decode": {"race": 60, "asan": 24},
    "lora_grouped_sequence": {"plain": 60, "race": 20, "asan": 6},
}


def seeds_of(program: str, flavour: str) -> int:
    slow = program in LARGE_TILES and flavour != "plain"
    return SEEDS_OF.get(program, {}).get(flavour, SLOW_SEEDS if slow else SEEDS)


@pytest.mark.parametrize("flavour", build.FLAVOURS)
@pytest.mark.parametrize("program", mutants.PROGRAMS)
def test_clean_runs_raise_no_alarm(program, flavour, programs, pytestconfig):
    fault = pytestconfig.getoption("--plant", default=None)
    planted = ["--fault", fault] if fault else []
    half = seeds_of(program, flavour) // 2
    ranges = [f"1:{1 + half}", f"{1 + half}:{1 + 2 * half}"]
    with ThreadPoolExecutor(build.JOBS) as pool:
        halves = pool.map(
            lambda seeds: run.run_program(flavour, program, "--seeds", seeds, *planted), ranges
        )
        runs = [each for some in halves for each in some]
    failed = [each.describe() for each in runs if each.outcome != "clean"]
    assert not failed, "\n".join(failed)
    assert len(runs) == 2 * half


@pytest.mark.parametrize(
    ("program", "mutant"),
    [
        (
            "lora_gemm_sm90a",
            "lora_gemm_sm90a/load.wait_for_t.block.p.lets_wgrad_begin:never",
        ),
        (
            "lora_gemm_in_grid_sm90a",
            "lora_gemm_sm90a/in_grid.produce.jobs.block.p.lets_wgrad_begin:never",
        ),
    ],
)
def test_the_next_grid_begins_beside_the_last_tiles(program, mutant, programs):
    def early_blocks(*arguments):
        runs = run.run_program("plain", program, "--seeds", "1:57", *arguments)
        assert all(each.outcome == "clean" for each in runs)
        return sum(each.case["early_blocks"] for each in runs)

    assert early_blocks() > 0
    assert early_blocks("--fault", mutant) == 0
